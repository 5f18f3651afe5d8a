"""Caches of causal convolutions: the end of one chunk of sound, which pads the next.

Transformers' audio towers keep one such state for each convolution (``...Conv1dPaddingCache``), make it when it is
first asked for, and treat a chunk that is shorter than the padding apart. A graph gets all states as tensors, made
before the first chunk, and returns the new ones: first chunks and later ones, short and long, are one graph. A class is
taken for such a cache when its states behave as ours do on a trial.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from compile_policy.adapters import Leaves, adapter_for, register_adapter
from compile_policy.errors import NotCompilable

ARGUMENT = "padding_cache"
_UPDATE = ["self", "hidden_states", "cache_key", "conv_module"]


class Paddings:
    """A padding cache inside a graph.

    Args:
        states: key of a convolution -> (pieces, channels, padding) what stands before its next chunk; none for a
            convolution that is not padded.
    """

    def __init__(self, states: dict[str, torch.Tensor | None]) -> None:
        self.states = states

    def update(self, hidden_states: torch.Tensor, cache_key: str, conv_module: nn.Module) -> torch.Tensor:
        """(pieces, channels, padding + frames): the chunk with its padding, the end of which is the next one's."""
        state = self.states[cache_key]
        if state is None:
            return hidden_states
        padded = torch.cat([state, hidden_states], dim=-1)
        self.states[cache_key] = padded.narrow(-1, hidden_states.shape[-1], state.shape[-1])
        return padded


class _PaddingsAdapter:
    def flatten(self, value: Any, out: Leaves, path: str) -> Any:
        for name, layer in value.layers.items():
            if not layer.is_initialized:
                raise NotCompilable(f"{path} has no state for {name} yet")
            if layer.cache.shape[-1]:
                out.add(layer.cache, f"{path}.{name}")
        return tuple((name, bool(layer.cache.shape[-1])) for name, layer in value.layers.items())

    def rebuild(self, spec: Any, leaves: Iterator[torch.Tensor]) -> Paddings:
        return Paddings({name: next(leaves) if padded else None for name, padded in spec})

    def state(self, spec: Any, value: Paddings) -> list[torch.Tensor]:
        return [state for state in value.states.values() if state is not None]

    def write_back(self, spec: Any, value: Any, state: list[torch.Tensor]) -> None:
        states = iter(state)
        for name, padded in spec:
            if padded:
                value.layers[name].cache.copy_(next(states))

    def public(self, value: Any) -> Any:
        return value


class PaddingCaches:
    """The padding caches of one tower.

    Attributes:
        cls: their class; ``None`` where the tower has none, or one that behaves in another way.
        convolutions: those with a state, by key.
    """

    def __init__(self, tower: nn.Module) -> None:
        self.cls: type | None = None
        keyed = ((getattr(m, "cache_key", None), m) for m in tower.modules())
        self.convolutions: dict[str, Any] = {key: m for key, m in keyed if isinstance(key, str)}
        if ARGUMENT not in inspect.signature(tower.forward).parameters or not self.convolutions:
            return
        found = [value for value in vars(sys.modules[type(tower).__module__]).values() if _looks_like_one(value)]
        if len(found) == 1 and all(self._behaves(found[0], key) for key in self.convolutions):
            self.cls = found[0]
            if adapter_for(self.cls) is None:
                register_adapter(self.cls, _PaddingsAdapter())

    def new(self, pieces: int, like: torch.Tensor) -> Any:
        """A cache as it is before the first chunk, of the dtype and on the device of ``like``."""
        assert self.cls is not None
        cache: Any = self.cls()
        for key in self.convolutions:
            self._update(cache, key, like.new_zeros(pieces, self.convolutions[key].in_channels, 0))
        return cache

    def complete(self, cache: Any) -> bool:
        """Whether a given cache has a state for every convolution."""
        known = cache.__class__ is self.cls
        return known and set(cache.layers) == set(self.convolutions)

    def made(self, result: Any) -> bool:
        """Whether a result holds such a cache."""
        return isinstance(result, Mapping) and type(result.get(ARGUMENT)) is self.cls

    def _update(self, cache: Any, key: str, chunk: torch.Tensor) -> torch.Tensor:
        padded: torch.Tensor = cache.update(chunk, key, self.convolutions[key])
        return padded

    def _behaves(self, cls: Any, key: str) -> bool:
        """Whether a state of ``cls`` pads as ours do, over chunks without frames, with few and with many."""
        try:
            channels = self.convolutions[key].in_channels
            theirs = cls()
            self._update(theirs, key, torch.zeros(2, channels, 0))
            state = theirs.layers[key].cache
            ours = Paddings({key: state.clone() if state.shape[-1] else None})
            for frames in (1, state.shape[-1] + 3, max(1, state.shape[-1]), 2):
                chunk = torch.randn(2, channels, frames, generator=torch.Generator().manual_seed(frames))
                if not torch.equal(self._update(theirs, key, chunk), ours.update(chunk, key, self.convolutions[key])):
                    return False
                after = ours.states[key]
                if after is not None and not torch.equal(theirs.layers[key].cache, after):
                    return False
        except Exception:
            return False
        return True


def _looks_like_one(value: Any) -> bool:
    update = vars(value).get("update") if isinstance(value, type) else None
    return isinstance(update, types.FunctionType) and list(inspect.signature(update).parameters) == _UPDATE
