"""Values that a graph took for granted and only an explicit check covers.

A guard whose object the fingerprint does not walk (a module's global, a closure cell, a class attribute that is a whole
number, an object deep inside others) leaves a `Watched` value: what was read, where it is read again, what it was.
`Fingerprint` reads them where it looks at the structure, so a change is another structure.
"""

from __future__ import annotations

import builtins
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from compile_policy.compat_guards import process_settings

_ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "absent"})()
_BY_VALUE = frozenset((bool, int, str, bytes, torch.dtype, torch.device, type(None)))
_BUILTINS = frozenset(vars(builtins))
_BY_TEXT = frozenset((float, complex))  # 0.0 == -0.0, nan != nan


def _item(owner: Any, key: Any) -> Any:
    try:  # what a dict holds, not what a subclass makes of it at every look (a table that builds activations)
        return dict.__getitem__(owner, key) if isinstance(owner, dict) else owner[key]
    except (KeyError, IndexError):
        return _ABSENT


def _attribute(owner: Any, name: str) -> Any:
    return getattr(owner, name, _ABSENT)


def _lookup(cls: type, name: str) -> Any:
    """As instances look ``name`` up on their class, without binding what is found."""
    for base in cls.__mro__:
        if name in base.__dict__:
            return base.__dict__[name]
    return _ABSENT


def tensor_state(t: torch.Tensor, name: str = "") -> tuple[Any, ...]:
    """What a graph takes for granted about a bound tensor, its values aside; inner tensors of a subclass included."""
    layout = t.stride() if t.layout is torch.strided else t.layout
    state = (name, id(t), t.__class__, t.dtype, t.device, tuple(t.shape), layout, t.requires_grad)
    if t.__class__ is torch.Tensor or t.__class__ is torch.nn.Parameter or not hasattr(t, "__tensor_flatten__"):
        return state
    names, context = t.__tensor_flatten__()
    return (*state, repr(context), tuple(tensor_state(getattr(t, n), n) for n in names))


_READERS: dict[str, Callable[[Any, Any], Any]] = {
    "item": _item,
    "attribute": _attribute,
    "lookup": _lookup,
    "has attribute": lambda owner, name: hasattr(owner, name),
    "contains": lambda owner, key: key in owner,
    "contains none of": lambda owner, keys: owner.keys().isdisjoint(keys),
    "length": lambda owner, _: len(owner),
    "keys": lambda owner, _: tuple(dict.keys(owner) if isinstance(owner, dict) else owner.keys()),
    "members": lambda owner, _: frozenset(owner),
    "type": lambda owner, _: type(owner),
    "tensor": lambda owner, _: tensor_state(owner),
    "settings": lambda owner, _: process_settings(),
}


@dataclass(frozen=True, eq=False)
class Watched:
    """One value to be read again.

    Attributes:
        name: the guarded expression, for people.
        how: which way of reading it (a key of the table of readers in this module).
        owner: the object that holds the value, and ``key`` the attribute, index or key there.
        value: what the graph took for granted.
        line: line of the model that read it; empty where unknown.
    """

    name: str
    how: str
    owner: Any
    key: Any
    value: Any
    line: str = ""

    @classmethod
    def now(cls, name: str, how: str, owner: Any, key: Any = None, line: str = "") -> Watched:
        """Watch what stands there at this moment."""
        return cls(name, how, owner, key, _READERS[how](owner, key), line)

    @property
    def place(self) -> tuple[Any, ...]:
        """Equal for two that read the same thing. Both keep their owner alive, so its ``id`` is not used again."""
        return (self.how, id(self.owner), self.key.__class__, self.key)

    def holds(self) -> bool:
        """Whether what stands there now is what was there."""
        try:
            now = _READERS[self.how](self.owner, self.key)
        except Exception:  # a property that fails, an object half taken apart: not what it was
            return False
        return now is self.value or same(now, self.value)

    def again(self) -> Watched:
        """The same place with the value that stands there now."""
        try:
            return Watched.now(self.name, self.how, self.owner, self.key, self.line)
        except Exception:
            return Watched(self.name, self.how, self.owner, self.key, _ABSENT, self.line)


def same(a: Any, b: Any) -> bool:
    """Whether two readings are one: by value where it is plain, else the same object."""
    if a is b:
        return True
    kind = a.__class__
    if kind is not b.__class__:
        return False
    if kind in _BY_VALUE:
        return bool(a == b)
    if kind in _BY_TEXT:
        return repr(a) == repr(b)
    if kind is tuple or kind is torch.Size:
        return len(a) == len(b) and all(map(same, a, b))
    if kind is frozenset:
        return bool(a == b)
    if kind is types.MethodType:  # made anew by every look
        return a.__func__ is b.__func__ and a.__self__ is b.__self__
    return False


def hidden_builtins(codes: Iterable[types.CodeType]) -> tuple[Watched, ...]:
    """That no global of a file that was traced takes the name of a built-in function which its code uses.

    Dynamo has no guard for that, stock or other. Code without a file, such as typed into a notebook, is left out.
    """
    used: dict[str, set[str]] = {}
    for code in codes:
        used.setdefault(code.co_filename, set()).update(code.co_names)
    found = []
    for module in list(sys.modules.values()):
        namespace = getattr(module, "__dict__", {})
        names = used.get(namespace.get("__file__") or "", set()) & _BUILTINS - namespace.keys()
        if names:
            name = f"a built-in hidden by a global of {namespace.get('__name__')}"
            found.append(Watched.now(name, "contains none of", namespace, frozenset(names)))
    return tuple(found)
