"""The cache of an encoder-decoder as a call argument: states of the decoder itself, and those of the encoder's output.

The first call of a sequence computes the second kind from what the encoder gave, later calls read it. Which of the two
a call does is part of the key: these are two graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache, StaticLayer

from compile_policy.adapters import Leaves, adapter_for, register_adapter
from compile_policy.errors import NotCompilable
from compile_policy_transformers.caches import CacheCall

#: Label of what has the length of the encoder's output.
ENCODED = "encoded"


@dataclass(frozen=True)
class PairCall:
    """A cache of two, together with the number of new tokens, and of positions that the encoder gave."""

    cache: EncoderDecoderCache
    query_length: int
    encoded: int | None

    @property
    def own(self) -> CacheCall:
        return CacheCall(self.cache.self_attention_cache, self.query_length)


class _Filled(DynamicLayer):
    """States of the encoder's output: they come once, and all at once."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


_own: Any = adapter_for(CacheCall)


class _PairAdapter:
    def flatten(self, value: PairCall, out: Leaves, path: str) -> Any:
        own = _own.flatten(value.own, out, f"{path}.self")
        cross: Any = value.cache.cross_attention_cache
        if cross.offloading:
            raise NotCompilable("the cache is offloaded", remedy="Use a cache that stays on the device.")
        filled = []
        for i in range(len(own[1])):
            layer: Any = cross.layers[i] if i < len(cross.layers) else None
            filled.append(bool(value.cache.is_updated.get(i)))
            if layer is not None and type(layer) not in (DynamicLayer, StaticLayer):
                raise NotCompilable(f"the states of the encoder's output are in a {type(layer).__name__}")
            if filled[i]:
                # a static layer may be longer than what the encoder gives now
                length = ENCODED if layer.keys.shape[2] == value.encoded else f"{ENCODED}_slots"
                for name in ("keys", "values"):
                    out.add(getattr(layer, name), f"{path}.cross[{i}].{name}", ("batch", None, length, None))
            elif type(layer) is StaticLayer and layer.max_cache_len != value.encoded:
                raise NotCompilable("the cache has room for another number of positions than the encoder gave")
        return ("pair", own, tuple(filled))

    def rebuild(self, spec: Any, leaves: Iterator[torch.Tensor]) -> EncoderDecoderCache:
        _, own, filled = spec
        pair: Any = object.__new__(EncoderDecoderCache)
        pair.self_attention_cache = _own.rebuild(own, leaves)
        cross: Any = object.__new__(DynamicCache)
        cross.layers, cross.layer_class_to_replicate, cross.offloading = [], None, False
        for is_filled in filled:
            layer: Any = object.__new__(_Filled)
            layer.keys = layer.values = None
            layer.is_initialized = False
            if is_filled:
                layer.update(next(leaves), next(leaves))
            cross.layers.append(layer)
        pair.cross_attention_cache, pair.is_updated = cross, dict(enumerate(filled))
        return pair  # type: ignore[no-any-return]

    def state(self, spec: Any, value: EncoderDecoderCache) -> list[torch.Tensor]:
        out: list[torch.Tensor] = _own.state(spec[1], value.self_attention_cache)
        layers: list[Any] = value.cross_attention_cache.layers
        for is_filled, layer in zip(spec[2], layers, strict=True):
            if not is_filled and layer.keys is None:
                raise NotCompilable("a layer does not attend to what the encoder gave")
            out += () if is_filled else (layer.keys, layer.values)
        return out

    def write_back(self, spec: Any, value: PairCall, state: list[torch.Tensor]) -> None:
        new = 2 * spec[2].count(False)
        _own.write_back(spec[1], value.own, state[: len(state) - new])
        tensors = iter(state[len(state) - new :])
        for i, is_filled in enumerate(spec[2]):
            if not is_filled:
                value.cache.cross_attention_cache.update(next(tensors), next(tensors), i)
                value.cache.is_updated[i] = True

    def public(self, value: PairCall) -> EncoderDecoderCache:
        return value.cache


register_adapter(PairCall, _PairAdapter())
