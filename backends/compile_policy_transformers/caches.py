"""Transformers caches as call arguments.

Outside the graph a cache stays the user's object. A call carries it as `CacheCall`; its adapter flattens the layers'
tensors, rebuilds a cache of the same class around traced tensors, and writes the new state back. Layers whose stock
``update`` branches in Python on how full they are get a branch-free twin inside the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers.cache_utils import Cache

from compile_policy.adapters import Leaves, register_adapter
from compile_policy.errors import NotCompilable
from compile_policy_transformers import cache_moves
from compile_policy_transformers import cache_states as states
from compile_policy_transformers.cache_checks import check, own_attributes
from compile_policy_transformers.cache_layers import MOVED, kind_of
from compile_policy_transformers.cache_twins import new_states, rebuild_layer, slots_to_keep, states_to_keep
from compile_policy_transformers.releases import DummyLayer

#: Labels of the dims that vary. A full dynamic layer and a sliding one hold different lengths.
PAST, SLIDING_PAST, SLIDING_KEPT = "past", "sliding_past", "sliding_kept"
SLOTS, SLIDING_SLOTS = "slots", "sliding_slots"
#: Of the positions that an indexer keeps beside slots: as many as there are tokens so far.
INDEXED = "indexed"
#: Label of what has the length of an encoder's output, or of what a picture gave.
ENCODED = "encoded"


@dataclass(frozen=True)
class CacheCall:
    """A cache together with the number of new tokens that this call brings.

    Attributes:
        given: layers that are read only -> their keys and values, whatever the cache holds for them.
        new: what of that the cache gets after the call.
        moved: layers of a class of their own -> what the call does to them.
    """

    cache: Cache
    query_length: int
    given: Mapping[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    new: Mapping[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    moved: dict[int, cache_moves.Moves] = field(default_factory=dict)


class _CacheAdapter:
    def flatten(self, value: CacheCall, out: Leaves, path: str) -> Any:
        cache: Any = value.cache  # Transformers types layers as a union of what they may be
        check(cache)
        selects: dict[tuple[str, int, int], int] = {}
        groups = cache_moves.groups(cache)
        layers = tuple(
            flatten_given(value.given[i], out, f"{path}.layers[{i}]")
            if i in value.given
            else cache_moves.flatten(layer, groups[i], out, f"{path}.layers[{i}]")
            if i in groups
            else self._flatten_layer(layer, selects, out, f"{path}.layers[{i}]")
            for i, layer in enumerate(cache.layers)
        )
        kept = cache_moves.flatten_moves(cache, groups, value.query_length, value.moved, out, path)
        for (kind, size, held), n in selects.items():
            index = _CHOOSE[kind](size, held, value.query_length, out.tensors[-1].device)
            label = SLIDING_SLOTS if kind == "static_sliding" else SLIDING_KEPT
            out.add(index, f"{path}.select[{n}]", (label,), filler=_any_states)
        return (type(cache), layers, len(selects), kept, own_attributes(cache))

    def _flatten_layer(
        self, layer: Any, selects: dict[tuple[str, int, int], int], out: Leaves, path: str
    ) -> tuple[Any, ...]:
        if type(layer) is DummyLayer:
            return ("dummy",)
        spec = self._flatten_attention(layer, kind_of(layer), selects, out, path)
        if states.is_linear(layer):
            return ("linear", spec, states.flatten_states(layer, out, path))
        if not states.is_indexed(layer) or not layer.is_indexer_initialized:  # a layer may use another's choice
            return spec
        static = spec[0] == "static"
        out.add(layer.indexer_keys, f"{path}.indexer_keys", ("batch", SLOTS if static else PAST, None), mutable=static)
        if static:
            count = layer.indexer_cumulative_length
            out.add(count, f"{path}.indexer_cumulative_length", (), mutable=True, filler=_zero)
        positions = layer.indexer_position_ids
        if positions is not None:  # they grow also where the slots do not
            out.add(positions, f"{path}.indexer_position_ids", (None, "batch", INDEXED if static else PAST))
        return ("indexed", spec, positions is not None)

    def _flatten_attention(
        self, layer: Any, kind: str, selects: dict[tuple[str, int, int], int], out: Leaves, path: str
    ) -> tuple[Any, ...]:
        if kind == "dynamic":
            self._add(layer, out, path, PAST)
        elif kind == "static":
            self._add(layer, out, path, SLOTS, mutable=True)
            out.add(layer.cumulative_length, f"{path}.cumulative_length", (), mutable=True, filler=_zero)
        elif kind == "sliding":
            self._add(layer, out, path, SLIDING_PAST, last=layer.sliding_window - 1 if layer.record_past else None)
            held = out.tensors[-1].shape[2]
            place = ("recorded" if layer.record_past else "sliding", layer.sliding_window, held)
            if states.is_linear(layer):  # such decoders make positions from the number of tokens seen
                seen = torch.tensor(layer.cumulative_length, device=layer.keys.device)
                out.add(seen, f"{path}.seen", (), filler=_zero)
            return ("sliding", selects.setdefault(place, len(selects)))
        elif kind == "static_sliding":
            self._add(layer, out, path, SLIDING_SLOTS, mutable=True)
            place = ("static_sliding", layer.max_cache_len, layer.cumulative_length_int)
            return ("static_sliding", selects.setdefault(place, len(selects)))
        return (kind,)

    @staticmethod
    def _add(
        layer: Any, out: Leaves, path: str, length: str, *, mutable: bool = False, last: int | None = None
    ) -> None:
        """Add keys and values; ``last``: only so many of the states, which are what attention sees of them."""
        if layer.keys is None:
            raise NotCompilable("a layer of the cache holds no states yet, such as those of cross-attention")
        for name in ("keys", "values"):
            held = getattr(layer, name)
            if last is not None and held.shape[2] > last:
                held = held[:, :, held.shape[2] - last :]
            out.add(held, f"{path}.{name}", ("batch", None, length, None), mutable=mutable)

    def rebuild(self, spec: Any, leaves: Iterator[torch.Tensor]) -> Cache:
        cls, layer_specs, n_selects, kept, own = spec
        cache: Any = object.__new__(cls)
        for name, constant in own:
            setattr(cache, name, constant)
        cache.layers = [rebuild_layer(s, leaves) for s in layer_specs]
        cache.layer_class_to_replicate = None
        cache.offloading = False
        moves = [(next(leaves), [next(leaves) for _ in range(count)]) for count in kept]
        selects = [next(leaves) for _ in range(n_selects)]
        for s, layer in zip(layer_specs, cache.layers, strict=True):
            attention = _attention(s)
            if attention[0] in ("sliding", "static_sliding"):
                layer.select = selects[attention[1]]
            elif attention[0] == MOVED:
                layer.seen, layer.kept = moves[attention[1]]
        return cast(Cache, cache)

    def state(self, spec: Any, value: Cache) -> list[torch.Tensor]:
        for name, before in spec[4]:
            if getattr(value, name) != before:
                raise NotCompilable(f"every call changes {name} of the cache, which a graph would leave as it is")
        out: list[torch.Tensor] = []
        for s, layer in zip(spec[1], cast(Any, value).layers, strict=True):
            grows = _attention(s)[0] in ("dynamic", "sliding")
            out += (layer.keys, layer.values) if grows else ()
            if s[0] == "indexed":
                out += (layer.indexer_keys,) if grows else ()
                out += states.positions_kept(layer, s[2])
            out += layer.after() if s[0] == MOVED else ()
        return out

    def write_back(self, spec: Any, value: CacheCall, state: list[torch.Tensor]) -> None:
        tensors = iter(state)
        layers: Any = value.cache.layers
        for i, (s, layer) in enumerate(zip(spec[1], layers, strict=True)):
            kind = _attention(s)[0]
            if kind == MOVED:
                cache_moves.settle(layer, value.moved[i], [(next(tensors), next(tensors)) for _ in range(s[2])])
            if kind in ("dynamic", "sliding"):
                keys, values = next(tensors), next(tensors)
                if kind == "sliding" and layer.record_past:  # all are kept until `crop` is called
                    keys, values = torch.cat([layer.keys, keys], 2), torch.cat([layer.values, values], 2)
                layer.keys, layer.values = keys, values
            if kind == "dynamic" and s[0] == "indexed":
                layer.indexer_keys = next(tensors)
            if s[0] == "indexed" and s[2]:
                layer.indexer_position_ids = next(tensors)
            if kind == "sliding":
                layer.cumulative_length += value.query_length
            elif kind == "static_sliding":
                seen = layer.cumulative_length_int
                layer.cumulative_length_int = seen + value.query_length
                if seen + value.query_length <= layer.max_cache_len:  # the stock layer stops counting here too
                    layer.cumulative_length.add_(value.query_length)
            if s[0] == "linear":
                states.states_written(layer)
        for i, (keys, held) in value.new.items():
            value.cache.update(keys, held, i)

    def public(self, value: CacheCall) -> Cache:
        return value.cache


def flatten_given(states: tuple[torch.Tensor, torch.Tensor], out: Leaves, path: str, length: str = ENCODED) -> Any:
    """Spec of a layer that is read only."""
    for name, tensor in zip(("keys", "values"), states, strict=True):
        out.add(tensor, f"{path}.given_{name}", ("batch", None, length, None))
    return ("given",)


def _attention(spec: tuple[Any, ...]) -> tuple[Any, ...]:
    """The part of a layer's spec that is about keys and values."""
    return spec[1] if spec[0] in ("linear", "indexed") else spec


_CHOOSE: dict[str, Callable[[int, int, int, torch.device], torch.Tensor]] = {
    "static_sliding": slots_to_keep,
    "sliding": states_to_keep,
    "recorded": new_states,
}


def _zero(sizes: Mapping[str, int], shape: Sequence[int]) -> torch.Tensor:
    return torch.zeros(tuple(shape), dtype=torch.long)


def _any_states(sizes: Mapping[str, int], shape: Sequence[int]) -> torch.Tensor:
    """Any valid index does for an example."""
    held = sizes[SLIDING_SLOTS] if SLIDING_SLOTS in sizes else sizes[SLIDING_PAST]
    return torch.arange(shape[0]) % (held + sizes["sequence"])


register_adapter(CacheCall, _CacheAdapter())
