"""States of what the text attends to beside itself: the output of an encoder, or what a picture gave.

The first call of a sequence computes them and leaves them in the cache, later calls read them there: two graphs, and
with a layer that is skipped as long as there is nothing to read, three. So they are computed before the graph, by one
eager call of a single token on a cache of its own; the graph always reads them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from compile_policy.errors import NotCompilable
from compile_policy.unseen import probed
from compile_policy_transformers.cache_argument import cache_name

States = tuple[torch.Tensor, torch.Tensor]

#: What such states are computed from, and the mask of that.
_ENCODED = ("encoder_hidden_states", "encoder_attention_mask")
#: The same of layers within the decoder (mllama), the mask, and which rows of the text see anything at all.
_SEEN, _SEEN_MASK, _SEEN_ROWS = "cross_attention_states", "cross_attention_mask", "full_text_row_masked_out_mask"


def encoded_states(module: torch.nn.Module, pair: EncoderDecoderCache, values: Mapping[str, Any]) -> dict[int, States]:
    """States of the encoder's output that a cache does not have yet, by layer; none of it is changed.

    Args:
        values: arguments of the call by name; (batch, sequence, hidden size) ``inputs_embeds`` among them.
    """
    if values.get("encoder_hidden_states") is None or any(pair.is_updated.values()):
        return {}
    token = {name: values[name] for name in _ENCODED if values.get(name) is not None}
    fresh = _run(module, values, token, _pair)
    return {i: (x.keys, x.values) for i, x in enumerate(fresh.cross_attention_cache.layers) if fresh.is_updated.get(i)}


def after_update(cache: Cache, layer: int, states: States) -> States:
    """What a layer of ``cache`` would hold when ``states`` came in; none of it is changed."""
    layers: list[Any] = cache.layers
    if layer >= len(layers):
        return states
    twin: Any = copy.deepcopy(layers[layer])
    twin.update(*states)
    return twin.keys, twin.values


@dataclass(frozen=True)
class Seen:
    """Keys and values (batch, heads, states, head dim) by layer: what the graph reads, what the cache lacks of that."""

    read: Mapping[int, States] = field(default_factory=dict)
    new: Mapping[int, States] = field(default_factory=dict)


NOTHING = Seen()


class SeenStates:
    """Layers within a decoder that attend to a picture, keep its states in the cache, and are skipped without one.

    Without a picture such a layer is given one state of zeros: attention to it gives zero, and rows of zeros take out
    what follows, so that the layer changes nothing.

    Attributes:
        layers: their numbers.
    """

    def __init__(self, decoder: torch.nn.Module) -> None:
        self.layers = frozenset[int](getattr(decoder, "cross_attention_layers", None) or ())
        self._none: dict[torch.dtype, dict[int, States]] = {}  # one state of zeros for each layer

    def complete(self, module: torch.nn.Module, values: dict[str, Any], cache: Cache | None) -> Seen:
        """Make the arguments those of a call with a picture, whose states come from the cache if there is one.

        Raises:
            NotCompilable: several tokens see a picture, and no mask says which: stock attention is causal then.
        """
        if not self.layers:
            return NOTHING
        embeds = values["inputs_embeds"]
        batch, length, width = embeds.shape
        seen = values.get(_SEEN)
        if seen is not None and seen.dim() > 2:
            seen = values[_SEEN] = seen.reshape(batch, -1, width)  # one row a picture or tile: viewed by rows of text
        new: dict[int, States] = {}
        read: dict[int, States] = {}
        if cache is not None:
            if seen is not None:
                new = self._computed(module, values, seen)
                values[_SEEN] = None
            read = self._held(cache) | {i: after_update(cache, i, states) for i, states in new.items()}
        count = next(iter(read.values()))[0].shape[2] if read else 0 if seen is None else seen.shape[1]
        if not count and cache is not None:
            none = self._zeros(module, values).items()
            read = {i: (k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for i, (k, v) in none}
        elif not count:
            values[_SEEN] = embeds.new_zeros(batch, 1, width)
        if count and values.get(_SEEN_MASK) is None and length > 1:
            raise NotCompilable(f"no {_SEEN_MASK} says which text sees the picture", remedy=f"Give {_SEEN_MASK}.")
        if not count or values.get(_SEEN_MASK) is None:
            values[_SEEN_MASK] = embeds.new_zeros(batch, 1, length, max(count, 1))
            values[_SEEN_ROWS] = None
        if values.get(_SEEN_ROWS) is None:
            values[_SEEN_ROWS] = embeds.new_full((batch, 1, length, 1), 1.0 if count else 0.0)
        return Seen(read, new)

    def _held(self, cache: Cache) -> dict[int, States]:
        layers: list[Any] = cache.layers
        held = {i: layers[i] for i in sorted(self.layers) if i < len(layers) and layers[i].is_initialized}
        return {i: (layer.keys, layer.values) for i, layer in held.items() if layer.keys.numel()}

    def _computed(self, module: torch.nn.Module, values: Mapping[str, Any], seen: torch.Tensor) -> dict[int, States]:
        return self._held(_run(module, values, {_SEEN: seen}, DynamicCache))

    def _zeros(self, module: torch.nn.Module, values: Mapping[str, Any]) -> dict[int, States]:
        embeds = values["inputs_embeds"]
        if embeds.dtype not in self._none:
            with torch.no_grad():
                found = self._computed(module, {"inputs_embeds": embeds[:1]}, embeds.new_zeros(1, 1, embeds.shape[2]))
            self._none[embeds.dtype] = {i: (k.new_zeros(k.shape), v.new_zeros(v.shape)) for i, (k, v) in found.items()}
        return self._none[embeds.dtype]


def _run(module: torch.nn.Module, values: Mapping[str, Any], token: dict[str, Any], new: Callable[[], Cache]) -> Any:
    """The cache after the decoder's own forward over one token, or the whole call where it wants more than that."""
    cache, embeds = new(), values["inputs_embeds"]  # copied: some decoders add their positions in place
    name = cache_name(inspect.unwrap(type(module).forward))
    try:
        call = {"inputs_embeds": embeds[:, :1].clone(), **token, name: cache, "use_cache": True}
        _probe(module, call, cache)
    except NotCompilable:
        raise
    except Exception:
        cache = new()
        call = {**values, "inputs_embeds": embeds.clone(), name: cache, "use_cache": True}
        _probe(module, call, cache)
    return cache


def _probe(module: torch.nn.Module, call: Mapping[str, Any], cache: Cache) -> None:
    probed(module, lambda: module.forward(**call), owned=[cache], gradients=True)


def _pair() -> EncoderDecoderCache:
    return EncoderDecoderCache(DynamicCache(), DynamicCache())
