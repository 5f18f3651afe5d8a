"""Which arguments of a ``forward`` hold tensors, read from its annotations.

Understood are ``Tensor`` and its typed forms; tuples, lists, dicts, sequences and mappings of them at
any depth; unions, ``Optional``, ``Annotated``, type aliases and bounded type variables; data classes,
named tuples and typed dicts with such fields; pytree nodes and registered containers; all of these as
strings, also where other names cannot be resolved.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree

_DTYPES = ("Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool")
_TYPED = frozenset({"Tensor", *(f"{dtype}Tensor" for dtype in _DTYPES)})
_WORD = re.compile(r"[A-Za-z_][\w.]*")
_containers: dict[type, Callable[[Any], Mapping[str, torch.Tensor]]] = {}


def register_container(cls: type, tensors: Callable[[Any], Mapping[str, torch.Tensor]]) -> None:
    """Let annotations of type ``cls`` count as dynamic: dim 0 of each tensor of ``tensors(value)``.

    Raises:
        ValueError: ``cls`` is registered already.
    """
    if cls in _containers:
        raise ValueError(f"{cls.__qualname__} is registered as a container already")
    _containers[cls] = tensors


def container_types() -> tuple[type, ...]:
    """Return the classes that `register_container` knows."""
    return tuple(_containers)


def annotated_tensors(forward: Callable[..., Any]) -> list[str]:
    """Return the arguments of a method that are annotated as tensors or containers of tensors.

    The first argument, ``self``, is left out. Of ``**kwargs: Unpack[SomeTypedDict]`` the fields count.
    """
    hints = hints_of(forward)
    found: list[str] = []
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        hint = hints.get(parameter.name)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            fields = _fields(_unpacked(hint))
            found += [name for name, field in fields.items() if holds_tensors(field)]
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL and holds_tensors(hint):
            found.append(parameter.name)
    return found


def written(forward: Callable[..., Any], name: str) -> str:
    """Return an argument's annotation as it is written; empty where there is none."""
    hint = inspect.get_annotations(forward).get(name, "")
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return str(hint)


def hints_of(annotated: Any) -> dict[str, Any]:
    """Return resolved annotations of a function or class.

    One with a name that cannot be resolved stays the string that it was written as.
    """
    try:
        return typing.get_type_hints(annotated, include_extras=True)
    except Exception:
        hints = inspect.get_annotations(annotated)
    names = dict(vars(typing))
    module = sys.modules.get(getattr(annotated, "__module__", None) or "")
    if module is not None:
        names.update(vars(module))
    names.update(getattr(annotated, "__globals__", {}))
    return {name: _resolved(hint, names) for name, hint in hints.items()}


def _resolved(hint: Any, names: dict[str, Any]) -> Any:
    if not isinstance(hint, str):
        return hint
    try:
        return eval(hint, names)
    except Exception:
        return hint


def holds_tensors(hint: Any, around: tuple[Any, ...] = ()) -> bool:
    """True if a value of this annotation is a tensor, or a container that may hold one.

    Args:
        around: annotations that this one is a part of; ends the search in a class that names itself.
    """
    if isinstance(hint, typing.ForwardRef):
        hint = hint.__forward_arg__
    if isinstance(hint, str):
        return _names_tensors(hint)
    if hint is None or hint is inspect.Parameter.empty or hint in around:
        return False
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Literal, type) or getattr(origin or hint, "__name__", "") == "Callable":
        return False
    if origin is typing.Annotated:
        parts = parts[:1]
    elif origin is None:
        parts = _behind(hint)
    inside = (*around, hint)
    if any(holds_tensors(part, inside) for part in parts):
        return True
    cls = origin or hint
    return isinstance(cls, type) and _class_holds_tensors(cls, inside)


def _behind(hint: Any) -> tuple[Any, ...]:
    """Return what an alias is a name for: type variables, ``NewType``, ``type`` statements, shaped arrays."""
    if isinstance(hint, typing.TypeVar):
        return (hint.__bound__, *hint.__constraints__)
    aliases = ("__supertype__", "__value__", "array_type")
    return tuple([getattr(hint, alias) for alias in aliases if hasattr(hint, alias)])


def _class_holds_tensors(cls: type, inside: tuple[Any, ...]) -> bool:
    # torch.FloatTensor and its siblings are types of another metaclass, not subclasses of Tensor.
    if issubclass(cls, (torch.Tensor, *_containers)) or cls.__name__ in _TYPED:
        return True
    if cls in pytree.SUPPORTED_NODES and cls.__module__ not in ("builtins", "collections"):
        return True
    return any(holds_tensors(field, inside) for field in _fields(cls).values())


def _fields(cls: Any) -> dict[str, Any]:
    """Return the annotated fields of a data class, a named tuple or a typed dict; else nothing."""
    if not isinstance(cls, type):
        return {}
    named_tuple = issubclass(cls, tuple) and hasattr(cls, "_fields")
    known = dataclasses.is_dataclass(cls) or typing.is_typeddict(cls) or named_tuple
    return hints_of(cls) if known else {}


def _unpacked(hint: Any) -> Any:
    """Return the typed dict in ``Unpack[...]``."""
    args = typing.get_args(hint)
    return args[0] if len(args) == 1 and "Unpack" in str(typing.get_origin(hint)) else None


def _names_tensors(text: str) -> bool:
    """True if an annotation that could not be resolved has the name of a tensor or a container."""
    known = {*_TYPED, "Parameter", "Buffer", *(cls.__name__ for cls in _containers)}
    return any(word.split(".")[-1] in known for word in _WORD.findall(text))
