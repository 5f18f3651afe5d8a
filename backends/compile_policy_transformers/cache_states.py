"""States of a cache layer beside keys and values: of linear attention, and of an indexer that selects keys.

Linear attention keeps convolution and recurrent states of fixed size, which it overwrites in place. Whether they hold
anything yet is a flag, by which models choose another way through their code; inside a graph it is always set, because
states of zeros, which new and reset layers have, mean the same as none. Only a history of token ids means something
else by zeros, and is filled with what the model takes for none. An indexer keeps keys of its own, which grow
or fill up as the others do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicIndexedLayer, LinearAttentionCacheLayerMixin, StaticIndexedLayer

from compile_policy.adapters import Leaves
from compile_policy.errors import NotCompilable

_GROUPS = ("conv_states", "recurrent_states")


@dataclass(frozen=True)
class StateShapes:
    """Sizes behind the batch, and dtype, of each state by group and number; the length of each convolution.

    Attributes:
        histories: number of each state that holds token ids -> the token that it is full of before the first call.
    """

    states: Mapping[str, Mapping[int, tuple[tuple[int, ...], torch.dtype]]]
    kernels: Mapping[int, int | None]
    histories: Mapping[int, int]


def is_linear(layer: Any) -> bool:
    return is_linear_class(type(layer))


def is_linear_class(cls: type) -> bool:
    return issubclass(cls, LinearAttentionCacheLayerMixin)


def is_indexed(layer: Any) -> bool:
    return is_indexed_class(type(layer))


def is_indexed_class(cls: type) -> bool:
    return issubclass(cls, (DynamicIndexedLayer, StaticIndexedLayer))


# -- linear attention -------------------------------------------------------------------------------------------------


def state_shapes(layer: Any, first_token: int | None) -> StateShapes:
    """Shapes in a layer that has seen a call."""
    states = {
        group: {n: (tuple(t.shape[1:]), t.dtype) for n, t in getattr(layer, group).items() if t is not None}
        for group in _GROUPS
    }
    whole = [n for n, (_, dtype) in states["conv_states"].items() if not dtype.is_floating_point]
    histories = {} if first_token is None else dict.fromkeys(whole, first_token)
    return StateShapes(states, dict(layer.conv_kernel_size), histories)


def states_missing(layer: Any, shapes: StateShapes | None) -> bool:
    """Whether a state that the decoder uses has no tensor yet; before any shape is known, all of them."""
    if shapes is None:
        return not any(layer.has_previous_state.values())
    if not all(layer.has_previous_state[n] for n in shapes.histories):  # new, or reset to zeros
        return True
    return any(getattr(layer, group)[n] is None for group, found in shapes.states.items() for n in found)


def initialise_states(layer: Any, shapes: StateShapes, batch: int, device: torch.device) -> None:
    """Zero states, marked as empty: what the layer makes for itself at its first call."""
    for group, found in shapes.states.items():
        for n, (sizes, dtype) in found.items():
            if getattr(layer, group)[n] is None:
                state = torch.zeros((batch, *sizes), dtype=dtype, device=device)
                kernel = {"conv_kernel_size": shapes.kernels[n]} if group == "conv_states" else {}
                layer.lazy_initialization(**{group: state}, state_idx=n, **kernel)
    for n, token in shapes.histories.items():
        if not layer.has_previous_state[n]:
            layer.conv_states[n].fill_(token)


def flatten_states(layer: Any, out: Leaves, path: str) -> tuple[Any, ...]:
    """Spec of the states; their tensors, which the graph writes into, go to ``out``."""
    if layer.record_past:
        raise NotCompilable("the cache records past states for assisted decoding")
    groups = []
    for group in _GROUPS:
        held = [(n, t) for n, t in getattr(layer, group).items() if t is not None]
        for n, t in held:
            labels = ("batch", *(None,) * (t.dim() - 1))
            out.add(t, f"{path}.{group}[{n}]", labels, mutable=True)
        groups.append(tuple(n for n, _ in held))
    return (*groups, tuple(layer.conv_kernel_size.items()))


def rebuild_states(layer: Any, spec: tuple[Any, ...], leaves: Iterator[torch.Tensor]) -> None:
    """Put traced states into a layer under construction."""
    convolutions, recurrents, kernels = spec
    layer.number_of_states = len(kernels)
    layer.conv_states = dict.fromkeys(n for n, _ in kernels) | {n: next(leaves) for n in convolutions}
    layer.recurrent_states = dict.fromkeys(n for n, _ in kernels) | {n: next(leaves) for n in recurrents}
    layer.is_conv_states_initialized = {n: n in convolutions for n, _ in kernels}
    layer.is_recurrent_states_initialized = {n: n in recurrents for n, _ in kernels}
    layer.has_previous_state = {n: n in convolutions for n, _ in kernels}
    layer.conv_kernel_size = dict(kernels)
    layer.record_past = False


def states_written(layer: Any) -> None:
    """A call has filled the states."""
    for n, filled in layer.is_conv_states_initialized.items():
        layer.has_previous_state[n] = layer.has_previous_state[n] or filled


# -- indexers ---------------------------------------------------------------------------------------------------------


def indexer_shapes(layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Keys (batch, 0, width) and positions (kinds, batch, 0) of an indexer that has seen a call, where there are."""
    if not is_indexed(layer) or not layer.is_indexer_initialized:
        return None, None
    positions = layer.indexer_position_ids
    return layer.indexer_keys[:, :0].clone(), None if positions is None else positions[..., :0].clone()


def indexer_missing(layer: Any, shape: Any) -> bool:
    """Whether what the indexer keeps has no tensor yet; before its shape is known, whether nothing has."""
    if shape is None:
        return not layer.is_indexer_initialized
    lacks_keys = shape.indexer is not None and not layer.is_indexer_initialized
    return lacks_keys or (shape.positions is not None and layer.indexer_position_ids is None)


def positions_kept(layer: Any, known: bool) -> tuple[torch.Tensor, ...]:
    """The positions that an indexer holds after a call.

    Raises NotCompilable where a decoder starts to keep some inside the graph, whose next call would miss them.
    """
    if not known and layer.indexer_position_ids is not None:
        raise NotCompilable("the decoder keeps positions in its cache that were not there before the graph")
    return (layer.indexer_position_ids,) if known else ()


def initialise_indexer(layer: Any, like: torch.Tensor, batch: int, device: torch.device) -> None:
    """An empty indexer; ``like`` has its dtype and, last, its width."""
    layer.lazy_initialization_indexer(torch.empty((batch, 0, like.shape[-1]), dtype=like.dtype, device=device))
    if isinstance(layer, DynamicIndexedLayer):
        layer.indexer_keys = torch.empty((batch, 0, like.shape[-1]), dtype=like.dtype, device=device)
