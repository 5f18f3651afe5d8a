"""A second look at a structure that costs little: whether anything that the first one read has changed since.

A dict has a version that every write to it raises, so what modules and objects hold is compared by versions alone.
Classes, lists and sets have none: their items are compared by identity, and so are those of dicts where Python does not
raise the version at every write (`versions_move`). Tensors are compared as Dynamo's guards do it.
What holds is unchanged; what does not may still be equal, which only a full walk tells.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from operator import attrgetter, is_
from typing import Any

import torch

from compile_policy import compat
from compile_policy.walk import ORDINARY, READ_GROUPS, Walk, read_bases, tensor_record

_code_of, _wants_gradient = attrgetter("__code__"), attrgetter("requires_grad")


#: More calls than an interpreter takes to specialise the code of a function.
_HOT = 64


class _Holder:
    """An object with attributes and nothing else."""


@functools.cache
def versions_move() -> bool:
    """True if every write to an attribute raises the version of the object's dict.

    Python 3.13.0 writes attributes in place without telling anybody (cpython issue 125608, mended in 3.13.1).
    """
    return all(_moves(holder) for holder in (_Holder(), torch.nn.Module()))


def _moves(holder: Any) -> bool:
    def write() -> None:
        holder.value = object()

    def by_name() -> None:
        setattr(holder, "value", object())  # noqa: B010 - another way through the interpreter

    own = vars(holder)
    for _ in range(_HOT):
        for change in (write, by_name, lambda: own.__setitem__("value", object())):
            before = compat.dict_version(own)
            change()
            if compat.dict_version(own) == before:
                return False
    return True


class Glance(Walk):
    """A walk that writes down what it reads.

    Attributes:
        walked: what the walk found, as `fingerprint.fingerprint` gives it.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._owners: list[Any] = []  # modules and objects, whose own dicts are read
        self._dicts: list[dict[Any, Any]] = []
        self._versions: list[int] = []
        self._contents: list[tuple[Callable[[Any], Any], Any, Any]] = []  # of what has no version
        self._namespaces: dict[type, tuple[Any, list[str], list[Any]]] = {}
        self._tensors: dict[int, torch.Tensor] = {}
        self._by_version = versions_move()
        self.walked = self.tree(module)
        self._types = list(map(type, self._owners))
        self._own = list(map(vars, self._owners))
        self._lines = [(cls, cls.__mro__) for cls in self._classes]
        values = [v for _, _, found in self._namespaces.values() for v in found]
        self._functions = [v for v in values if hasattr(v, "__code__")]
        self._codes = list(map(_code_of, self._functions))
        self._like = compat.alike([*self._tensors.values()], [None] * len(self._tensors)) if self._tensors else None
        self._gradients = list(map(_wants_gradient, self._tensors.values()))

    def holds(self) -> bool:
        """Whether another walk would find the same."""
        tensors = self._tensors.values()
        try:
            return (
                list(map(compat.dict_version, self._dicts)) == self._versions
                and all(map(is_, map(type, self._owners), self._types))
                and all(map(is_, map(vars, self._owners), self._own))
                and (self._like is None or self._like(*tensors))
                and list(map(_wants_gradient, tensors)) == self._gradients  # the line before sees none under no_grad
                and all(cls.__mro__ is line for cls, line in self._lines)
                and all(list(n) == names and all(map(is_, n.values(), v)) for n, names, v in self._namespaces.values())
                and all(map(is_, map(_code_of, self._functions), self._codes))
                and all(read(value) == found for read, value, found in self._contents)
            )
        except Exception:  # a mapping or a tensor that fails: not what it was
            return False

    def module(self, m: torch.nn.Module, *, root: bool) -> tuple[Any, ...]:
        self._note(m)
        for name in READ_GROUPS:
            self._note_dict(m.__dict__[name])
        for group in ("_parameters", "_buffers"):
            for t in m.__dict__[group].values():
                self._note_tensor(t)
        return super().module(m, root=root)

    def cls(self, cls: type) -> Any:
        if cls not in self._classes:
            for base in read_bases(cls):
                names = vars(base)
                self._namespaces.setdefault(base, (names, list(names), list(names.values())))
        return super().cls(cls)

    def looked_into(self, value: Any) -> None:
        if isinstance(value, dict):
            self._note_dict(value)
        elif isinstance(value, torch.Tensor):
            self._note_tensor(value)
        else:
            read = _pairs if isinstance(value, Mapping) else _members if isinstance(value, (set, frozenset)) else _items
            self._contents.append((read, value, read(value)))

    def object(self, value: Any, depth: int) -> Any:
        if id(value) not in self._objects:
            self._note(value)
        return super().object(value, depth)

    def _note(self, owner: Any) -> None:
        self._owners.append(owner)
        self._note_dict(vars(owner))

    def _note_dict(self, found: dict[Any, Any]) -> None:
        if not self._by_version:
            self._contents.append((_pairs, found, _pairs(found)))
            return
        self._dicts.append(found)
        self._versions.append(compat.dict_version(found))
        if type(found) is not dict and len(found) > 1:  # an ordered one may change its order without a write
            self._contents.append((_pairs, found, _pairs(found)))

    def _note_tensor(self, t: torch.Tensor | None) -> None:
        if t is None:
            return
        if t.__class__ in ORDINARY and t.layout is torch.strided:
            self._tensors[id(t)] = t
        else:
            self._contents.append((_record, t, _record(t)))


class _Identity(list[Any]):
    """Equal for lists of the same objects."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and len(self) == len(other) and all(map(is_, self, other))


def _items(value: Any) -> _Identity:
    return _Identity([type(value), *value])


def _pairs(value: Any) -> _Identity:
    return _Identity([type(value), *value.keys(), *value.values()])


def _members(value: Any) -> tuple[type, set[int]]:
    return type(value), set(map(id, value))


def _record(t: torch.Tensor) -> tuple[Any, ...]:
    return tensor_record("", t, id(t))
