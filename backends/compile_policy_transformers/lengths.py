"""Lengths beyond which a decoder does something else: windows, chunks, the length its rotary embedding was made for.

A call on a longer sequence is another form of call: what a short one proved says nothing about it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from transformers.cache_utils import CacheLayerMixin

_NAMES = (
    *("sliding_window", "sliding_window_size", "attention_chunk_size", "local_attention_window"),
    *("original_max_position_embeddings", "max_position_embeddings"),
)
_ROPE = ("rope_parameters", "rope_scaling")


class Lengths:
    """The lengths that a configuration names."""

    def __init__(self, config: Any) -> None:
        self.limits = tuple(sorted({n for n in _named(vars(config)) if n > 0}))

    def passed(self, held: int) -> int:
        """How many of them a sequence of ``held`` positions is beyond."""
        return sum(held > limit for limit in self.limits)

    def left(self, held: int) -> float:
        """Single tokens that can follow ``held`` positions before the next of them is passed."""
        return next((limit - held for limit in self.limits if limit >= held), math.inf)


def held_by(cache: Any) -> int:
    """Positions that a cache holds; 0 for one of recurrent layers alone, which have no windows and count none."""
    layers = getattr(cache, "layers", ())
    if layers and not any(isinstance(layer, CacheLayerMixin) for layer in layers):
        return 0
    return int(cache.get_seq_length())


def _named(values: Mapping[str, Any]) -> Iterator[int]:
    for name, value in values.items():
        if name in _NAMES and type(value) is int:
            yield value
        elif isinstance(value, Mapping) and (name in _ROPE or all(isinstance(v, Mapping) for v in value.values())):
            yield from _named(value)
