"""Cache layers inside a trace: twins of Transformers' layers without Python branches on how full they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    LinearAttentionLayer,
    StaticIndexedLayer,
    StaticLayer,
)

from compile_policy.errors import NotCompilable
from compile_policy_transformers.cache_layers import MOVED
from compile_policy_transformers.cache_states import rebuild_states
from compile_policy_transformers.releases import DummyLayer


class TracedDynamic(DynamicLayer):
    """`DynamicLayer` that does not ask whether it is empty."""

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[-2]


class TracedSliding(DynamicLayer):
    """`DynamicSlidingWindowLayer` and `StaticSlidingWindowLayer` without their Python branches.

    Attention sees all that is held followed by the new states. ``select`` says which of both stay: an index chosen
    outside the graph (`states_to_keep`, `slots_to_keep`), so that one graph serves a layer that is filling up,
    overflowing or full.
    """

    is_sliding = True
    keys: torch.Tensor
    values: torch.Tensor
    in_place: bool
    select: torch.Tensor
    seen: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        full_keys = torch.cat([self.keys, key_states], dim=-2)
        full_values = torch.cat([self.values, value_states], dim=-2)
        keys, values = full_keys.index_select(2, self.select), full_values.index_select(2, self.select)
        if self.in_place:
            self.keys.copy_(keys)
            self.values.copy_(values)
        else:
            self.keys, self.values = keys, values
        return full_keys, full_values

    def get_seq_length(self) -> Any:
        """Number of tokens seen, as static layers give it: a tensor without dims."""
        if self.seen is None:
            raise NotCompilable("the decoder asks a sliding layer for its length inside the graph")
        return self.seen

    def get_mask_sizes(self, query_length: int) -> Any:
        """Length of the keys that `update` returns, and the position of the first."""
        if self.seen is None:
            raise NotCompilable("the decoder asks a sliding layer for its mask's sizes inside the graph")
        held = self.keys.shape[2]
        return held + query_length, self.seen - held


def states_to_keep(window: int, held: int, new: int, device: torch.device) -> torch.Tensor:
    """Index into (held | new states) of what a sliding dynamic layer holds after this call: the last window - 1."""
    return torch.arange(max(held + new - window + 1, 0), held + new, device=device)


def new_states(window: int, held: int, new: int, device: torch.device) -> torch.Tensor:
    """Index into (held | new states) of the new ones: a layer that records its past adds them to all that it has."""
    return torch.arange(held, held + new, device=device)


def slots_to_keep(slots: int, seen: int, new: int, device: torch.device) -> torch.Tensor:
    """Index into (slots | new states) of what a sliding static layer holds after this call.

    Args:
        slots: size of the layer, ``seen``: tokens before this call, ``new``: tokens of this call.
    """
    if seen + new <= slots:  # still filling up: new states go behind the old ones
        order = [*range(seen), *range(slots, slots + new), *range(seen + new, slots)]
    else:
        held = list(range(min(seen, slots)))
        order = (held + list(range(slots, slots + new)))[-slots:]
    return torch.tensor(order, device=device)


class TracedGiven(DynamicLayer):
    """States that were all there before the graph, and are only read."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotCompilable("the decoder adds to states that come from outside the text")


class TracedStatic(StaticLayer):
    """`StaticLayer` for which no mask is treated in another way when there is one token: masks are always made."""

    is_compileable = False


class TracedMoves:
    """A layer of a class of its own: attention sees, and the layer keeps, what the index tensors say.

    Attributes:
        held: keys and values of each block, ``seen`` and ``kept``: as in `cache_moves.Moves`.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, held: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.held = held
        self.seen: Any = None
        self.kept: list[torch.Tensor] = []
        self.updated = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if args or kwargs.keys() - {"kwargs"} or self.updated:  # the layer was seen not to read `kwargs`
            raise NotCompilable("the decoder updates a cache layer twice, or with more than keys and values")
        none = (torch.zeros_like(key_states[:, :, :1]), torch.zeros_like(value_states[:, :, :1]))
        keys = torch.cat([none[0], *[k for k, _ in self.held], key_states], dim=2)
        values = torch.cat([none[1], *[v for _, v in self.held], value_states], dim=2)
        self.held = [(keys.index_select(2, i), values.index_select(2, i)) for i in self.kept]
        self.updated = True
        return keys.index_select(2, self.seen), values.index_select(2, self.seen)

    def after(self) -> tuple[torch.Tensor, ...]:
        """Keys and values of each block after the call."""
        if not self.updated:
            raise NotCompilable("the decoder does not update every layer of the cache")
        return tuple(t for pair in self.held for t in pair)

    def get_seq_length(self) -> int:
        raise NotCompilable("the decoder asks a cache layer for its length inside the graph")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotCompilable("the decoder asks a cache layer for its mask's sizes inside the graph")


class TracedLinearDynamic(LinearAttentionLayer, TracedDynamic):  # type: ignore[misc, override]
    """Linear attention beside full attention."""


class TracedLinearSliding(LinearAttentionLayer, TracedSliding):  # type: ignore[misc, override]
    """Linear attention beside sliding attention."""


class TracedLinearStatic(LinearAttentionLayer, StaticLayer):  # type: ignore[misc, override]
    """Linear attention beside full attention over slots."""


class TracedIndexed(DynamicIndexedLayer):
    """`DynamicIndexedLayer` that does not ask whether it is empty."""

    get_seq_length = TracedDynamic.get_seq_length


_TWINS: dict[str, type] = {
    "given": TracedGiven,
    "dynamic": TracedDynamic,
    "sliding": TracedSliding,
    "static": TracedStatic,
    "static_sliding": TracedSliding,
}
_LINEAR: dict[str, type] = {
    "none": LinearAttentionLayer,
    "dynamic": TracedLinearDynamic,
    "sliding": TracedLinearSliding,
    "static": TracedLinearStatic,
    "static_sliding": TracedLinearSliding,
}
_INDEXED: dict[str, type] = {"dynamic": TracedIndexed, "static": StaticIndexedLayer}


def rebuild_layer(spec: tuple[Any, ...], leaves: Iterator[torch.Tensor]) -> Any:
    """A layer around traced tensors, from what `caches` says of it."""
    kind = spec[0]
    if kind == "dummy":
        return DummyLayer()
    if kind == MOVED:
        return TracedMoves([(next(leaves), next(leaves)) for _ in range(spec[2])])
    if kind == "linear":
        inner = spec[1]
        layer: Any = object.__new__(_LINEAR[inner[0]])
        layer.dtype = layer.device = None
        if inner[0] != "none":
            _fill(layer, inner[0], leaves)
        if inner[0] == "sliding":
            layer.seen = next(leaves)
        rebuild_states(layer, spec[2], leaves)
        return layer
    if kind == "indexed":
        inner = spec[1]
        layer = object.__new__(_INDEXED[inner[0]])
        _fill(layer, inner[0], leaves)
        layer.indexer_keys = next(leaves)
        layer.indexer_position_ids = None
        layer.indexer_dtype, layer.indexer_device = layer.indexer_keys.dtype, layer.indexer_keys.device
        layer.is_indexer_initialized = True
        if inner[0] == "static":
            layer.indexer_cumulative_length = next(leaves)
        if spec[2]:
            layer.indexer_position_ids = next(leaves)
        return layer
    layer = object.__new__(_TWINS[kind])
    _fill(layer, kind, leaves)
    return layer


def _fill(layer: Any, kind: str, leaves: Iterator[torch.Tensor]) -> None:
    """Keys and values, and what belongs to them."""
    layer.keys, layer.values = next(leaves), next(leaves)
    layer.is_initialized = True
    layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
    if kind in ("sliding", "static_sliding"):
        layer.in_place = kind == "static_sliding"
    elif kind == "static":
        layer.cumulative_length = next(leaves)
        layer.max_cache_len = layer.keys.shape[2]
