"""What the layers of a cache hold, and layers that hold nothing yet.

Transformers' layers make their tensors when the first states arrive. A graph is never to meet one without, so they are
made before the call, in the shapes that an eager call of the decoder has shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    StaticIndexedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from compile_policy.errors import NotCompilable
from compile_policy.failure import place_in
from compile_policy_transformers import cache_states as states
from compile_policy_transformers.releases import DummyLayer

#: Class of a layer -> how its keys and values are kept.
KINDS: dict[type, str] = {
    DynamicLayer: "dynamic",
    DynamicIndexedLayer: "dynamic",
    LinearAttentionAndFullAttentionLayer: "dynamic",
    DynamicSlidingWindowLayer: "sliding",
    LinearAttentionAndSlidingWindowAttentionLayer: "sliding",
    StaticLayer: "static",
    StaticIndexedLayer: "static",
    LinearAttentionAndStaticFullAttentionLayer: "static",
    StaticSlidingWindowLayer: "static_sliding",
    LinearAttentionAndStaticSlidingWindowAttentionLayer: "static_sliding",
    LinearAttentionLayer: "none",
}
#: How layers of every other class are kept, as long as they only move states (`cache_moves`).
MOVED = "moved"
#: What decides how a layer keeps its states: a class that leaves these as they are is of its base's kind.
_DECIDING = (
    *("update", "lazy_initialization", "get_seq_length", "get_mask_sizes"),
    *("update_conv_state", "update_recurrent_state", "update_indexer"),
    *("keys", "values", "__getattribute__", "__getattr__", "__setattr__"),
)


def kind_of(layer: Any) -> str:
    """How a layer keeps its keys and values.

    Raises:
        NotCompilable: it is of a class that is not known, and is more than keys and values.
    """
    return kind_of_class(type(layer))


def kind_of_class(cls: type) -> str:
    """How layers of a class keep their keys and values; see `kind_of`."""
    if cls in KINDS:
        return KINDS[cls]
    base = next((c for c in cls.__mro__ if c in KINDS), None)
    if base is not None and all(getattr(cls, n, None) is getattr(base, n, None) for n in _DECIDING):
        return KINDS[base]
    if states.is_linear_class(cls) or states.is_indexed_class(cls) or not issubclass(cls, CacheLayerMixin):
        raise unknown(cls)
    return MOVED


@dataclass(frozen=True)
class LayerShape:
    """What lazy initialisation of one layer needs: empty keys and values, states, keys and positions of an indexer."""

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    states: states.StateShapes | None = None
    indexer: torch.Tensor | None = None
    positions: torch.Tensor | None = None


def initialise(cache: Cache, shapes: Sequence[LayerShape], batch: int, device: torch.device) -> None:
    """Give lazy layers their tensors now, so that the graph never meets one without."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < len(shapes):
            cache.layers.append(cache.layer_class_to_replicate())
    layers: list[Any] = cache.layers
    for layer, shape in zip(layers, shapes, strict=False):
        if shape.keys is not None and shape.values is not None and not layer.is_initialized:
            keys, values = (t.new_empty((batch, *t.shape[1:]), device=device) for t in (shape.keys, shape.values))
            initialise_layer(layer, keys, values)
        if shape.states is not None:
            states.initialise_states(layer, shape.states, batch, device)
        if shape.indexer is not None and not layer.is_indexer_initialized:
            states.initialise_indexer(layer, shape.indexer, batch, device)
        if shape.positions is not None and layer.indexer_position_ids is None:
            layer.indexer_position_ids = shape.positions.new_empty((len(shape.positions), batch, 0), device=device)


def initialise_layer(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Give one lazy layer its tensors; ``keys`` and ``values`` hold no states yet."""
    layer.lazy_initialization(keys, values)
    if isinstance(layer, DynamicLayer) and not (layer.keys is not None and layer.keys.numel()):
        layer.keys, layer.values = keys, values


def needs_initialisation(cache: Cache, shapes: Sequence[LayerShape] | None) -> bool:
    """Whether some layer has no tensors yet.

    Args:
        shapes: what its layers are going to hold, once that is known.

    Raises:
        NotCompilable: layers of a class that is not known.
    """
    if not hasattr(cache, "layers"):
        raise NotCompilable(f"the cache is a {type(cache).__name__}, which the policy cannot pass to a graph yet")
    if cache.layer_class_to_replicate is not None:
        return True
    layers: list[Any] = cache.layers
    return any(_lacks(layer, shapes[i] if shapes and i < len(shapes) else None) for i, layer in enumerate(layers))


def _lacks(layer: Any, shape: LayerShape | None) -> bool:
    if type(layer) is DummyLayer:
        return False
    kind = kind_of(layer)
    if states.is_linear(layer) and states.states_missing(layer, None if shape is None else shape.states):
        return True
    if states.is_indexed(layer) and states.indexer_missing(layer, shape):
        return True
    unused = shape is not None and shape.keys is None
    return kind != "none" and not unused and not layer.is_initialized


def is_empty(cache: Cache) -> bool:
    """Whether no call has used the cache yet."""
    if isinstance(cache, EncoderDecoderCache):
        return not any(cache.is_updated.values())
    layers: Any = getattr(cache, "layers", ())
    used = (any(x.has_previous_state.values()) if states.is_linear(x) else _holds_any(x) for x in layers)
    return not any(used)


def _holds_any(layer: Any) -> bool:
    if type(layer) not in KINDS and type(layer) is not DummyLayer and kind_of(layer) == MOVED:
        return int(layer.get_seq_length()) > 0  # what it holds may be in other places
    return bool(layer.is_initialized) and layer.keys is not None and layer.keys.numel() > 0  # a dummy has none


def layer_shapes(cache: Cache, first_token: int | None = None) -> list[LayerShape]:
    """Shapes of a cache that has seen at least one call.

    Args:
        first_token: what a history of token ids is filled with where nothing came before.
    """
    return [_shape(layer, first_token) for layer in cache.layers]


def _shape(layer: Any, first_token: int | None) -> LayerShape:
    name = next((n for n, v in vars(layer).items() if "key" in n and isinstance(v, torch.Tensor) and v.dim() == 4), "")
    keys, values = (getattr(layer, n, None) for n in (name, name.replace("key", "value")))
    if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor) and values.dim() == 4:
        keys, values = keys[:, :, :0].clone(), values[:, :, :0].clone()  # a view would keep all states alive
    else:
        keys = values = None
    indexer, positions = states.indexer_shapes(layer)
    linear = states.state_shapes(layer, first_token) if states.is_linear(layer) else None
    return LayerShape(keys, values, linear, indexer, positions)


def unknown(cls: type) -> NotCompilable:
    name = cls.__name__
    where = place_in(cls, f"class {name}")
    return NotCompilable(
        f"the cache has a {name} ({where}), which the policy cannot pass to a graph yet",
        remedy="Give a cache whose layers are Transformers' own (DynamicCache, StaticCache), or use_cache=False.",
    )


def fresh_cache(config: Any, encoded: bool = False) -> Cache:
    """What a decoder makes for itself when it is called with ``use_cache`` and no cache.

    Args:
        encoded: it attends to the output of an encoder, too.
    """
    cache = DynamicCache(config=config)
    return EncoderDecoderCache(cache, DynamicCache(config=config)) if encoded else cache
