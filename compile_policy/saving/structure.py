"""The component as every process sees it that built the same one: modules, attributes, tensors by their places."""

from __future__ import annotations

from typing import Any

import torch

from compile_policy.saving.stable import Stable, Unstable
from compile_policy.tensors import OWN_ATTRIBUTES, tensors_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def tensor_places(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """place -> tensor, for every tensor that belongs to the component (`tensors_of`).

    A tensor that stands in several places is listed under each.
    """
    return dict(tensors_of(module))


def first_places(module: torch.nn.Module) -> dict[int, str]:
    """id -> first place, of every module and tensor of the component."""
    places: dict[int, str] = {}
    for path, m in module.named_modules(remove_duplicate=False):
        places.setdefault(id(m), f"module {path}")
    for path, t in tensors_of(module):
        places.setdefault(id(t), f"tensor {path}")
    return places


def structure(module: torch.nn.Module, stable: Stable) -> dict[str, Any]:
    """path -> what a graph takes for granted about the module there.

    Args:
        stable: with `first_places` of the component.

    Raises:
        Unstable: an attribute that cannot be recognised in another process; the message names it.
    """
    return {
        path: _module(path, m, stable, root=m is module) for path, m in module.named_modules(remove_duplicate=False)
    }


def _module(path: str, m: torch.nn.Module, stable: Stable, *, root: bool) -> list[Any]:
    try:
        hooks = [] if root else [stable(hook) for kind in _HOOKS for hook in m.__dict__[kind].values()]
        attributes = stable.attributes(m, skip=OWN_ATTRIBUTES)
    except Unstable as error:
        raise Unstable(f"the attribute {path or type(m).__name__}{error}") from None
    tensors = []
    for kind in ("_parameters", "_buffers"):
        for name, t in sorted(m.__dict__[kind].items()):
            try:
                tensors.append([name, None if t is None else [stable.places[id(t)], stable.tensor(t)]])
            except Unstable as error:
                raise Unstable(f"{f'{path}.' if path else ''}{name} {error}") from None
    # What is set on the instance, such as a forward of its own, is among the attributes.
    return [stable(type(m)), str(m.training), hooks, attributes, tensors]
