"""Transformers caches as call arguments.

Outside the graph a cache stays the user's object. A call carries it as `CacheCall`; its adapter flattens the layers'
tensors, rebuilds a cache of the same class around traced tensors, and writes the new state back. Layers whose stock
``update`` branches in Python on how full they are get a branch-free twin inside the trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from compile_policy.adapters import Leaves, register_adapter
from compile_policy.errors import NotCompilable
from compile_policy_transformers.cache_twins import rebuild_layer, slots_to_keep, states_to_keep

#: Labels of the dims that vary. A full dynamic layer and a sliding one hold different lengths.
PAST, SLIDING_PAST, SLIDING_KEPT = "past", "sliding_past", "sliding_kept"
SLOTS, SLIDING_SLOTS = "slots", "sliding_slots"


@dataclass(frozen=True)
class LayerShape:
    """Heads, key and value dims and dtype of one layer's cache: what lazy initialisation needs."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype


@dataclass(frozen=True)
class CacheCall:
    """A cache together with the number of new tokens that this call brings."""

    cache: Cache
    query_length: int


def initialise(cache: Cache, shapes: Sequence[LayerShape | None], batch: int, device: torch.device) -> None:
    """Give lazy layers their tensors now, so that the graph never meets one without."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < len(shapes):
            cache.layers.append(cache.layer_class_to_replicate())
    for layer, shape in zip(cache.layers, shapes, strict=False):
        if shape is None or isinstance(layer, DummyLayer) or cast(Any, layer).is_initialized:
            continue
        keys = _empty(batch, shape.heads, shape.key_dim, shape.dtype, device)
        values = _empty(batch, shape.heads, shape.value_dim, shape.dtype, device)
        layer.lazy_initialization(keys, values)
        if isinstance(layer, DynamicLayer):
            layer.keys, layer.values = keys, values


def _empty(batch: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty((batch, heads, 0, dim), dtype=dtype, device=device)


def needs_initialisation(cache: Cache) -> bool:
    """Whether some layer has no tensors yet.

    Raises:
        NotCompilable: a layer that holds no keys and values, such as the state of linear attention.
    """
    if not hasattr(cache, "layers"):
        raise NotCompilable(f"the cache is a {type(cache).__name__}, which the policy cannot pass to a graph yet")
    layers: list[Any] = cache.layers
    for layer in layers:
        if not hasattr(layer, "is_initialized"):
            raise _unknown(layer)
    return cache.layer_class_to_replicate is not None or not all(layer.is_initialized for layer in layers)


def is_empty(cache: Cache) -> bool:
    """Whether no call has used the cache yet."""
    return not any(getattr(layer, "is_initialized", True) for layer in getattr(cache, "layers", ()))


def layer_shapes(cache: Cache) -> list[LayerShape | None]:
    """Shapes of a cache that has seen at least one call."""
    result: list[LayerShape | None] = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4:
            result.append(None)
        else:
            result.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype))
    return result


def _unknown(layer: Any) -> NotCompilable:
    return NotCompilable(f"the cache has a {type(layer).__name__}, which the policy cannot pass to a graph yet")


class _CacheAdapter:
    def flatten(self, value: CacheCall, out: Leaves, path: str) -> Any:
        cache: Any = value.cache  # Transformers types layers as a union of what they may be
        if cache.offloading:
            raise NotCompilable("the cache is offloaded", remedy="Use a cache that stays on the device.")
        if any("update" in vars(part) for part in (cache, *cache.layers)):
            raise NotCompilable("`update` was replaced on this cache", remedy="Write it into a class of its own.")
        selects: dict[tuple[str, int, int], int] = {}
        layers = tuple(
            self._flatten_layer(layer, selects, out, f"{path}.layers[{i}]") for i, layer in enumerate(cache.layers)
        )
        for (kind, size, held), n in selects.items():
            choose = slots_to_keep if kind == "static_sliding" else states_to_keep
            index = choose(size, held, value.query_length, cache.layers[0].keys.device)
            label = SLIDING_SLOTS if kind == "static_sliding" else SLIDING_KEPT
            out.add(index, f"{path}.select[{n}]", (label,), filler=_any_states)
        return (type(cache), layers, len(selects))

    def _flatten_layer(
        self, layer: Any, selects: dict[tuple[str, int, int], int], out: Leaves, path: str
    ) -> tuple[Any, ...]:
        kind = type(layer)
        if kind is DummyLayer:
            return ("dummy",)
        if kind is DynamicLayer:
            self._add(layer, out, path, PAST)
            return ("dynamic",)
        if kind is DynamicSlidingWindowLayer:
            if layer.record_past:
                raise NotCompilable("the cache records past states for assisted decoding")
            self._add(layer, out, path, SLIDING_PAST)
            place = ("sliding", layer.sliding_window, layer.keys.shape[2])
            return ("sliding", selects.setdefault(place, len(selects)))
        if kind is StaticLayer:
            self._add(layer, out, path, SLOTS, mutable=True)
            out.add(layer.cumulative_length, f"{path}.cumulative_length", (), mutable=True, filler=_zero)
            return ("static",)
        if kind is StaticSlidingWindowLayer:
            self._add(layer, out, path, SLIDING_SLOTS, mutable=True)
            place = ("static_sliding", layer.max_cache_len, layer.cumulative_length_int)
            return ("static_sliding", selects.setdefault(place, len(selects)))
        raise _unknown(layer)

    @staticmethod
    def _add(layer: Any, out: Leaves, path: str, length: str, *, mutable: bool = False) -> None:
        if layer.keys is None:
            raise NotCompilable("a layer of the cache holds no states yet, such as those of cross-attention")
        for name in ("keys", "values"):
            out.add(getattr(layer, name), f"{path}.{name}", ("batch", None, length, None), mutable=mutable)

    def rebuild(self, spec: Any, leaves: Iterator[torch.Tensor]) -> Cache:
        cls, layer_specs, n_selects = spec
        cache: Any = object.__new__(cls)
        cache.layers = [rebuild_layer(s, leaves) for s in layer_specs]
        cache.layer_class_to_replicate = None
        cache.offloading = False
        selects = [next(leaves) for _ in range(n_selects)]
        for s, layer in zip(layer_specs, cache.layers, strict=True):
            if s[0] in ("sliding", "static_sliding"):
                layer.select = selects[s[1]]
        return cast(Cache, cache)

    def state(self, spec: Any, value: Cache) -> list[torch.Tensor]:
        return [
            t
            for s, layer in zip(spec[1], cast(Any, value).layers, strict=True)
            if s[0] in ("dynamic", "sliding")
            for t in (layer.keys, layer.values)
        ]

    def write_back(self, spec: Any, value: CacheCall, state: list[torch.Tensor]) -> None:
        tensors = iter(state)
        layers: Any = value.cache.layers
        for s, layer in zip(spec[1], layers, strict=True):
            kind = s[0]
            if kind == "dynamic":
                layer.keys, layer.values = next(tensors), next(tensors)
            elif kind == "sliding":
                layer.keys, layer.values = next(tensors), next(tensors)
                layer.cumulative_length += value.query_length
            elif kind == "static_sliding":
                seen = layer.cumulative_length_int
                layer.cumulative_length_int = seen + value.query_length
                if seen + value.query_length <= layer.max_cache_len:  # the stock layer stops counting here too
                    layer.cumulative_length.add_(value.query_length)

    def public(self, value: CacheCall) -> Cache:
        return value.cache


def _zero(sizes: Mapping[str, int], shape: Sequence[int]) -> torch.Tensor:
    return torch.zeros(tuple(shape), dtype=torch.long)


def _any_states(sizes: Mapping[str, int], shape: Sequence[int]) -> torch.Tensor:
    """Any valid index does for an example."""
    held = sizes[SLIDING_SLOTS] if SLIDING_SLOTS in sizes else sizes[SLIDING_PAST]
    return torch.arange(shape[0]) % (held + sizes["sequence"])


register_adapter(CacheCall, _CacheAdapter())


def fresh_cache(config: Any) -> DynamicCache:
    """What a decoder makes for itself when it is called with ``use_cache`` and no cache."""
    return DynamicCache(config=config)
