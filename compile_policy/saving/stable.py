"""Values in a form that is equal in every process in which they mean the same.

No address, no order of a set, no absolute path ends up in it. Functions stand for their bytecode, defaults and
closure, classes for their name and methods, modules and tensors of the component for their place in it.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import logging
import types
import weakref
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple, TypeAlias

import torch

from compile_policy.layers.identity import stable_code

_PLAIN = (bool, int, str, type(None))
_TEXT = (torch.dtype, torch.layout, torch.memory_format, torch._ops.OpOverload, torch._ops.OpOverloadPacket, PurePath)
_DEPTH, _LENIENT_DEPTH = 12, 5
_BUILT_IN = ("builtins", "abc", "typing", "collections.abc", "enum")
_OF_THE_INTERPRETER = ("__module__", "__doc__", "__qualname__", "__annotate__")

#: class -> attributes of its instances that no computation reads, such as where a checkpoint was loaded from.
_ignored: dict[type, frozenset[str]] = {}


class Unstable(Exception):
    """A value that cannot be recognised in another process."""


def ignore_attributes(cls: type, names: Iterable[str]) -> None:
    """Leave attributes of instances of ``cls`` out of what identifies an artifact.

    A graph that was traced through code that names one of them is not saved, so a wrong entry here costs a compile.
    """
    _ignored[cls] = _ignored.get(cls, frozenset()) | frozenset(names)


def ignored_names() -> frozenset[str]:
    """Every attribute name that some class is told to ignore."""
    return frozenset().union(*_ignored.values())


def digest(form: Any) -> str:
    """Short digest of a form."""
    return hashlib.sha256(json.dumps(form, sort_keys=True).encode()).hexdigest()[:24]


class _Known(NamedTuple):
    """An object's form; which values outside of it the form refers to as being walked; the object, kept alive for its
    id."""

    form: list[str]
    met: frozenset[int]
    value: Any


#: An object's id, and how it is looked at: depth, leniently, as part of a class.
_Key: TypeAlias = tuple[int, int, bool, bool]


class Stable:
    """Makes forms; what many values share is looked at once.

    Args:
        places: id of a module or tensor of the component -> its place.
        lenient: an object that says nothing about itself stands for its type instead of raising `Unstable`.
    """

    def __init__(self, places: Mapping[int, str] | None = None, *, lenient: bool = False) -> None:
        self.places = places or {}
        self.lenient = lenient
        self._active: set[int] = set()
        self._devices: dict[torch.device, str] = {}
        self._classes: dict[type, Any] = {}
        self._objects: dict[_Key, _Known] = {}
        self._looped: dict[_Key, _Known] = {}  # of objects in a loop, told by where it was entered: for one call only
        self._met: set[int] = set()  # ids of values being walked that were met again
        self._in_class = False

    def __call__(self, value: Any, depth: int = 0) -> Any:
        """The form of ``value``: nested lists of strings.

        Raises:
            Unstable: it has none.
        """
        if isinstance(value, _PLAIN) and not isinstance(value, enum.Enum):
            return f"{type(value).__name__}:{value}"
        if isinstance(value, (float, complex)):
            return f"{type(value).__name__}:{value!r}"
        if isinstance(value, bytes):
            return f"bytes:{hashlib.sha256(value).hexdigest()}"
        if isinstance(value, _TEXT):
            return f"{type(value).__name__}:{value}"
        if isinstance(value, torch.device):
            return self.device(value)
        if isinstance(value, enum.Enum):
            return ["enum", _name(type(value)), value.name]
        if depth > (_LENIENT_DEPTH if self.lenient else _DEPTH):
            return self._opaque(value, "is nested too deeply")
        if id(value) in self.places:
            return ["of the component", self.places[id(value)]]
        if isinstance(value, type):
            return self._class(value)
        if id(value) in self._active:
            self._met.add(id(value))
            return "itself"
        self._active.add(id(value))
        try:
            return self._compound(value, depth + 1)
        finally:
            self._active.discard(id(value))
            self._met.discard(id(value))
            if not self._active:
                self._looped.clear()

    def device(self, device: torch.device) -> str:
        """The kind of a device, and which of that kind in the order of their appearance: the index is the machine's."""
        kind = sum(known.type == device.type for known in self._devices)
        return self._devices.setdefault(device, f"device:{device.type}#{kind}")

    def tensor(self, t: torch.Tensor) -> Any:
        """Everything about a tensor but its values.

        Raises:
            Unstable: a subclass, whose parts are its own business.
        """
        if type(t) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            return self._opaque(t, "is a tensor with rules of its own")
        layout = str(t.stride()) if t.layout is torch.strided else str(t.layout)
        return ["tensor", str(t.dtype), self.device(t.device), str(tuple(t.shape)), layout, str(t.requires_grad)]

    def attributes(self, value: Any, depth: int = 0, skip: Iterable[str] = ()) -> list[Any]:
        """The attributes of an object by name, without the ignored ones."""
        left_out = {n for cls, names in _ignored.items() if isinstance(value, cls) for n in names} | set(skip)
        found: dict[str, Any] = dict(vars(value))
        for cls in type(value).__mro__:
            slots = vars(cls).get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                if hasattr(value, slot):
                    found.setdefault(slot, getattr(value, slot))
        return [[n, self._attribute(n, found[n], depth)] for n in sorted(found) if n not in left_out]

    def _attribute(self, name: str, value: Any, depth: int) -> Any:
        try:
            return self(value, depth)
        except Unstable as error:
            raise Unstable(f".{name}{error}" if str(error).startswith(".") else f".{name} {error}") from None

    def _compound(self, value: Any, depth: int) -> Any:
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if isinstance(value, (list, tuple)):
            return [_name(type(value)), *[self(v, depth) for v in value]]
        if isinstance(value, (set, frozenset)):
            return [_name(type(value)), *_sorted(self(v, depth) for v in value)]
        if isinstance(value, Mapping):
            items = _sorted([self(k, depth), self(v, depth)] for k, v in value.items())
            return [_name(type(value)), items, self._rest(value, depth)]
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, types.MethodType):
            return ["method", self(value.__self__, depth), self(value.__func__, depth)]
        if isinstance(value, functools.partial):
            return ["partial", self(value.func, depth), self(value.args, depth), self(value.keywords, depth)]
        if isinstance(value, types.BuiltinFunctionType):
            return ["builtin", str(value.__module__), value.__qualname__]
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        if isinstance(value, logging.Logger):
            return ["logger", value.name]
        if isinstance(value, torch.library.Library):
            return ["library", value.ns, value.kind]  # what is registered on it is the process's
        if isinstance(value, weakref.ref):
            return self(value(), depth)
        if isinstance(value, torch.nn.Module):
            return self._opaque(value, "is a module outside the component")
        if isinstance(value, (classmethod, staticmethod)):
            return self(value.__func__, depth)
        if isinstance(value, property):
            return ["property", *[self(f, depth) for f in (value.fget, value.fset)]]
        if hasattr(value, "__dict__"):
            return self._object(value, depth)
        return self._opaque(value, "says nothing about itself")

    def _object(self, value: Any, depth: int) -> Any:
        """An object by its attributes; a configuration that every layer holds is walked once.

        Its form is the same wherever the walk first came to it: which of two names of one object is looked at first
        may differ from process to process.
        """
        key = (id(value), depth, self.lenient, self._in_class)
        known = self._objects.get(key) or self._looped.get(key)
        if known is None:
            outer, self._met = self._met, set()
            form = ["object", _name(type(value)), digest(self.attributes(value, depth))]
            met, self._met = self._met - {id(value)}, outer
            known = _Known(form, frozenset(met), value)
            (self._looped if met else self._objects)[key] = known
        self._met |= known.met
        return known.form

    def _rest(self, value: Any, depth: int) -> Any:
        return self.attributes(value, depth) if hasattr(value, "__dict__") else None

    def _opaque(self, value: Any, why: str) -> Any:
        if self.lenient:
            return ["a", _name(type(value))]
        raise Unstable(f"({_name(type(value))}) {why}")

    def _function(self, f: types.FunctionType, depth: int) -> Any:
        code = hashlib.sha256(stable_code(f.__code__)).hexdigest()[:16]
        lenient, self.lenient = self.lenient, True  # a closure over what says nothing is told by its code
        try:
            inside = [_content(cell) for cell in f.__closure__ or ()]
            rest = [self(v, depth) for v in (f.__defaults__, f.__kwdefaults__, inside)]
        finally:
            self.lenient = lenient
        return ["function", _name(f), code, rest]

    def _class(self, cls: type) -> Any:
        """A class by its name and its methods. Classes that these refer to stand for their names."""
        of_torch = self.lenient and cls.__module__.split(".")[0] == "torch"  # its version is a factor of its own
        if self._in_class or of_torch or cls.__module__ in _BUILT_IN:
            return ["class", _name(cls)]
        if cls not in self._classes:
            around = self._active, self._met, self._looped
            self._in_class, (self._active, self._met, self._looped) = True, (set(), set(), {})
            try:
                own = [[name, self._member(v)] for base in cls.__mro__ for name, v in _members(base)]
            finally:
                self._in_class, (self._active, self._met, self._looped) = False, around
            self._classes[cls] = ["class", _name(cls), digest(own)]
        return self._classes[cls]

    def _member(self, value: Any) -> Any:
        lenient, self.lenient = self.lenient, True
        try:
            return self(value)
        finally:
            self.lenient = lenient


def _members(base: type) -> list[tuple[str, Any]]:
    """Methods and plain attributes; whole numbers count calls as often as not, containers are caches."""
    if base.__module__ in _BUILT_IN or base is torch.nn.Module:
        return []
    kinds = (types.FunctionType, classmethod, staticmethod, property, bool, float, str)
    return [(n, v) for n, v in sorted(vars(base).items()) if isinstance(v, kinds) and n not in _OF_THE_INTERPRETER]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _name(of: Any) -> str:
    return f"{of.__module__}:{of.__qualname__}"


def _sorted(forms: Iterable[Any]) -> list[Any]:
    return sorted(forms, key=lambda form: json.dumps(form, sort_keys=True))
