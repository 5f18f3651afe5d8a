"""Model outputs made without the checks of their dataclass, which cost more than the rest of a decode step's output."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from transformers.utils.generic import ModelOutput

from compile_policy.outputs import register_constructor

_OWN_WAYS = ("__post_init__", "__setattr__", "__setitem__", "__getattribute__")


def constructor(cls: type[ModelOutput], names: Sequence[str]) -> Callable[[list[Any]], ModelOutput] | None:
    """A function of the parts in the order of ``names`` that makes what ``cls(**parts)`` makes.

    Returns:
        ``None`` where the class makes its objects in a way of its own, as a trial shows.
    """
    if any(getattr(cls, way) is not getattr(ModelOutput, way) for way in _OWN_WAYS):
        return None
    blank: dict[str, Any] = {field.name: None for field in fields(cast(Any, cls))}
    new, hold = OrderedDict.__new__, OrderedDict.__setitem__

    def make(parts: list[Any]) -> ModelOutput:
        made = new(cls)
        attributes = made.__dict__
        attributes.update(blank)
        for name, part in zip(names, parts, strict=True):
            if part is not None:  # an attribute without an item
                attributes[name] = part
                hold(made, name, part)
        return made

    trial: list[Any] = [torch.empty(0) for _ in names]
    usual, ours = cls(**dict(zip(names, trial, strict=True))), make(trial)
    same = _inside(usual) == _inside(ours) and type(ours) is type(usual)
    return make if same else None


def _inside(output: ModelOutput) -> tuple[list[Any], ...]:
    """Names and identities of all that an output holds, in order."""
    return [(n, id(v)) for n, v in vars(output).items()], [(n, id(v)) for n, v in OrderedDict.items(output)]


def use_for_outputs() -> None:
    """Have every result of a component that is a `ModelOutput` made this way."""
    register_constructor(ModelOutput, constructor)
