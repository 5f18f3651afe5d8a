"""What runs eager says why: the model's own line, a true cause, and a remedy."""

from __future__ import annotations

import linecache
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from calling_decoders import CallsAmong, RemembersAmong, model_with
from falling import falls_back
from torch import nn
from transformers.cache_utils import DynamicLayer

from compile_policy.applied import apply
from compile_policy.config import CompilationConfig
from compile_policy.events import Event, listening
from compile_policy.failure import place_in
from compile_policy.options import RegionOptions
from compile_policy.region import Region, SignatureBinder
from compile_policy_transformers.base import find_components
from compile_policy_transformers.cache_layers import unknown
from compile_policy_transformers.matrix import Cell, _cells, _place
from compile_policy_transformers.matrix_requests import prompts_of
from compile_policy_transformers.tiny import tiny_model


def _cell(model_type: str, kind: str, requests: int = 1) -> Cell:
    model = tiny_model(model_type)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return _cells(model, prompts_of(model)[:requests], kind, {"decoder": ("decoder",)})["decoder"]


def _code(place: str) -> str:
    """The line of a Transformers model, or of this file, that a place in a text names."""
    found = re.search(r"(\w+)\.py:(\d+)", place)
    assert found, place
    file = next(m.__file__ for n, m in list(sys.modules.items()) if n.split(".")[-1] == found[1])
    assert file
    return linecache.getline(file, int(found[2]))


def _decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


class Bag:
    pass


class ReturnsMore(nn.Module):
    @_decorated
    def forward(self, x: torch.Tensor, more: Any = None) -> Any:
        if more:
            return x
        return x + 1, Bag()


def test_places_in_a_function() -> None:
    """The first or last line with a text; where the function begins, behind its decorators, if there is none."""
    forward = ReturnsMore.forward
    assert _code(place_in(forward, "return")).strip() == "return x"
    assert _code(place_in(forward, "return", last=True)).strip() == "return x + 1, Bag()"
    assert _code(place_in(forward, "nowhere")).lstrip().startswith("def forward")
    assert place_in(len, "return") == ""


def test_a_result_that_no_graph_returns() -> None:
    """The class, its return and a remedy are named."""
    region = Region(
        ReturnsMore(), role="decoder", binder=SignatureBinder({"x": {0: None}}), options=RegionOptions("eager")
    )
    region.attach()
    with falls_back("ReturnsMore.forward returns a Bag"):
        region.module(torch.ones(3))
    assert "ReturnsMore.forward returns a Bag" in region.fallback and "Bag()" in _code(region.fallback)


def test_a_tower_among_the_layers() -> None:
    """The line that calls the tower is named."""
    decoder = next(f for f in find_components(model_with(CallsAmong)) if f.role == "decoder")
    assert "self.eye(" in _code(decoder.obstacle)


def test_a_decoder_behind_its_embeddings() -> None:
    """git's decoder is called with hidden states, under that name: one graph."""
    cell = _cell("git", "dynamic", 2)
    assert (cell.state, cell.graphs, cell.eager_calls) == ("ok", 1, 0), cell


def test_a_model_inside_the_decoder() -> None:
    """The model's own line is named, not that of Transformers' hook."""
    told: list[Event] = []
    model = model_with(RemembersAmong)
    with listening(told.append), torch.no_grad():
        apply(model, CompilationConfig(backend="eager"))
        with falls_back("before this line a model inside was called"):
            model(input_ids=torch.arange(8, 14)[None], use_cache=False)
    (event,) = [e for e in told if e.kind == "fallback"]
    assert "before this line a model inside was called" in event.data["reason"], event
    assert "in subclasses of both" in event.data["remedy"]
    assert event.data["file"].endswith("modeling_llama.py")


def test_the_place_of_an_argument() -> None:
    """An argument that no graph takes is looked up in the signature; a line that the reason names is not repeated."""

    def place(reason: str, **data: Any) -> str:
        return _place(Event("fallback", "decoder", "", {"reason": reason, **data}), ReturnsMore())

    assert "more: Any" in _code(place("argument more['x'] is a Bag"))
    assert _code(place("no reason")).lstrip().startswith("def forward")
    assert place("returns (m.py:3)") == "" and place("r", file="/a/b.py", line=7) == "b.py:7"


class Remainder(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] % 4 > 0:
            return x + 1
        return x * 2


def test_another_graph_for_other_sizes() -> None:
    """The line that divides the sizes is named."""
    told: list[Event] = []
    binder, options = SignatureBinder({"x": {0: None}}), RegionOptions("eager")
    region = Region(Remainder(), role="decoder", binder=binder, options=options)
    region.attach()
    with listening(told.append):
        for n in (7, 8, 9, 12):
            region.module(torch.ones(n))
    [difference] = [e.data["difference"] for e in told if e.kind == "new_entry"]
    assert region.graphs == 2 and "% 4 > 0" in _code(difference), difference


def test_layers_of_a_cache_that_are_not_known() -> None:
    class Own(DynamicLayer):
        pass

    why = unknown(Own)
    assert "class Own" in _code(why.reason) and "use_cache=False" in why.remedy
