"""Remedies that a fallback names, followed as a user would: what ran eager with a warning is then compiled, and equal.

`test_reasons` holds what is said; here it is tried.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaMLP

from compile_policy import CompilationConfig
from compile_policy.applied import apply, remove, report
from compile_policy.events import Event, listening
from compile_policy.layers import replace_layers_
from compile_policy_transformers.tiny import tiny_inputs, tiny_model


class Branching(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.abs().max() > 2.0:
            x = x * 0.5
        return super().forward(x)


class Masked(Branching):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return LlamaMLP.forward(self, torch.where(x.abs().max() > 2.0, x * 0.5, x))


class Looking(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sys._getframe()
        return super().forward(x)


class LookingEagerOnly(Looking):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            sys._getframe()
        return LlamaMLP.forward(self, x)


class NotLooking(Looking):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return LlamaMLP.forward(self, x)


def _ran(
    model: PreTrainedModel, cache: Callable[[], Cache] | None = None, **options: Any
) -> tuple[bool, bool, list[Event]]:
    """Whether the call was compiled, whether it was equal to eager, and what was told of falling back."""
    torch._dynamo.reset()
    inputs = {**tiny_inputs(model, text_len=9, batch=2), **options}
    told: list[Event] = []

    def call() -> torch.Tensor:
        given = {} if cache is None else {"past_key_values": cache()}
        logits: torch.Tensor = model(**inputs, **given).logits[:, -1]
        return logits

    with torch.no_grad(), listening(told.append), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = call()
        apply(model, CompilationConfig(backend="eager"))
        try:
            got = call()
            (row,) = [c for c in report(model).components if c.role == "decoder"]
        finally:
            remove(model)
    equal = torch.allclose(got, expected, atol=1e-5)
    return row.graphs == 1 and row.eager_calls == 0, equal, [e for e in told if e.kind == "fallback"]


def _remedy(model: PreTrainedModel, **options: Any) -> str:
    compiled, equal, told = _ran(model, **options)
    assert not compiled and equal and told
    return str(told[0].data["remedy"])


@pytest.mark.parametrize(
    ("cls", "instead", "words"),
    [
        (Branching, Masked, "Write it with torch.where"),
        (Looking, LookingEagerOnly, "behind `if not torch.compiler.is_compiling()`"),
        (Looking, NotLooking, "replace Looking by a subclass that does without (compile_policy.layers.override"),
    ],
)
def test_a_layer_that_cannot_be_traced_is_replaced(cls: type, instead: type, words: str) -> None:
    model = tiny_model("llama")
    replace_layers_(model, {LlamaMLP: cls})
    assert words in _remedy(model)
    replace_layers_(model, {cls: instead})
    assert _ran(model) == (True, True, [])


def test_an_operator_without_a_fake_gets_one() -> None:
    library = torch.library.Library("remedies", "DEF")
    library.define("half(Tensor x) -> Tensor")
    library.impl("half", lambda x: x * 0.5, "CPU")

    class Halving(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.ops.remedies.half(x))

    model = tiny_model("llama")
    replace_layers_(model, {LlamaMLP: Halving})
    assert "torch.library.register_fake('remedies.half')" in _remedy(model)
    torch.library.register_fake("remedies::half", torch.empty_like, lib=library)
    assert _ran(model) == (True, True, [])


class OddLayer(DynamicLayer):
    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(*args, **kwargs)
        return keys * 1.5, values


def _of_odd_layers() -> Cache:
    cache = DynamicCache()
    cache.layer_class_to_replicate = OddLayer
    return cache


def test_a_cache_that_no_graph_serves() -> None:
    """Another cache, or none."""
    model = tiny_model("llama")
    assert "Give a cache whose layers are Transformers' own" in _remedy(model, cache=_of_odd_layers)
    assert _ran(model, cache=DynamicCache) == (True, True, [])
    assert _ran(model, use_cache=False) == (True, True, [])
