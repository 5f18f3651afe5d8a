"""The memory that the states of a cache layer lie in, for layers of any class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compile_policy import compat
from compile_policy.errors import NotCompilable
from compile_policy.failure import place_in

#: What the names of attributes for keys and for values differ in.
_PAIR = ("key", "value")


@dataclass(frozen=True)
class Block:
    """Keys and values in one piece of memory each.

    Attributes:
        keys: (batch, heads, states, dim), values: the same with their own last dim.
        views: name of an attribute that is a part of the keys -> first state of the part, its states.
    """

    keys: torch.Tensor
    values: torch.Tensor
    views: tuple[tuple[str, int, int], ...]

    def parts(self) -> Iterable[tuple[str, int, int, torch.Tensor]]:
        for name, start, count in self.views:
            yield name, start, count, self.keys
            yield name.replace(*_PAIR), start, count, self.values


def blocks(layer: Any) -> list[Block]:
    """The memory that a layer's states lie in: attributes that are parts of one another are one block.

    Raises:
        NotCompilable: its states are laid out in a way that is not known.
    """
    names = [name for name, value in vars(layer).items() if isinstance(value, torch.Tensor) and is_held(value)]
    by_memory: dict[int, list[str]] = {}
    for name in names:
        by_memory.setdefault(compat.storage_of(getattr(layer, name)), []).append(name)
    shaped = [next((t for n in names if kind in n and (t := getattr(layer, n)).dim() == 4), None) for kind in _PAIR]
    groups = {tuple(_views(layer, group)) for group in by_memory.values()}
    found = []
    for views in sorted(groups):
        if _PAIR[0] not in views[0][0]:
            continue
        partner = tuple(sorted((name.replace(*_PAIR), start, count) for name, start, count in views))
        if partner not in {tuple(sorted(other)) for other in groups}:
            raise refused(layer, f"keeps no values beside its {views[0][0]}")
        whole = max(views, key=lambda view: view[2])[0]
        keys, values = (getattr(layer, name) for name in (whole, whole.replace(*_PAIR)))
        if shaped[0] is None or shaped[1] is None:
            raise refused(layer, "has no states of four dims")
        found.append(Block(_shaped(keys, shaped[0]), _shaped(values, shaped[1]), views))
    if 2 * len(found) != len(groups):
        raise refused(layer, "keeps states that are neither keys nor values")
    return found


def _views(layer: Any, group: Sequence[str]) -> list[tuple[str, int, int]]:
    """Each attribute as a part of the largest: first state, number of states."""
    whole = max((getattr(layer, name) for name in group), key=torch.Tensor.numel)
    if whole.dim() != 4:
        return [(name, 0, 0) for name in group]
    out = []
    for name in sorted(group):
        part = getattr(layer, name)
        start, rest = divmod(part.storage_offset() - whole.storage_offset(), whole.stride(2) or 1)
        fits = part.dim() == 4 and part.stride() == whole.stride() and part.shape[:2] == whole.shape[:2]
        if len(group) > 1 and (rest or not fits or start < 0 or start + part.shape[2] > whole.shape[2]):
            raise refused(layer, f"keeps {name} in the memory of another tensor")
        out.append((name, start if len(group) > 1 else 0, part.shape[2]))
    return out


def is_held(tensor: torch.Tensor) -> bool:
    """Whether a tensor of a layer holds states, or nothing yet."""
    return tensor.is_floating_point() and (tensor.dim() == 4 or tensor.numel() == 0)


def _shaped(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What holds nothing yet may have no dims."""
    return tensor if tensor.dim() == 4 else like.new_empty((*like.shape[:2], 0, like.shape[3]))


def refused(layer: Any, what: str) -> NotCompilable:
    name = type(layer).__name__
    where = place_in(type(layer), "def update")
    return NotCompilable(
        f"the cache has a {name} ({where}), which {what}: no graph serves that yet",
        remedy="Give a cache whose layers are Transformers' own (DynamicCache, StaticCache), or use_cache=False.",
        about=f"cache layer {type(layer).__module__}.{type(layer).__qualname__}",
    )
