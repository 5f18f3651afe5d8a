"""Positional arguments of a constructor, checked against its annotations."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import torch


class PositionalCheck:
    """Checks positional arguments of a constructor against its annotations.

    A positional argument that lands on the wrong parameter of somebody else's constructor is the usual way in which
    wrapped constructors fail; the error names what to annotate instead of failing somewhere inside.
    """

    def __init__(self, cls: type, init: Callable[..., None]) -> None:
        self._cls = cls
        self._init = init
        self._expected: list[tuple[str, Any]] | None = None

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if not args:
            return
        if self._expected is None:
            self._expected = _positional_annotations(self._init)
        for value, (name, annotation) in zip(args, self._expected, strict=False):
            if not _fits(value, annotation):
                raise TypeError(
                    f"{type(module).__qualname__}.__init__ got a {type(value).__qualname__} as positional argument "
                    f"{name!r}, which is annotated {_written(annotation)}. Annotate {name!r} of "
                    f"{self._cls.__qualname__}.__init__ with the type that it takes, or pass the argument by name."
                )


def _positional_annotations(init: Callable[..., None]) -> list[tuple[str, Any]]:
    try:
        hints = typing.get_type_hints(init)
    except Exception:  # an annotation that only a type checker can resolve
        hints = {}
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(init).parameters.values())[1:]
    return [(p.name, hints.get(p.name, Any)) for p in parameters if p.kind in kinds]


def _fits(value: Any, annotation: Any) -> bool:
    """Whether ``value`` may be of the annotated type; what cannot be checked at run time fits."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if annotation is None or annotation is type(None):
        return value is None
    target = origin or annotation
    if not isinstance(target, type) or getattr(target, "_is_protocol", False):
        return True
    if target is float:
        return isinstance(value, (int, float))
    if target is complex:
        return isinstance(value, (int, float, complex))
    try:
        return isinstance(value, target)
    except TypeError:  # typing.Any, a TypedDict: types that no value can be asked for
        return True


def _written(annotation: Any) -> str:
    return annotation.__qualname__ if isinstance(annotation, type) else str(annotation)
