"""The walk over a module that finds what a graph takes for granted about it, and a record of what it reads."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from compile_policy.tensors import OWN_ATTRIBUTES as _OWN
from compile_policy.tensors import is_machinery

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_AS_THEY_ARE = frozenset((bool, int, str, bytes, type(None), torch.dtype, torch.device))
_DEPTH = 5
#: The dicts in a module's own dict that a walk reads, and what it calls a tensor without tensors inside.
READ_GROUPS = ("_parameters", "_buffers", "_modules", *_HOOKS, *_HOOK_FLAGS)
ORDINARY = frozenset((torch.Tensor, torch.nn.Parameter, torch.nn.Buffer))


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


class Walk:
    """One look at a module tree. Classes and objects that many modules share are looked at once."""

    def __init__(self) -> None:
        self._classes: dict[type, Hashable] = {}
        self._objects: dict[int, Hashable] = {}

    def tree(self, module: torch.nn.Module) -> tuple[Any, ...]:
        """``module`` and everything below it: (path, what was found) of each."""
        named = module.named_modules(remove_duplicate=False)
        return tuple([(name, self.module(m, root=m is module)) for name, m in named])

    def looked_into(self, value: Any) -> None:
        """Called for each container and tensor among the attributes whose inside is read."""

    def module(self, m: torch.nn.Module, *, root: bool) -> tuple[Any, ...]:
        own = m.__dict__
        attributes = tuple([(n, self.value(v)) for n, v in own.items() if n not in _OWN])
        if own["_modules"]:  # with the names of sub-modules that are None
            attributes += (("_modules", tuple(own["_modules"])),)
        hooks = () if root else tuple([_hook(own, kind, key) for kind in _HOOKS for key in own[kind]])
        tensors = (
            *[tensor_record(n, t, id(t)) for n, t in own["_parameters"].items()],
            *[tensor_record(n, t) for n, t in own["_buffers"].items()],
        )
        return (self.cls(type(m)), own["training"], hooks, attributes, tensors)

    def cls(self, cls: type) -> Hashable:
        """A class with its methods and plain attributes: replacing a method on the class changes every instance."""
        known = self._classes.get(cls)
        if known is None:
            own = tuple((n, _class_value(v)) for base in read_bases(cls) for n, v in vars(base).items() if is_read(n))
            known = self._classes[cls] = (cls.__mro__, own)
        return known

    def value(self, value: Any, depth: int = 0) -> Hashable:
        """Hashable stand-in for an attribute: by value where it is plain, else by identity and what is in it."""
        if value.__class__ in _AS_THEY_ARE:
            return (value.__class__, value)
        if isinstance(value, _PLAIN) or depth >= _DEPTH:
            return _shallow(value)
        if isinstance(value, (list, tuple, set, frozenset, dict, torch.Tensor)) or (
            isinstance(value, Mapping) and not is_machinery(type(value))
        ):
            self.looked_into(value)
        if isinstance(value, (list, tuple)):
            return (value.__class__, tuple([self.value(v, depth + 1) for v in value]))
        if isinstance(value, (set, frozenset)):
            return (value.__class__, frozenset([self.value(v, depth + 1) for v in value]))
        if isinstance(value, Mapping) and not isinstance(value, dict) and is_machinery(type(value)):
            return _Same(value)  # such as accelerate's, which reads weights from disk
        if isinstance(value, Mapping):
            return (value.__class__, tuple([(_key(k), self.value(v, depth + 1)) for k, v in value.items()]))
        if isinstance(value, torch.Tensor):
            return tensor_record("", value)
        if isinstance(value, (type, torch.nn.Module)) or not hasattr(value, "__dict__") or callable(value):
            return _Same(value)
        return self.object(value, depth)

    def object(self, value: Any, depth: int) -> Hashable:
        """An object with attributes, such as a configuration."""
        if id(value) not in self._objects:
            self._objects[id(value)] = _Same(value)  # an object may refer to itself
            inside = tuple([(n, self.value(v, depth + 1)) for n, v in list(vars(value).items())])
            self._objects[id(value)] = (_Same(value), value.__class__, inside)
        return self._objects[id(value)]


class Coverage(Walk):
    """What the walk reads, written down while it walks: nothing is called covered that it does not reach.

    Attributes:
        modules, objects: ``id`` of each whose attributes are all read.
        containers: ``id`` of each list, tuple, set and mapping whose keys and items are read.
        classes: those whose own attributes are read.
        tensors: ``id`` of each whose identity and metadata are read.
    """

    def __init__(self, module: torch.nn.Module | None) -> None:
        super().__init__()
        self.root = module
        self.modules: set[int] = set()
        self.objects: set[int] = set()
        self.containers: set[int] = set()
        self.classes: set[type] = set()
        self.tensors: set[int] = set()
        for m in [] if module is None else module.modules():
            self.module(m, root=m is module)

    def reads_all_of(self, value: Any) -> bool:
        """Whether all of an object's own attributes are read, save those that every module has."""
        return id(value) in self.modules or id(value) in self.objects

    def module(self, m: torch.nn.Module, *, root: bool) -> tuple[Any, ...]:
        self.modules.add(id(m))
        own = m.__dict__
        groups = READ_GROUPS[:3] if root else READ_GROUPS
        self.containers.update(id(own[name]) for name in groups)
        self.tensors.update(id(t) for name in ("_parameters", "_buffers") for t in own[name].values())
        return super().module(m, root=root)

    def cls(self, cls: type) -> Hashable:
        self.classes.update(read_bases(cls))
        return super().cls(cls)

    def looked_into(self, value: Any) -> None:
        (self.tensors if isinstance(value, torch.Tensor) else self.containers).add(id(value))

    def object(self, value: Any, depth: int) -> Hashable:
        self.objects.add(id(value))
        return super().object(value, depth)


def hooks_below(module: torch.nn.Module) -> list[dict[int, Any]]:
    """The hooks of a module and of everything below it, where there are any."""
    return [found for m in module.modules() for kind in _HOOKS if (found := m.__dict__[kind])]


_traced_hooks: set[str] = set()  # names of Python modules


def trace_hooks_of(python_module: str) -> None:
    """Declare that hooks defined in a Python module do nothing that a graph would leave out."""
    _traced_hooks.add(python_module)


def hooked_below(module: torch.nn.Module) -> str:
    """Path of the first sub-module with a hook of somebody's own; empty when there is none."""
    for name, m in module.named_modules():
        hooks = [h for kind in _HOOKS for h in m.__dict__[kind].values()] if m is not module else ()
        if any(getattr(h, "__module__", type(h).__module__) not in _traced_hooks for h in hooks):
            return str(name)
    return ""


def reads_attribute(name: str) -> bool:
    """Whether an entry of a module's own dictionary is among what the walk reads."""
    return name not in _OWN or name in ("training", "_parameters", "_buffers", "_modules", *_HOOKS, *_HOOK_FLAGS)


def read_bases(cls: type) -> list[type]:
    """The classes whose attributes the walk reads for instances of ``cls``."""
    return [base for base in cls.__mro__ if base not in (torch.nn.Module, object)]


def is_read(name: str) -> bool:
    """Whether the walk reads a class attribute of this name; the interpreter's own come and go."""
    return not name.startswith(("__", "_abc_")) or name in ("__call__", "__getattr__")


def _class_value(value: Any) -> Hashable:
    """Whole numbers without their value: classes count in them. One that a graph reads is watched."""
    if type(value) is types.FunctionType:  # the function may stay while its code is exchanged
        return (_Same(value), _Same(value.__code__))
    return int if type(value) is int else _shallow(value)


def _hook(own: dict[str, Any], kind: str, key: int) -> tuple[Any, ...]:
    return (kind, _Same(own[kind][key]), *[key in own[flag] for flag in _HOOK_FLAGS])


def _key(key: Any) -> Hashable:
    return key if key.__class__ is str else _shallow(key)


def _shallow(value: Any) -> Hashable:
    """By value where it is plain, else by identity."""
    if not isinstance(value, _PLAIN):
        return _Same(value)
    return (value.__class__, repr(value) if isinstance(value, (float, complex)) else value)  # 0.0 == -0.0, nan != nan


def tensor_record(name: str, t: torch.Tensor | None, identity: Hashable = None) -> tuple[Any, ...]:
    """Identity and metadata of a tensor.

    A parameter is told by its ``id``: torch cannot exchange a parameter that something refers to weakly, and ``.to()``
    of a quantized one does. A graph keeps the parameters alive that it is bound to, so no other has their ``id``.
    """
    if t is None:
        return (name, None)
    layout = t.stride() if t.layout is torch.strided else t.layout
    state = (name, identity or _Same(t), t.__class__, t.dtype, t.device, tuple(t.shape), layout, t.requires_grad)
    if t.__class__ in ORDINARY or not hasattr(t, "__tensor_flatten__"):
        return state
    names, context = t.__tensor_flatten__()  # a quantized weight: tensors in a wrapper
    return (*state, repr(context), tuple([tensor_record(n, getattr(t, n)) for n in names]))
