"""Caches that must not be touched before it is known what they are: quantized, offloaded, and those of the user's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from falling import falls_back
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache, QuantizedLayer

import compile_policy as cp
from compile_policy.errors import NotCompilable
from compile_policy_transformers import cache_checks, cache_layers, cache_moves
from compile_policy_transformers.tiny import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


class Int8Layer(QuantizedLayer):
    """Quantizes with plain operators, so that no package has to be installed."""

    def __init__(self) -> None:
        super().__init__(nbits=8, residual_length=4)

    def _quantize(self, tensor: Any, axis: Any) -> Any:
        scale = tensor.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor: Any) -> Any:
        return q_tensor[0].to(q_tensor[1].dtype) * q_tensor[1]


class Scaled(DynamicLayer):
    """Takes the largest value of its first states as a scale for all."""

    scale: torch.Tensor | None = None

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        if self.scale is None:
            self.scale = key_states.abs().amax()
        return super().update(key_states / self.scale, value_states)


class Late(DynamicLayer):
    """Marks itself by the length of its first states, which must be those of the caller's."""

    first: int = -1

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        super().lazy_initialization(key_states, value_states)
        self.first = key_states.shape[2]


class Asking(DynamicLayer):
    """Looks at the arguments of attention, which it gets since Transformers 5.24."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("kwargs", {}).get("twice"):
            value_states = value_states + value_states
        return super().update(key_states, value_states)


class Rounded(DynamicLayer):
    """Keeps its states behind a property."""

    @property
    def keys(self) -> Any:
        return self.held

    @keys.setter
    def keys(self, value: Any) -> None:
        self.held = None if value is None else value.round(decimals=1)


class Noted(DynamicCache):
    """Notes each update in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[int] = []

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.noted.append(key_states.shape[2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class Counted(DynamicCache):
    """Counts its updates."""

    count = 0

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class Halved(DynamicCache):
    """Computes with the states by a constant of its own, which a graph can do too."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 0.5

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().update(key_states, value_states * self.factor, layer_idx, *args, **kwargs)


def _of(layer: type, count: int = 2) -> Cache:
    cache = DynamicCache()
    cache.layers, cache.layer_class_to_replicate = [layer() for _ in range(count)], None  # type: ignore[assignment]
    return cache


def _replicating(layer: type) -> Cache:
    cache = DynamicCache()
    cache.layer_class_to_replicate = layer
    return cache


CACHES: dict[str, tuple[Callable[[], Cache], str]] = {
    "quantized": (lambda: _of(Int8Layer), "Int8Layer"),
    "quantized, replicated": (lambda: _replicating(Int8Layer), "Int8Layer"),
    "scaled": (lambda: _of(Scaled), "of states"),
    "late": (lambda: _of(Late), "has to get its tensors from its first states"),
    "behind a property": (lambda: _of(Rounded), "Rounded"),
    "noting": (Noted, "holds a list in noted"),
    "counting": (Counted, "count"),
}


def _state(cache: Any) -> Any:
    """Everything in a cache that eager would leave there, its attributes by name."""
    own = {n: v for n, v in vars(cache).items() if n != "layers"}
    return own, [vars(layer) for layer in cache.layers]


def _assert_same(mine: Any, want: Any) -> None:
    assert type(mine) is type(want)
    if isinstance(want, torch.Tensor):
        torch.testing.assert_close(mine, want)
    elif isinstance(want, dict):
        assert mine.keys() == want.keys()
        for name in want:
            _assert_same(mine[name], want[name])
    elif isinstance(want, (list, tuple)):
        assert len(mine) == len(want)
        for a, b in zip(mine, want, strict=True):
            _assert_same(a, b)
    else:
        assert mine == want


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_that_no_graph_serves_is_left_to_eager(name: str) -> None:
    """Tokens, and every attribute of the cache and its layers, are eager's; the reason names what stands in the way."""
    make, reason = CACHES[name]
    model = tiny_model("llama")
    stock, mine = make(), make()
    want = model.generate(IDS, max_new_tokens=6, past_key_values=stock)
    cp.apply(model, cp.CompilationConfig(backend="eager", cache_dir=False))
    with falls_back(reason):
        got = model.generate(IDS, max_new_tokens=6, past_key_values=mine)
    assert torch.equal(got, want)
    _assert_same(_state(mine), _state(stock))
    (component,) = [c for c in cp.report(model).components if c.role == "decoder"]
    assert (component.calls, component.eager_calls) == (6, 1 if name == "late" else 6)  # filled, it is as any other
    assert reason in str(component.fallback)


def test_a_cache_of_the_users_class_with_constants_is_compiled() -> None:
    """Its own update is part of the graph; another constant is another graph, never the old one."""
    model = tiny_model("llama")
    cp.apply(model, cp.CompilationConfig(backend="eager", cache_dir=False))
    for factor, graphs in ((0.5, 1), (0.25, 2)):
        caches = [Halved(), Halved()]
        for cache in caches:
            cache.factor = factor
        got = model.generate(IDS, max_new_tokens=5, past_key_values=caches[0])
        with cp.eager(model):
            assert torch.equal(got, model.generate(IDS, max_new_tokens=5, past_key_values=caches[1]))
        (component,) = [c for c in cp.report(model).components if c.role == "decoder"]
        assert (component.graphs, component.fallback) == (graphs, None)


@pytest.mark.parametrize("layer", [Int8Layer, Scaled, Late, Asking])
def test_lazy_layers_are_asked_on_copies(layer: type) -> None:
    """The question leaves no trace on the layer; one that only moves states passes it."""
    shapes = [cache_layers.LayerShape(torch.empty(1, 2, 0, 4), torch.empty(1, 2, 0, 4))]
    cache: Any = _of(layer, 1)
    before = copy.deepcopy(vars(cache.layers[0]))
    with pytest.raises(NotCompilable, match=layer.__name__):
        cache_moves.check_lazy(cache, shapes)
    _assert_same(vars(cache.layers[0]), before)
    cache_moves.check_lazy(_of(DynamicLayer, 1), shapes)


def test_offloaded_and_patched_caches_are_refused_before_they_are_touched() -> None:
    """Also the two in the cache of an encoder-decoder; an ordinary one passes."""
    own, cross = DynamicCache(), DynamicCache()
    cache_checks.check(EncoderDecoderCache(own, cross))
    cross.offloading = True
    with pytest.raises(NotCompilable, match="offloaded"):
        cache_checks.check(EncoderDecoderCache(own, cross))
    patched: Any = _of(DynamicLayer)
    patched.layers[1].update = patched.layers[1].update
    with pytest.raises(NotCompilable, match="`update` was replaced"):
        cache_checks.check(patched)
    assert not patched.layers[0].is_initialized
