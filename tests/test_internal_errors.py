"""A mistake of this package at any place of a call runs that call eager, says so, and asks to report it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from falling import falls_back
from torch import nn

from compile_policy import CompilationConfig, apply, entries, proof
from compile_policy.applied import regions
from compile_policy.entry import kept, restore
from compile_policy.errors import CompileFault, InternalError, PolicyWarning
from compile_policy.failure import of_this_package
from compile_policy.region import Region
from compile_policy.saving import Place, Shelf
from compile_policy_transformers import tiny_inputs, tiny_model
from compile_policy_transformers.caches import CacheCall, _CacheAdapter
from compile_policy_transformers.decoder import DecoderBinder
from compile_policy_transformers.repeat import Step


def _broken(*_: Any, **__: Any) -> Any:
    """What an unforeseen input does to code: a mistake in the middle."""
    return {}["nothing"]


# As if the line stood in a file of the package, which is what the reason is about.
_ours: dict[str, Any] = {"__name__": "compile_policy.broken"}
exec(compile("def broken(*_, **__):\n    return {}['nothing']", entries.__file__, "exec"), _ours)
broken: Callable[..., Any] = _ours["broken"]

PLACES: dict[str, tuple[Any, str, str]] = {
    "form": (DecoderBinder, "form", "the form of the call was looked at"),
    "binding": (DecoderBinder, "bind", "the call was made canonical"),
    "key": (_CacheAdapter, "flatten", "the call was made canonical"),
    "lookup": (Region, "find", "an entry was looked for"),
    "compile": (entries, "build_entry", "the component was compiled"),
    "proof": (proof, "_compared", "a result was compared with eager's"),
}


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_the_call_runs_eager(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of eager, one warning that names the component and what was done, and no exception."""
    model = tiny_model("llama")
    inputs = tiny_inputs(model, text_len=5)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want = model.generate(**inputs, **options)
    apply(model, CompilationConfig(backend="eager"))
    owner, name, doing = PLACES[place]
    monkeypatch.setattr(owner, name, broken)
    with falls_back(f"internal error of compile-policy while {doing}: KeyError: 'nothing'"):
        got = model.generate(**inputs, **options)
    assert torch.equal(got, want)
    (region,) = regions(model)
    assert region.eager_calls == region.calls == 4 and (place == "proof" or "Please report this" in region.remedy)
    monkeypatch.undo()
    apply(model, CompilationConfig(backend="eager"))
    model.generate(**inputs, **options)  # the control
    assert regions(model)[0].report().state == "compiled"


@torch.no_grad()
def test_it_is_raised_where_faults_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """``on_fault="error"``, with the mistake itself as cause."""
    model = tiny_model("llama")
    apply(model, CompilationConfig(backend="eager", on_fault="error"))
    monkeypatch.setattr(DecoderBinder, "form", broken)
    with pytest.raises(CompileFault, match="decoder model: internal error of compile-policy") as raised:
        model(**tiny_inputs(model, text_len=5))
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize("where", ["recognised", "remembered"])
@torch.no_grad()
def test_a_step_that_is_not_recognised_takes_the_ordinary_road(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call stays compiled; the mistake is told once."""
    model = tiny_model("llama")
    inputs = tiny_inputs(model, text_len=5)
    apply(model, CompilationConfig(backend="eager"))
    monkeypatch.setattr(DecoderBinder, "step" if where == "recognised" else "ran", broken)
    with pytest.warns(PolicyWarning, match=f"while a decode step was {where}: KeyError") as told:
        model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert len(told) == 1
    (region,) = regions(model)
    assert (region.report().state, region.calls, region.eager_calls) == ("compiled", 4, 0)


@torch.no_grad()
def test_states_that_cannot_be_written_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the layers have their new states when the next one fails: the cache is as before, and eager goes on."""
    model = tiny_model("llama")
    inputs = tiny_inputs(model, text_len=5)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want = model.generate(**inputs, **options)
    apply(model, CompilationConfig(backend="eager"))
    stock = _CacheAdapter.write_back

    def half(self: Any, spec: Any, value: CacheCall, state: list[torch.Tensor]) -> None:
        stock(self, spec, value, state[: len(state) // 2])

    monkeypatch.setattr(_CacheAdapter, "write_back", half)
    with falls_back("StopIteration"):
        got = model.generate(**inputs, **options)
    assert torch.equal(got, want) and regions(model)[0].eager_calls == 4


@torch.no_grad()
def test_a_step_whose_graph_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was written yet, so the call takes the ordinary road; a graph that fails there too runs eager."""
    model = tiny_model("llama")
    inputs = tiny_inputs(model, text_len=5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = model.generate(**inputs, **options)
    apply(model, CompilationConfig(backend="eager"))
    assert torch.equal(model.generate(**inputs, **options), want)
    (region,) = regions(model)
    (entry,) = [e for found in region.entries.values() for e in found]
    right, steps = entry.graph.code, []

    def failing(*leaves: Any) -> Any:
        if len(steps) == 3:
            raise RuntimeError("device lost")
        return right(*leaves)

    run = Step.run
    monkeypatch.setattr(Step, "run", lambda self: (steps.append(1), run(self))[1])
    monkeypatch.setattr(entry.graph, "code", failing)
    with falls_back("the compiled graph failed with RuntimeError: device lost"):
        got = model.generate(**inputs, **options)
    assert torch.equal(got, want) and region.eager_calls > 0


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.mark.slow
@pytest.mark.parametrize("what", [(Shelf, "place"), (Place, "load"), (Place, "save")], ids=lambda w: w[1])
def test_a_store_that_fails_stops_no_call(what: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake around the store is told; the component is compiled all the same."""
    model = tiny_model("llama")
    apply(model)
    monkeypatch.setattr(*what, broken)
    with torch.no_grad(), pytest.warns(PolicyWarning, match="internal error of compile-policy while"):
        model(**tiny_inputs(model, text_len=5))
    (region,) = regions(model)
    assert (region.report().state, region.graphs, region.eager_calls) == ("compiled", 1, 0)


def test_whose_mistake_it_is() -> None:
    """By the file that raised: this package's; the model's, torch's and the system's are not."""
    for function, ours in ((broken, True), (_broken, False), (lambda: torch.ones(2) @ torch.ones(3), False)):
        with pytest.raises(Exception) as raised:
            function()
        assert of_this_package(raised.value) == ours
    assert "internal error of compile-policy while x: ValueError: y" in InternalError("x", ValueError("y")).reason


def test_attributes_of_arguments_are_restored() -> None:
    """Objects in lists of objects too; tensors are neither copied nor looked into."""

    class Layer:
        def __init__(self) -> None:
            self.keys = torch.ones(2)

    class Cache:
        def __init__(self) -> None:
            self.layers, self.seen = [Layer(), Layer()], 0

    cache = Cache()
    keys, before = cache.layers[1].keys, kept([cache])
    cache.layers[1].keys, cache.seen, cache.layers[0].more = torch.zeros(3), 5, 1  # type: ignore[attr-defined]
    restore(before)
    assert cache.layers[1].keys is keys and cache.seen == 0 and not hasattr(cache.layers[0], "more")
