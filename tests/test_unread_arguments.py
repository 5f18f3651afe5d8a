"""Arguments that nobody reads set no calls apart and stop no call; one that is read makes a difference, at any time."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from falling import falls_back
from torch import nn
from transformers import DataCollatorWithFlattening

import compile_policy as cp
from compile_policy.decorators import support_torch_compile, use_config
from compile_policy.plan import ComponentReport
from compile_policy.region import region_of
from compile_policy_transformers.tiny import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


class Tool:
    """An object of the user's, such as a tokenizer."""

    scale = 3.0

    def __init__(self, gain: float = 2.0) -> None:
        self.gain = gain

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("nobody may copy it")


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Layer(nn.Module):
    """Hands its arguments on to a part that reads some of them, when asked to."""

    reads = ""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, number: int = 1, **kwargs: Any) -> torch.Tensor:
        return self.part(self.lin(x), number=number, **kwargs)

    def part(self, x: torch.Tensor, number: int = 1, word: str = "", tool: Any = None, **kwargs: Any) -> torch.Tensor:
        if self.reads == "number":
            x = x * number
        if self.reads == "word" and word == "double":
            x = x * 2
        if self.reads == "attribute":
            x = x * tool.gain
        if self.reads == "method":
            x = x * getattr(tool, "scale", 1.0)
        if self.reads == "present" and tool is not None:
            x = x + 1
        if self.reads == "presence" and "extra" in kwargs:
            x = x + 2
        if self.reads == "tensors":
            for value in kwargs.values():
                x = x + value if isinstance(value, torch.Tensor) else x
        return x


def _layer(reads: str = "", backend: str = "eager", cache_dir: Any = False) -> Layer:
    with use_config(cp.CompilationConfig(backend=backend, cache_dir=cache_dir)):
        layer = Layer().eval()
    layer.reads = reads
    return layer


def _report(module: nn.Module) -> ComponentReport:
    region = region_of(module)
    assert region is not None
    return region.report()


def _calls(layer: Layer) -> None:
    """Calls that differ in every argument; each equals eager."""
    for n in (3, 5, 7):
        for word in ("plain", "double"):
            x, given = torch.randn(n, 4), {"number": n, "word": word, "tool": Tool(float(n)), "extra": n}
            with torch.no_grad():
                torch.testing.assert_close(layer(x, **given), layer.forward(x, **given))


@pytest.mark.parametrize(
    ("reads", "graphs"), [("", 1), ("present", 1), ("presence", 1), ("tensors", 1), ("number", 3), ("word", 2)]
)
def test_only_what_is_read_sets_calls_apart(reads: str, graphs: int) -> None:
    """Six calls that differ in a number, a word and an object; whether an argument is there costs no graph here."""
    layer = _layer(reads)
    _calls(layer)
    assert (_report(layer).graphs, _report(layer).eager_calls) == (graphs, 0)


@pytest.mark.parametrize("reads", ["attribute", "method"])
def test_an_object_that_is_read_runs_eager(reads: str) -> None:
    """What an object says cannot be a part of the key: every call is eager's, and the reason names the argument."""
    layer = _layer(reads)
    with falls_back("argument tool is a"):
        _calls(layer)
    report = _report(layer)
    assert report.eager_calls == report.calls == 6 and "argument tool is a" in str(report.fallback)
    assert report.graphs == 1  # one attempt: another object of the class is not tried again


def test_whether_an_argument_is_given_still_counts() -> None:
    """None, an absent argument and one of another class are other calls."""
    layer, x = _layer("present"), torch.randn(3, 4)
    with torch.no_grad():
        for given in ({}, {"tool": None}, {"tool": Tool()}, {"tool": "text"}):
            torch.testing.assert_close(layer(x, **given), layer.forward(x, **given))
    assert _report(layer).eager_calls == 0


def test_a_read_that_comes_later_ends_it() -> None:
    """A patched part and a new setting are another structure, under which the argument is looked at anew."""
    layer = _layer()
    _calls(layer)
    layer.reads = "number"
    _calls(layer)
    layer.reads = ""
    _calls(layer)
    assert (_report(layer).graphs, _report(layer).eager_calls) == (1 + 3, 0)

    def part(x: torch.Tensor, word: str = "", **kwargs: Any) -> torch.Tensor:
        return x * 5 if word == "double" else x

    layer.part = part  # type: ignore[method-assign]
    _calls(layer)
    assert (_report(layer).graphs, _report(layer).eager_calls) == (1 + 3 + 2, 0)


def test_a_word_that_is_only_returned_is_read() -> None:
    """The graph's result holds the caller's word, not the first one's."""

    @support_torch_compile
    class Returns(nn.Module):
        def forward(self, x: torch.Tensor, word: str = "") -> Any:
            return {"x": x + 1, "word": word}

    with use_config(cp.CompilationConfig(backend="eager", cache_dir=False)):
        module = Returns()
    for word in ("a", "b"):
        assert module(torch.zeros(3), word=word)["word"] == word
    assert _report(module).eager_calls == 0


def test_nothing_is_kept_of_an_object() -> None:
    """It is free as soon as its caller lets it go."""
    layer, tool = _layer(), Tool()
    layer(torch.randn(3, 4), tool=tool)
    gone = weakref.ref(tool)
    del tool
    gc.collect()
    assert gone() is None and _report(layer).graphs == 1


def test_the_store_finds_an_entry_by_what_it_reads(tmp_path: Path) -> None:
    """On the default road: another number loads where none reads it, and compiles where one does."""
    x = torch.randn(3, 4)
    for reads, number, graphs in (("", 5, 1), ("", 6, 0), ("number", 5, 1), ("number", 6, 1), ("number", 5, 0)):
        layer = _layer(reads, "inductor", str(tmp_path))
        with torch.no_grad():
            torch.testing.assert_close(layer(x, number=number), layer.forward(x, number=number))
        assert (_report(layer).graphs, _report(layer).loaded) == (graphs, 1 - graphs), (reads, number)


def test_padding_free_batches_and_counts_are_one_graph() -> None:
    """Lengths and counts that a trainer hands to the decoder, which does not read them."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    generator = torch.Generator().manual_seed(0)
    batches: list[dict[str, Any]] = []
    for lengths in ((3, 9, 4), (6, 5, 11), (12, 3, 7)):
        rows = [torch.randint(5, 200, (n,), generator=generator).tolist() for n in lengths]
        batches.append(collate([{"input_ids": row} for row in rows]))
    counted = [{"input_ids": IDS, "labels": IDS, "num_items_in_batch": n} for n in (10, 11, 12)]
    for calls in (batches, counted):
        model = tiny_model("llama")
        want = [model(**call).loss.item() for call in calls]
        cp.apply(model, cp.CompilationConfig(backend="eager", cache_dir=False))
        got = [model(**call).loss.item() for call in calls]
        assert got == pytest.approx(want, abs=1e-4)
        (decoder,) = [c for c in cp.report(model).components if c.role == "decoder"]
        assert (decoder.graphs, decoder.eager_calls) == (1, 0)


def test_generate_with_an_object_of_the_users() -> None:
    """As ``generate(tokenizer=...)`` and a server do it: one graph, short road included, for every object."""
    model = tiny_model("llama")
    want = model.generate(IDS, max_new_tokens=6, do_sample=False)
    cp.apply(model, cp.CompilationConfig(backend="eager", cache_dir=False))
    for _ in range(2):
        got = model.model(IDS, use_cache=True, processor=Tool())
        assert torch.equal(got.last_hidden_state, model.model.forward(IDS).last_hidden_state)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False, tokenizer=Tool()), want)
    (decoder,) = [c for c in cp.report(model).components if c.role == "decoder"]
    assert decoder.eager_calls == 0 and decoder.graphs <= 2
