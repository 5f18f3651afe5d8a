"""The cache of an encoder-decoder as a call argument: states of the decoder itself, and those of the encoder's output.

The second kind is made before the graph (`cross_states`), which only reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache, StaticLayer

from compile_policy.adapters import Leaves, adapter_for, register_adapter
from compile_policy.errors import NotCompilable
from compile_policy_transformers.cache_moves import Moves
from compile_policy_transformers.cache_twins import rebuild_layer
from compile_policy_transformers.caches import ENCODED, CacheCall, flatten_given
from compile_policy_transformers.cross_states import States, after_update


@dataclass(frozen=True)
class PairCall:
    """A cache of two, together with the number of new tokens, and of positions that the encoder gave.

    Attributes:
        new: keys and values of the encoder's output by layer, which the cache gets after the call.
        moved: as in `CacheCall`.
    """

    cache: EncoderDecoderCache
    query_length: int
    encoded: int | None
    new: Mapping[int, States] = field(default_factory=dict)
    moved: dict[int, Moves] = field(default_factory=dict)

    @property
    def own(self) -> CacheCall:
        return CacheCall(self.cache.self_attention_cache, self.query_length, moved=self.moved)


_own: Any = adapter_for(CacheCall)


class _PairAdapter:
    def flatten(self, value: PairCall, out: Leaves, path: str) -> Any:
        own = _own.flatten(value.own, out, f"{path}.self")
        cross: Any = value.cache.cross_attention_cache
        if cross.offloading:
            raise NotCompilable("the cache is offloaded", remedy="Use a cache that stays on the device.")
        layers = cross.layers[: len(own[1])]
        for layer in layers:
            if type(layer) not in (DynamicLayer, StaticLayer):
                raise NotCompilable(f"the states of the encoder's output are in a {type(layer).__name__}")
        held = {i: (layer.keys, layer.values) for i, layer in enumerate(layers) if value.cache.is_updated.get(i)}
        held |= {i: after_update(cross, i, states) for i, states in value.new.items()}
        for i, states in sorted(held.items()):
            # a static layer may be longer than what the encoder gives now
            length = ENCODED if states[0].shape[2] == value.encoded else f"{ENCODED}_slots"
            flatten_given(states, out, f"{path}.cross[{i}]", length)
        filled = tuple(i in held for i in range(len(own[1])))
        return ("pair", own, filled)

    def rebuild(self, spec: Any, leaves: Iterator[torch.Tensor]) -> EncoderDecoderCache:
        _, own, filled = spec
        pair: Any = object.__new__(EncoderDecoderCache)
        pair.self_attention_cache = _own.rebuild(own, leaves)
        cross: Any = object.__new__(DynamicCache)
        cross.layer_class_to_replicate, cross.offloading = None, False
        cross.layers = [rebuild_layer(("given",), leaves) if is_filled else DynamicLayer() for is_filled in filled]
        pair.cross_attention_cache, pair.is_updated = cross, dict(enumerate(filled))
        return pair  # type: ignore[no-any-return]

    def state(self, spec: Any, value: EncoderDecoderCache) -> list[torch.Tensor]:
        if tuple(value.is_updated.values()) != spec[2]:
            raise NotCompilable("the decoder computes states of the encoder's output inside the graph")
        out: list[torch.Tensor] = _own.state(spec[1], value.self_attention_cache)
        return out

    def write_back(self, spec: Any, value: PairCall, state: list[torch.Tensor]) -> None:
        _own.write_back(spec[1], value.own, state)
        for i, (keys, values) in value.new.items():
            value.cache.cross_attention_cache.update(keys, values, i)
            value.cache.is_updated[i] = True

    def public(self, value: PairCall) -> EncoderDecoderCache:
        return value.cache


register_adapter(PairCall, _PairAdapter())
