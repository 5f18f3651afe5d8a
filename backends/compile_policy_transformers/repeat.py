"""The short road: a single-token call that continues where the last call on the same cache ended.

Making a call canonical costs time in Python that grows with the number of layers; for the decode step that follows a
call it would find what it found before. `DecodeSteps` recognises such a step by what could have changed: the modes,
the structure, the constants, the cache object and the very tensors that the last call left in it, and the metadata of
the few new tensors. Whatever does not match takes the ordinary road.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from compile_policy.call_key import metadata_of
from compile_policy.entry import Entry
from compile_policy_transformers.caches import CacheCall, states_to_keep

_keys, _values = attrgetter("keys"), attrgetter("values")
_TENSORS = ("inputs_embeds", "input_ids", "position_ids", "attention_mask", "past_key_values")
_MASKS = ("full_attention", "sliding_attention")


class Step:
    """A recognised call: what `Entry.run` reads of a `Call`, and what it was recognised by."""

    __slots__ = ("known", "leaves", "spec", "values")
    copied = ()  # a step's leaves are the cache's own tensors

    def __init__(self, known: Known, leaves: list[torch.Tensor], values: Mapping[str, Any]) -> None:
        self.known, self.leaves, self.spec = known, leaves, known.entry.call.spec
        self.values = {**known.blank, **values}


@dataclass(frozen=True)
class Known:
    """What the last call on a cache established.

    Attributes:
        modes: grad, inference, training, autocast, and the structure's number.
        constants: arguments that are no tensors, by name.
        kinds: class of each cache layer; ``keys`` and ``values`` are the tensors that the call left there.
        layout: names of the call's arguments in order; ``blank`` has them all, without values.
        given: names of the arguments as the caller gave them.
        others: positions of the leaves that do not belong to the cache.
    """

    entry: Entry
    modes: tuple[Any, ...]
    constants: dict[str, Any]
    kinds: tuple[type, ...]
    keys: list[Any]
    values: list[Any]
    layout: tuple[str, ...]
    others: tuple[int, ...]
    mask_names: tuple[str, ...] | None
    blank: dict[str, None]
    given: tuple[str, ...]

    def held(self, *, sliding: bool) -> int | None:
        """States held by a dynamic layer of the kind; ``None`` when there is none."""
        kind = DynamicSlidingWindowLayer if sliding else DynamicLayer
        if kind in self.kinds:
            return int(self.keys[self.kinds.index(kind)].shape[2])
        return None


def _given(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple([name for name, value in kwargs.items() if value is not None])


class DecodeSteps:
    """Remembers, per cache, what the next step is expected to look like."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Cache, Known] = weakref.WeakKeyDictionary()

    def match(self, kwargs: Mapping[str, Any], modes: tuple[Any, ...]) -> Known | None:
        """What is known for this call's cache, if nothing but the new token has changed."""
        cache = kwargs.get("past_key_values")
        known = self._known.get(cache) if isinstance(cache, Cache) else None
        if known is None or cache is None or known.modes != modes:
            return None
        for name, value in kwargs.items():
            if name not in _TENSORS and known.constants.get(name, known) is not value:
                return None
        layers = cache.layers
        if len(layers) != len(known.keys) or known.given != _given(kwargs):
            return None
        if all(map(is_, map(_keys, layers), known.keys)) and all(map(is_, map(_values, layers), known.values)):
            return known
        return None

    def remember(self, kwargs: Mapping[str, Any], call: Any, entry: Entry, modes: tuple[Any, ...]) -> None:
        """Note what a call left behind, where the next step can be recognised by it."""
        carrier = call.values.get("past_key_values")
        if not isinstance(carrier, CacheCall):
            return
        kinds = tuple(map(type, carrier.cache.layers))
        if not set(kinds) <= {DynamicLayer, DynamicSlidingWindowLayer, StaticLayer}:
            return
        if carrier.query_length != 1:
            return  # the first step of a sequence is proved (`Region`) and remembered, the next ones repeat it
        constants = {name: value for name, value in kwargs.items() if name not in _TENSORS}
        if any(isinstance(value, (torch.Tensor, list, dict)) for value in constants.values()):
            return  # more tensors than a decode step has
        mask = dict(entry.call.spec).get("attention_mask", ("const",))
        self._known[carrier.cache] = Known(
            entry,
            modes,
            constants,
            kinds,
            list(map(_keys, carrier.cache.layers)),
            list(map(_values, carrier.cache.layers)),
            tuple(name for name, _ in entry.call.spec),
            tuple(i for i, path in enumerate(entry.call.paths) if not path.startswith("past_key_values")),
            tuple(name for name, _ in mask[1]) if mask[0] == "dict" else None,
            {name: None for name, _ in entry.call.spec},
            _given(kwargs),
        )

    @staticmethod
    def advance(known: Known, cache: Cache) -> None:
        """The step has run: dynamic layers hold new tensors."""
        known.keys[:] = map(_keys, cache.layers)
        known.values[:] = map(_values, cache.layers)


def step_mask(given: Any, known: Known, embeds: torch.Tensor) -> Any:
    """Dense masks for one new token, or ``None`` where the ordinary road has to make them.

    A single token sees all that its cache holds, so its row of a causal or sliding mask is the padding mask.
    """
    if isinstance(given, torch.Tensor) and given.dim() == 4:
        return given if known.mask_names is None else None
    if isinstance(given, Mapping):
        whole = known.mask_names is not None and all(isinstance(m, torch.Tensor) for m in given.values())
        return given if whole and DynamicSlidingWindowLayer not in known.kinds else None
    if known.mask_names is None:
        sliding = DynamicLayer not in known.kinds
        return _row(given, known.held(sliding=sliding), known.held(sliding=False), embeds)
    if not set(known.mask_names) <= set(_MASKS):
        return None
    full = known.held(sliding=False)
    masks = {n: _row(given, known.held(sliding=n != "full_attention"), full, embeds) for n in known.mask_names}
    return None if any(mask is None for mask in masks.values()) else masks


def _row(padding: Any, held: int | None, seen: int | None, embeds: torch.Tensor) -> torch.Tensor | None:
    """(batch, 1, 1, held + 1): which of the held states and the new one count."""
    if held is None:
        return None
    if padding is None:
        return torch.ones((embeds.shape[0], 1, 1, held + 1), dtype=torch.bool, device=embeds.device)
    if seen is not None and padding.shape[1] != seen + 1:
        return None
    row: torch.Tensor = padding if padding.dtype is torch.bool else padding.to(torch.bool)
    return row[:, None, None, -held - 1 :].contiguous()


def step_leaves(known: Known, values: Mapping[str, Any], cache: Cache) -> list[torch.Tensor] | None:
    """All leaves of the step in the entry's order; ``None`` when a new tensor differs from the entry's."""
    leaves: list[torch.Tensor] = []
    for name in known.layout:
        if name == "past_key_values":
            leaves += _cache_leaves(known, cache)
            continue
        value = values.get(name)
        if isinstance(value, torch.Tensor):
            leaves.append(value if value.is_contiguous() else value.contiguous())
        elif isinstance(value, Mapping):
            leaves += [value[key] for key in sorted(value)]
        elif isinstance(value, list):
            leaves += value
    call = known.entry.call
    if len(leaves) != len(call.labels):
        return None
    expected = call.key[1]
    for i in known.others:
        if not leaves[i].is_contiguous() or metadata_of(leaves[i], call.labels[i]) != expected[i]:
            return None
    return leaves


def _cache_leaves(known: Known, cache: Cache) -> list[torch.Tensor]:
    """The cache's leaves in the order in which `CacheCall` flattens, for layers that passed `DecodeSteps.match`."""
    leaves: list[Any] = []
    selects: dict[tuple[int, int], torch.Tensor] = {}
    for kind, layer, keys, values in zip(known.kinds, cache.layers, known.keys, known.values, strict=True):
        leaves += (keys, values)
        if kind is StaticLayer:
            leaves.append(layer.cumulative_length)  # type: ignore[union-attr]
        elif kind is DynamicSlidingWindowLayer:
            place = (layer.sliding_window, keys.shape[2])  # type: ignore[union-attr]
            if place not in selects:
                selects[place] = states_to_keep(*place, 1, keys.device)
    return [*leaves, *selects.values()]
