"""What a decode step leaves in its cache: the layers, the tensors in them, and how to recognise both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from compile_policy.call_key import Call, metadata_of
from compile_policy.entry import Entry

_numel = torch.Tensor.numel


class StepCache:
    """A cache whose layers are all dynamic (full or sliding) or all static, after a step.

    Attributes:
        tensors: keys and values of every layer, in order: (batch, heads, states, dim) each.
        places: their places among the leaves; for a cache that grows, one after the other.
        looked_at: of each shape the first place in ``tensors``, and the tensors of that shape.
    """

    def __init__(self, cache: Cache, call: Call) -> None:
        layers: list[Any] = list(cache.layers)
        self.layers = layers
        self.grows = type(layers[0]) is not StaticLayer
        self.sliding = [layer for layer in layers if type(layer) is DynamicSlidingWindowLayer]
        self.windows = [(layer.sliding_window, layer.record_past) for layer in self.sliding]
        self.counts = [] if self.grows else [layer.cumulative_length for layer in layers]
        self.tensors: list[torch.Tensor] = [t for layer in layers for t in (layer.keys, layer.values)]
        self.places = [i for i, path in enumerate(call.paths) if path.endswith((".keys", ".values"))]
        by_shape: dict[torch.Size, list[int]] = {}
        for i, t in enumerate(self.tensors):
            by_shape.setdefault(t.shape, []).append(i)
        self.looked_at = [(found[0], _picker(found, len(self.tensors))) for found in by_shape.values()]
        self.same = {self.places[i]: self.places[found[0]] for found in by_shape.values() for i in found}

    def holds(self, cache: Any) -> bool:
        """Whether the cache is what the last step left behind."""
        if cache.layers != self.layers or cache.offloading:
            return False
        mine = iter(self.tensors)
        for layer in self.layers:
            if layer.keys is not next(mine) or layer.values is not next(mine):
                return False
        if self.sliding and [(layer.sliding_window, layer.record_past) for layer in self.sliding] != self.windows:
            return False
        if self.counts:
            for layer, count in zip(self.layers, self.counts, strict=True):
                if layer.cumulative_length is not count:
                    return False
        for _, pick in self.looked_at:  # noqa: SIM110 - a generator costs more
            if len(set(map(_numel, pick(self.tensors)))) != 1:
                return False
        return True

    def states(self, layer: int) -> int:
        """Number of states that a layer holds."""
        return self.tensors[2 * layer].shape[2]

    def first(self, kind: type) -> int | None:
        """The first layer of a class."""
        return next((i for i, layer in enumerate(self.layers) if type(layer) is kind), None)

    def take(self, state: Sequence[torch.Tensor]) -> None:
        """Write a step's new states back into the layers."""
        self.tensors = list(state)
        mine = iter(state)
        for layer, keys, values in zip(self.layers, mine, mine, strict=True):
            layer.keys = keys
            layer.values = values
        for layer in self.sliding:
            layer.cumulative_length += 1


def step_cache(cache: Cache, call: Call, entry: Entry) -> StepCache | None:
    """The cache after ``call`` ran; ``None`` where the next step needs the ordinary road."""
    kinds = set(map(type, cache.layers))
    if kinds != {StaticLayer} and not (kinds and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}):
        return None
    held = StepCache(cache, call)
    if any(layer.record_past for layer in held.sliding):  # what it holds is more than what the graph was given
        return None
    if entry.state_sizes != [len(held.tensors) if held.grows else 0] or len(held.places) != len(held.tensors):
        return None
    for place, t in zip(held.places, held.tensors, strict=True):
        # The graph turns tensors like these into tensors like these: what holds now holds after every step.
        if not t.is_contiguous() or metadata_of(t, call.labels[place]) != call.key[1][place]:
            return None
    return held


def _picker(found: list[int], count: int) -> Callable[[list[Any]], Sequence[Any]]:
    if len(found) == count:
        return lambda tensors: tensors
    pick = itemgetter(*found)
    return pick if len(found) > 1 else lambda tensors: (pick(tensors),)
