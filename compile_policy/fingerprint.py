"""Identity of the structure behind a region: what a graph takes for granted about the module itself.

Covered: the module tree and its classes with their methods and class attributes (whole numbers aside), a ``forward``
set on an instance, hooks of sub-modules (those of the component itself run round its graph), training flags, Python
attributes that a forward may read (numbers, strings, flags, functions such as activations, configuration objects),
and the identity, dtype, device and layout of every parameter and buffer. Values of tensors are not: they are inputs
of the graph. Two equal fingerprints trace to the same graph with the same bound tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from compile_policy.layers.registry import registry_state

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_OWN = frozenset(torch.nn.Module().__dict__) | {"_compiled_call_impl"}
_DEPTH = 3


class Fingerprint:
    """Remembers the fingerprint of a module and looks again when asked.

    The full walk costs microseconds per sub-module, so it is done where a sequence starts and not once a token.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._known: dict[tuple[Any, ...], int] = {}
        self._current: int | None = None

    @property
    def number(self) -> int | None:
        """The structure's number as last looked at."""
        return self._current

    def current(self, *, look_again: bool) -> int:
        """A small number that stands for the structure; another structure has another number."""
        if self._current is None or look_again:
            structure = (registry_state(), fingerprint(self._module))
            self._current = self._known.setdefault(structure, len(self._known))
        return self._current

    def difference(self, was: int, now: int) -> str:
        """The first place in which two structures differ, in words."""
        by_number = {number: structure for structure, number in self._known.items()}
        (layers, structure), (layers_now, structure_now) = by_number[was], by_number[now]
        return "the registry of layers" if layers != layers_now else difference(structure, structure_now)


def fingerprint(module: torch.nn.Module) -> tuple[Any, ...]:
    """The structure of ``module`` and everything below it as nested tuples."""
    walk = _Walk()
    return tuple((name, walk.module(m, root=m is module)) for name, m in module.named_modules(remove_duplicate=False))


def difference(was: tuple[Any, ...], now: tuple[Any, ...]) -> str:
    """The first module, and what about it, in which two fingerprints differ."""
    parts = ("class", "training flag", "hooks", "attribute", "parameter or buffer")
    for (name, before), (other, after) in zip(was, now, strict=False):
        if name != other:
            break
        for part, x, y in zip(parts, before, after, strict=True):
            if x == y:
                continue
            where = name or "the component"
            if part == "attribute":
                return f"attribute {_first_changed(x, y)!r} of {where}"
            if part == "class" and x[0] == y[0]:
                return f"class attribute {_first_changed(x[1], y[1])!r} of {where}"
            return f"{part} of {where}"
    return f"the module tree ({len(was)} modules, now {len(now)})"


def _first_changed(was: tuple[tuple[str, Any], ...], now: tuple[tuple[str, Any], ...]) -> str:
    old, new = dict(was), dict(now)
    return next((n for n in {**old, **new} if old.get(n) != new.get(n)), "")


class _Same:
    """Equal for the same object only, also after the object is gone and its address is used again."""

    __slots__ = ("_hash", "_of")

    def __init__(self, value: Any) -> None:
        self._hash = id(value)
        self._of: Callable[[], Any]
        try:
            self._of = weakref.ref(value)
        except TypeError:
            self._of = lambda: value  # cannot be referred to weakly: kept, so that its address stays taken

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or self._hash != other._hash:
            return False
        mine = self._of()
        return mine is not None and mine is other._of()


class _Walk:
    """One look at a module tree. Classes and objects that many modules share are looked at once."""

    def __init__(self) -> None:
        self._classes: dict[type, Hashable] = {}
        self._objects: dict[int, Hashable] = {}

    def module(self, m: torch.nn.Module, *, root: bool) -> tuple[Any, ...]:
        own = m.__dict__
        attributes = tuple((n, self._value(v)) for n, v in own.items() if n not in _OWN)
        hooks = () if root else tuple(_Same(h) for kind in _HOOKS for h in own[kind].values())
        tensors = tuple(_tensor(n, t) for group in ("_parameters", "_buffers") for n, t in own[group].items())
        return (self._class(type(m)), own["training"], hooks, attributes, tensors)

    def _class(self, cls: type) -> Hashable:
        """A class with its methods and plain attributes: replacing a method on the class changes every instance."""
        known = self._classes.get(cls)
        if known is None:
            bases = [base for base in cls.__mro__ if base not in (torch.nn.Module, object)]
            own = tuple((n, _shallow(v)) for base in bases for n, v in vars(base).items() if _is_read(n, v))
            known = self._classes[cls] = (_Same(cls), own)
        return known

    def _value(self, value: Any, depth: int = 0) -> Hashable:
        """Hashable stand-in for an attribute: by value where it is plain, else by identity and what is in it."""
        if isinstance(value, _PLAIN) or depth >= _DEPTH:
            return _shallow(value)
        if isinstance(value, (list, tuple)):
            return (value.__class__, tuple([self._value(v, depth + 1) for v in value]))
        if isinstance(value, (set, frozenset)):
            return (value.__class__, frozenset([self._value(v, depth + 1) for v in value]))
        if isinstance(value, Mapping):
            return (value.__class__, tuple([(str(k), self._value(v, depth + 1)) for k, v in value.items()]))
        if isinstance(value, torch.Tensor):
            return _tensor("", value)
        if isinstance(value, (type, torch.nn.Module)) or not hasattr(value, "__dict__") or callable(value):
            return _Same(value)
        return self._object(value, depth)

    def _object(self, value: Any, depth: int) -> Hashable:
        """An object with attributes, such as a configuration."""
        if id(value) not in self._objects:
            self._objects[id(value)] = _Same(value)  # an object may refer to itself
            inside = tuple([(n, self._value(v, depth + 1)) for n, v in list(vars(value).items())])
            self._objects[id(value)] = (_Same(value), inside)
        return self._objects[id(value)]


def _shallow(value: Any) -> Hashable:
    """By value where it is plain, else by identity."""
    if not isinstance(value, _PLAIN):
        return _Same(value)
    return (value.__class__, repr(value) if isinstance(value, float) else value)  # 0.0 == -0.0, nan != nan


def _is_read(name: str, value: Any) -> bool:
    """Whether a forward may depend on the class attribute; the interpreter's own, and counters, come and go."""
    counter = type(value) is int
    return not counter and (not name.startswith(("__", "_abc_")) or name in ("__call__", "__getattr__"))


def _tensor(name: str, t: torch.Tensor | None) -> tuple[Any, ...]:
    if t is None:
        return (name, None)
    layout = t.stride() if t.layout is torch.strided else t.layout
    return (name, _Same(t), t.dtype, t.device, tuple(t.shape), layout, t.requires_grad)
