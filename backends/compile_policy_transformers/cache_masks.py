"""Masks of a call arranged for the layers of a cache as they look inside a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, StaticSlidingWindowLayer

SLIDING = ("sliding_attention", "chunked_attention")


def each_arranged(masks: Mapping[str, Any], cache: Cache | None) -> dict[str, Any]:
    """In one order: Transformers builds the mapping from a set, and its order is no difference between calls."""
    return {name: arranged(masks[name], cache, sliding=name in SLIDING) for name in sorted(masks)}


def arranged(mask: Any, cache: Cache | None, *, sliding: bool) -> Any:
    """A mask for the cache layers as they look inside the trace."""
    if cache is None or not sliding or not isinstance(mask, torch.Tensor):
        return mask
    for layer in cache.layers:
        if type(layer) is StaticSlidingWindowLayer:
            return sliding_mask(mask, layer.max_cache_len, layer.cumulative_length_int)
    return mask


def all_sliding(cache: Cache | None) -> bool:
    return cache is not None and all(getattr(layer, "is_sliding", False) for layer in cache.layers)


def sliding_mask(mask: torch.Tensor, slots: int, seen: int) -> torch.Tensor:
    """A mask made for the stock layer, rearranged for `TracedSliding`.

    Args:
        mask: (batch, 1, new, keys) as Transformers builds it: one column per slot while the layer is filling up, one
            per kept and new state afterwards.

    Returns:
        (batch, 1, new, slots + new).
    """
    new = mask.shape[2]
    closed = False if mask.dtype is torch.bool else torch.finfo(mask.dtype).min
    if seen >= slots:  # full: the oldest slot has left the window
        return torch.nn.functional.pad(mask, (1, 0), value=closed)
    kept, fresh = mask[..., :seen], mask[..., seen : seen + new]
    return torch.cat([torch.nn.functional.pad(kept, (0, slots - seen), value=closed), fresh], dim=-1)
