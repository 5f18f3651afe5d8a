"""Masks of a call arranged for the layers of a cache as they look inside a graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache

from compile_policy.masked_attention import dense
from compile_policy_transformers import attention
from compile_policy_transformers.cache_layers import kind_of
from compile_policy_transformers.releases import DummyLayer

SLIDING = ("sliding_attention", "chunked_attention")


#: Kinds of layers that read the padding of the call's own tokens, and nothing of what is held.
RECURRENT = ("linear_attention", "conv")


#: Kinds of blocks that have several masks, or none, as the kinds of layers whose masks they are.
_MASKS_OF = {
    "hybrid": ("full_attention", "linear_attention"),
    "hybrid_sliding": ("sliding_attention", "linear_attention"),
    "moe": (),
    "mlp": (),
}


def mask_config(config: Any, *, stock: bool = True) -> Any:
    """A decoder's configuration as ``create_masks_for_generate`` is to see it; ``stock``: Transformers' own.

    Its table gives the sliding layers of a hybrid a causal mask without a window, where the models' own forward makes
    a sliding one, and it makes no masks at all for a model with blocks that want none. Drop this once
    ``LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING`` has a sliding mask for ``hybrid_sliding`` and passes over the others.
    """
    made = copy.copy(config)
    made._attn_implementation_internal = attention.DECODER
    kinds = getattr(config, "layer_types", None) or ()
    if stock and any(kind in _MASKS_OF for kind in kinds):
        _set_layer_types(made, [name for kind in kinds for name in _MASKS_OF.get(kind, (kind,))])
    return made


def _set_layer_types(config: Any, names: list[str]) -> None:
    """Also where a configuration computes them under another name, without a way to say otherwise (falcon_h1)."""
    cls = type(config)
    field = cls.attribute_map.get("layer_types", "layer_types")
    if isinstance(getattr(cls, field, None), property):
        config.__class__ = type(cls.__name__, (cls,), {field: names})
    else:
        config.layer_types = names


def each_padded(masks: Mapping[str, Any], embeds: torch.Tensor) -> dict[str, Any]:
    """Masks of recurrent layers made dense: (batch, length), true for tokens that are no padding.

    Transformers leaves such a mask out where it hides nothing, so that calls with and without one would differ.

    Args:
        embeds: (batch, length, width).
    """
    return {name: _padded(mask, embeds) if name in RECURRENT else mask for name, mask in masks.items()}


def _padded(mask: Any, embeds: torch.Tensor) -> Any:
    if mask is None:
        return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    return mask.to(torch.bool) if isinstance(mask, torch.Tensor) and mask.shape == embeds.shape[:2] else mask


def each_arranged(masks: Mapping[str, Any], cache: Cache | None) -> dict[str, Any]:
    """In one order: Transformers builds the mapping from a set, and its order is no difference between calls."""
    return {name: arranged(masks[name], cache, sliding=name in SLIDING) for name in sorted(masks)}


def arranged(mask: Any, cache: Cache | None, *, sliding: bool) -> Any:
    """A mask for the cache layers as they look inside the trace."""
    if cache is None or not sliding or not isinstance(mask, torch.Tensor):
        return mask
    layers: list[Any] = cache.layers
    for layer in layers:
        if type(layer) is not DummyLayer and kind_of(layer) == "static_sliding":
            return sliding_mask(dense(mask), layer.max_cache_len, layer.cumulative_length_int)
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
