"""What a forward can reach in Python: state that a run may change, and code that its user wrote.

The walk starts at a module and goes through attributes, containers, objects, closures, methods replaced on a class, and
the globals that a user's function names. Code of installed packages and of Python itself is not looked into beyond what
it closes over: what it keeps for itself is no state of a model.
"""

from __future__ import annotations

import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from compile_policy.tensors import OWN_ATTRIBUTES, cell_contents, is_machinery, parts_of, slots_of
from compile_policy.walk import Walk

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.Tensor)
_CONTAINERS = (list, dict, set)
#: Objects looked at before the walk gives up: what is behind them is not kept.
_MOST = 200_000
_DEPTH = 40
_trusted: list[str] = [os.path.dirname(os.path.abspath(__file__))]
_roots: list[Callable[[torch.nn.Module], Iterator[tuple[str, Any]]]] = []
_ABSENT: Any = object()


def trust_folder(folder: str) -> None:
    """Declare that the code in a folder belongs to an installed package, wherever it lies."""
    _trusted.append(os.path.abspath(folder))


def register_reached(roots: Callable[[torch.nn.Module], Iterator[tuple[str, Any]]]) -> None:
    """Add (name, object) pairs that the forward of a module reaches through a registry of a modelling library."""
    _roots.append(roots)


def is_users(value: Any) -> bool:
    """Whether a function or a class was written outside of installed packages and Python's own library."""
    if isinstance(value, type):
        module = sys.modules.get(value.__module__)
        if module is None:
            return True
        file = getattr(module, "__file__", None)
        return _is_users_file(file) if file else value.__module__ == "__main__"
    code = getattr(value, "__code__", None)
    return isinstance(code, types.CodeType) and _is_users_file(code.co_filename)


_known_files: dict[str, bool] = {}
_LIBRARY = os.path.dirname(os.path.abspath(os.__file__))


def _is_users_file(file: str) -> bool:
    known = _known_files.get(file)
    if known is None:
        known = _known_files[file] = _looks_like_users(file)
    return known


def _looks_like_users(file: str) -> bool:
    if file.startswith("<"):  # made by Python or a library, or typed in
        return not file.startswith(("<frozen", "<string>", "<eval_with_key>", "<__array_function__"))
    parts = os.path.abspath(file).split(os.sep)
    if "site-packages" in parts or "dist-packages" in parts:
        return False
    return not any(os.path.abspath(file).startswith(folder + os.sep) for folder in (_LIBRARY, *_trusted))


class Reached:
    """One walk.

    Attributes:
        users: where the first piece of a user's own code was found; empty when there is none.
        kept: what can be changed in Python, each as it is now.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.users = ""
        self.kept: list[Kept] = []
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # so that no number is used again while the walk goes on
        for path, m in module.named_modules():
            self._module(m, path)
        for find in _roots:
            for name, value in find(module):
                self._visit(value, name, 0)

    def changed(self) -> list[str]:
        """Names of what is not as it was; something new that equals the old by value is no change."""
        return [kept.name for kept in self.kept if kept.is_changed() and not kept.is_alike()]

    def restore(self) -> list[str]:
        """Give everything back what it held, and return the names of what had changed."""
        changed = [kept for kept in self.kept if kept.is_changed()]
        for kept in changed:
            kept.restore()
        return [kept.name for kept in changed]

    def _note_users(self, place: str) -> None:
        self.users = self.users or place

    def _is_new(self, value: Any) -> bool:
        if id(value) in self._seen or len(self._seen) > _MOST:
            return False
        self._seen.add(id(value))
        self._alive.append(value)
        return True

    def _module(self, m: torch.nn.Module, path: str) -> None:
        if not self._is_new(m):
            return
        name = path or "self"
        self._class(type(m), name)
        self.kept.append(KeptDict(name, m.__dict__, but="_compiled_call_impl"))
        for group in ("_parameters", "_buffers", "_modules"):
            self.kept.append(KeptDict(name, m.__dict__[group]))
        for attribute, value in list(m.__dict__.items()):
            if attribute not in OWN_ATTRIBUTES:
                self._visit(value, f"{name}.{attribute}", 1)

    def _visit(self, value: Any, place: str, depth: int) -> None:
        if isinstance(value, _PLAIN) or depth > _DEPTH:
            return
        if isinstance(value, torch.nn.Module):
            for path, m in value.named_modules() if id(value) not in self._seen else ():
                self._module(m, f"{place}.{path}" if path else place)
            return
        if isinstance(value, type):
            if is_users(value):
                self._class(value, place)
            return
        if isinstance(value, types.ModuleType) or not self._is_new(value):
            return
        if isinstance(value, types.FunctionType):
            self._function(value, place, depth)
        elif is_users(type(value)):
            self._class(type(value), place)
        self._keep(value, place)
        for step, item in parts_of(value):
            self._visit(item, place + step, depth + 1)

    def _keep(self, value: Any, place: str) -> None:
        if isinstance(value, dict):
            self.kept.append(KeptDict(place, value))
        elif isinstance(value, _CONTAINERS) or type(value).__name__ == "deque":
            self.kept.append(KeptItems(place, value))
        elif (state := _state_of(value)) is not None:
            self.kept.append(KeptState(place, value, state))
        if isinstance(value, (types.FunctionType, types.MethodType)) or is_machinery(type(value)):
            return
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            self.kept.append(KeptDict(place, own))
        names = slots_of(value)
        if names:
            self.kept.append(KeptSlots(place, value, names))

    def _function(self, function: types.FunctionType, place: str, depth: int) -> None:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if self._is_new(cell):
                self.kept.append(KeptCell(f"{name} in {place}", cell))
        if is_users(function):
            self._note_users(f"{place} ({function.__qualname__})")
            for name in _names_in(function.__code__):
                self._global(function.__globals__, name, f"the global {name}", depth)

    def _global(self, namespace: dict[str, Any], name: str, place: str, depth: int) -> None:
        if name not in namespace:
            return
        value = namespace[name]
        if isinstance(value, types.ModuleType):
            self._python_module(value, depth)
            return
        self.kept.append(KeptItem(place, namespace, name))
        self._visit(value, place, depth + 1)

    def _python_module(self, module: types.ModuleType, depth: int) -> None:
        """The user's own modules: which of their globals are named is not known from here."""
        file = getattr(module, "__file__", None)
        if file is None or not _is_users_file(file) or not self._is_new(module):
            return
        for name in [n for n in vars(module) if not n.startswith("__")]:
            self._global(vars(module), name, f"{module.__name__}.{name}", depth)

    def _class(self, cls: type, place: str) -> None:
        if not self._is_new(cls):
            return
        for base in cls.__mro__:
            if base in (object, torch.nn.Module):
                continue
            users = is_users(base)
            if users:
                self._note_users(f"{place} ({base.__qualname__})")
            for name, value in list(vars(base).items()):
                if name.startswith("__") and name not in ("__call__", "__getattr__"):
                    continue
                function = _function_in(value)
                if function is not None:
                    self._visit(function, f"{base.__qualname__}.{name}", 1)
                elif users and not isinstance(value, (property, type)) and not name.startswith("_abc_"):
                    self.kept.append(KeptClassAttribute(f"{base.__qualname__}.{name}", base, name))
                    self._visit(value, f"{base.__qualname__}.{name}", 1)
            self._replaced_globals(base)

    def _replaced_globals(self, cls: type) -> None:
        """Functions of the user's that stand in the namespace of a library's module, where its code looks them up."""
        module = sys.modules.get(cls.__module__)
        if module is None or is_users(cls) or not self._is_new(module):
            return
        for name, value in list(vars(module).items()):
            if isinstance(value, types.FunctionType) and is_users(value):
                self._visit(value, f"{module.__name__}.{name}", 1)
            elif isinstance(value, type) and value is not cls and is_users(value):
                self._note_users(f"{module.__name__}.{name} ({value.__qualname__})")


class Kept:
    """Something that can be changed, and what it was."""

    name: str

    def is_changed(self) -> bool:
        """Whether other objects stand there now."""
        raise NotImplementedError

    def is_alike(self) -> bool:
        """Whether what stands there now means the same, although the objects are others."""
        return False

    def restore(self) -> None:
        raise NotImplementedError


class KeptDict(Kept):
    """A dict, in its order; without one key that is nobody's business."""

    def __init__(self, name: str, held: dict[Any, Any], but: Any = None) -> None:
        self.name, self.held, self.but = name, held, but
        self.keys, self.values = self._now()

    def _now(self) -> tuple[list[Any], list[Any]]:
        pairs = list(dict.items(self.held))
        if self.but is not None:
            pairs = [pair for pair in pairs if pair[0] != self.but]
        return [key for key, _ in pairs], [value for _, value in pairs]

    def is_changed(self) -> bool:
        keys, values = self._now()
        return not (_same_items(keys, self.keys) and _same_items(values, self.values))

    def is_alike(self) -> bool:
        keys, values = self._now()
        return _same_items(keys, self.keys) and _alike(values, self.values)

    def restore(self) -> None:
        keys, _ = self._now()
        known = set(self.keys)
        in_order = _same_items([key for key in keys if key in known], self.keys)
        for key in keys:
            if key not in known or not in_order:  # one was taken out: all go in again, in order
                dict.pop(self.held, key, None)
        for key, value in zip(self.keys, self.values, strict=True):
            if key not in self.held or dict.__getitem__(self.held, key) is not value:
                dict.__setitem__(self.held, key, value)


class KeptItems(Kept):
    """A list, set or deque."""

    def __init__(self, name: str, held: Any) -> None:
        self.name, self.held, self.items = name, held, list(held)

    def is_changed(self) -> bool:
        return not _same_items(list(self.held), self.items)

    def is_alike(self) -> bool:
        return not isinstance(self.held, set) and _alike(list(self.held), self.items)

    def restore(self) -> None:
        self.held.clear()
        if isinstance(self.held, set):
            set.update(self.held, self.items)
        else:
            self.held.extend(self.items)


class KeptItem(Kept):
    """One entry of a namespace."""

    def __init__(self, name: str, namespace: dict[str, Any], key: str) -> None:
        self.name, self.namespace, self.key, self.value = name, namespace, key, namespace[key]

    def is_changed(self) -> bool:
        return self.namespace.get(self.key, _ABSENT) is not self.value

    def is_alike(self) -> bool:
        return _alike([self.namespace.get(self.key, _ABSENT)], [self.value])

    def restore(self) -> None:
        self.namespace[self.key] = self.value


class KeptClassAttribute(Kept):
    """A plain attribute of a class, such as a count of all instances."""

    def __init__(self, name: str, cls: type, key: str) -> None:
        self.name, self.cls, self.key, self.value = name, cls, key, vars(cls)[key]

    def is_changed(self) -> bool:
        return vars(self.cls).get(self.key, _ABSENT) is not self.value

    def is_alike(self) -> bool:
        return _alike([vars(self.cls).get(self.key, _ABSENT)], [self.value])

    def restore(self) -> None:
        setattr(self.cls, self.key, self.value)


class KeptCell(Kept):
    """What a closure's variable holds."""

    def __init__(self, name: str, cell: Any) -> None:
        self.name, self.cell, self.value = name, cell, cell_contents(cell)

    def is_changed(self) -> bool:
        return cell_contents(self.cell) is not self.value

    def is_alike(self) -> bool:
        return _alike([cell_contents(self.cell)], [self.value])

    def restore(self) -> None:
        self.cell.cell_contents = self.value


class KeptSlots(Kept):
    """Attributes of an object without a dict."""

    def __init__(self, name: str, held: Any, names: list[str]) -> None:
        self.name, self.held = name, held
        self.values = {n: getattr(held, n, _ABSENT) for n in names}

    def is_changed(self) -> bool:
        return any(getattr(self.held, n, _ABSENT) is not value for n, value in self.values.items())

    def restore(self) -> None:
        for name, value in self.values.items():
            if value is not _ABSENT:
                object.__setattr__(self.held, name, value)
            elif getattr(self.held, name, _ABSENT) is not _ABSENT:
                object.__delattr__(self.held, name)


class KeptState(Kept):
    """A generator of random numbers, or an array: what it holds is copied."""

    def __init__(self, name: str, held: Any, state: Any) -> None:
        self.name, self.held, self.state = name, held, state

    def is_changed(self) -> bool:
        now = _state_of(self.held)
        if hasattr(now, "shape"):
            return bool((now != self.state).any())
        return bool(now != self.state)

    def restore(self) -> None:
        if isinstance(self.held, torch.Generator):
            self.held.set_state(self.state)
        elif isinstance(self.held, random.Random):
            self.held.setstate(self.state)
        elif hasattr(self.held, "bit_generator"):
            self.held.bit_generator.state = self.state
        else:
            self.held[...] = self.state


def _state_of(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if not type(value).__module__.startswith("numpy"):
        return None
    if hasattr(value, "bit_generator"):
        return value.bit_generator.state
    return value.copy() if type(value).__name__ == "ndarray" else None


def _same_items(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _alike(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists hold the same by value, as a fingerprint compares attributes."""
    return Walk().value(a) == Walk().value(b)


def _function_in(value: Any) -> Any:
    """The function in a method, class method, static method or property."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    return value if isinstance(value, types.FunctionType) else None


def _names_in(code: types.CodeType) -> set[str]:
    """Names of globals that the code, and functions inside it, may read."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names_in(constant)
    return found
