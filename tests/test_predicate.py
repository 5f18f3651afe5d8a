"""Conditions on sizes: what a graph assumed, evaluated on the sizes of a call."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import sympy
import torch
from falling import falls_back
from torch import nn

from compile_policy.predicate import ShapeConditions, _asks_for_one
from compile_policy.region import Region, RegionOptions, SignatureBinder


def shapes(*sizes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.empty(s, device="meta") for s in sizes]


def test_no_condition_accepts_every_call() -> None:
    """A graph that assumed nothing holds for every size."""
    accepts = ShapeConditions([])
    assert accepts(shapes((0,), (5, 5))) and accepts.failing(shapes((3,))) == []


def test_every_condition_must_hold_and_the_failing_ones_are_told() -> None:
    """Conditions are a conjunction, in a form that people can read; repeated ones are kept once."""
    accepts = ShapeConditions(["s[0][0] == s[1][0]", "s[0][1] >= 2", "s[0][0] == s[1][0]"])
    assert accepts.conditions == ("s[0][0] == s[1][0]", "s[0][1] >= 2")
    assert accepts(shapes((3, 2), (3,)))
    assert not accepts(shapes((3, 2), (4,))) and not accepts(shapes((3, 1), (3,)))
    assert accepts.failing(shapes((3, 1), (4,))) == ["s[0][0] == s[1][0]", "s[0][1] >= 2"]


class Halves(nn.Module):
    """Splits at half: assumes an even length."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.view(2, -1, x.shape[1])
        return a + b


class Branches(nn.Module):
    """Does something else beyond eight rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] <= 8 else x * 3


class Pads(nn.Module):
    """Sizes under max, min and floor division."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        rows = max(x.shape[0], y.shape[0])
        return x.new_zeros(rows // 2, 2) + min(x.shape[0], y.shape[0])


class Blocks(nn.Module):
    """Pads to whole blocks of four, counted by a true division."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        missing = 4 * math.ceil(x.shape[0] / 4) - x.shape[0]
        return nn.functional.pad(x, (0, 0, 0, missing)) if missing > 0 else x * 2


def region(module: nn.Module, **dims: int) -> Region:
    return Region(module, role="t", binder=SignatureBinder({n: {d: None} for n, d in dims.items()}), options=_EAGER)


_EAGER = RegionOptions("eager")


def test_a_size_branch_is_never_taken_wrongly() -> None:
    """The branch taken in the trace becomes a condition; calls on the other side get a graph of their own."""
    ours = region(Branches(), x=0)
    for n in (2, 8, 9, 3, 30, 0, 1):
        x = torch.ones(n, 2)
        assert torch.equal(ours(x), Branches()(x)), n
    assert ours.graphs == 2 and ours.fallback is None
    (entries,) = ours.entries.values()
    assert [e.graph.accepts([torch.ones(8, 2)]) for e in entries] == [True, False]
    assert [e.graph.accepts([torch.ones(9, 2)]) for e in entries] == [False, True]


def test_conditions_are_what_keeps_the_branch_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: with the conditions ignored, the same calls do give a wrong number."""
    monkeypatch.setattr(ShapeConditions, "__call__", lambda self, leaves: True)
    ours = region(Branches(), x=0)
    ours(torch.ones(2, 2))
    assert not torch.equal(ours(torch.ones(9, 2)), Branches()(torch.ones(9, 2)))


def test_divisibility_is_a_condition() -> None:
    """A component that splits in halves runs compiled for even sizes, and raises its own error for odd ones."""
    ours = region(Halves(), x=0)
    for n in (4, 2, 10):
        x = torch.rand(n, 3)
        assert torch.equal(ours(x), Halves()(x))
    assert ours.fallback is None
    graphs = ours.graphs
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        ours(torch.rand(5, 3))
    assert torch.equal(ours(torch.ones(6, 3)), torch.full((3, 3), 2.0))
    assert ours.graphs == graphs, "a call that cannot be right is not traced"


def test_max_min_and_floor_division_of_sizes() -> None:
    """Relations with max, min and // are evaluated as Python would."""
    ours = region(Pads(), x=0, y=0)
    for a, b in [(4, 6), (6, 4), (5, 5), (2, 9), (9, 2)]:
        x, y = torch.ones(a, 2), torch.ones(b, 2)
        assert torch.equal(ours(x, y), Pads()(x, y)), (a, b)


def test_rounding_of_a_true_division_of_sizes() -> None:
    """Relations with `math.ceil` are evaluated as Python would."""
    ours = region(Blocks(), x=0)
    for rows in (5, 9, 8, 12, 6):
        x = torch.rand(rows, 2)
        assert torch.equal(ours(x), Blocks()(x)), rows
    assert ours.eager_calls == 0
    assert any("math.ceil" in c for found in ours.entries.values() for e in found for c in e.graph.accepts.conditions)


class Scaled(nn.Module):
    """A scale that is made of a size, as a channel attention has it; an operator takes it as a number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x[None, None]
        return nn.functional.scaled_dot_product_attention(q, q, q, scale=x.shape[0] ** -0.5)[0, 0]


def test_a_power_of_a_size_is_evaluated_as_a_number() -> None:
    """Where a scale is fixed to one size, another size is told from it and gets its own graph; nothing raises."""
    ours = region(Scaled(), x=0)
    for rows in (4, 9, 4):
        x = torch.rand(rows, 2)
        assert torch.allclose(ours(x), Scaled()(x), atol=1e-6), rows
    assert ours.eager_calls == 0
    said = [c for found in ours.entries.values() for e in found for c in e.graph.accepts.conditions]
    assert any("float(" in c for c in said) and not any("torch" in c for c in said)


def test_static_sizes_are_conditions_too() -> None:
    """A dim without a label holds for the traced size only."""
    ours = region(Branches(), x=0)
    ours(torch.ones(4, 2))
    (entry,) = next(iter(ours.entries.values()))
    assert entry.graph.accepts(shapes((4, 2))) and not entry.graph.accepts(shapes((4, 3)))


class Disagrees(nn.Module):
    """Returns what no graph can return when its sizes differ."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return x + y if x.shape[0] == y.shape[0] else 3


def test_a_verdict_on_unequal_sizes_says_nothing_of_equal_ones() -> None:
    """Which sizes are equal belongs to a verdict: after a refused call with others, the good one is compiled."""
    ours = region(Disagrees(), x=0, y=0)
    with falls_back("returns a int"):
        for _ in range(2):
            assert ours(torch.ones(3), torch.ones(5)) == 3
    assert torch.equal(ours(torch.ones(4), torch.ones(4)), torch.full((4,), 2.0))
    assert (ours.entry_count(), ours.eager_calls) == (1, 2)


class _Assigns(nn.Module):
    """Writes its input into a part of a tensor; ``minds``: another value where it has one row."""

    def __init__(self, minds: bool) -> None:
        super().__init__()
        self.minds = minds
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x.transpose(1, 2)).transpose(1, 2)
        out = x.new_zeros(x.shape[0], 4, x.shape[2] + 1)
        end = min(x.shape[2], 90)
        if self.minds:
            out[:, :, :end] = x if x.shape[0] != 1 else -x
        else:
            out[:, :, :end] = x
        return out


@pytest.mark.parametrize("minds", [False, True])
def test_one_row_shares_the_graph_where_it_is_computed_alike(minds: bool) -> None:
    """Assigning and multiplying one row needs no graph of its own, a branch on it does."""
    module = _Assigns(minds)
    binder = SignatureBinder({"x": {0: "rows", 2: "columns"}})
    region = Region(module, role="m", binder=binder, options=RegionOptions(backend="eager"))
    with torch.no_grad():
        for rows in (3, 1, 2):
            x = torch.randn(rows, 4, 5)
            torch.testing.assert_close(region(x), module(x))
    assert (region.graphs, region.eager_calls) == (2 if minds else 1, 0)


class _Heads(nn.Module):
    """Puts heads beside one another and normalises each; ``minds``: another value where there is one row of them.

    What matters is asked behind a product that has asked the same thing for its layout: Dynamo notes a relation once.
    """

    def __init__(self, minds: bool) -> None:
        super().__init__()
        self.minds = minds
        self.norm = nn.RMSNorm(4, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = torch.matmul(x, x.transpose(-1, -2) @ x)
        if self.minds and 4 * x.shape[2] != 4:
            heads = -heads
        heads = heads.permute(0, 2, 1, 3).contiguous()
        return self.norm(heads - heads.mean(2, keepdim=True)).flatten(2)


@pytest.mark.parametrize("minds", [False, True])
def test_questions_of_layout_are_no_branches(minds: bool) -> None:
    """A copy and a normalisation ask for sizes of 1 in ways of their own (4 * s != 4, s > 1), for the layout alone."""
    module = _Heads(minds)
    binder = SignatureBinder({"x": {0: "batch", 2: "rows"}})
    region = Region(module, role="m", binder=binder, options=RegionOptions(backend="eager"))
    with torch.no_grad():
        for batch, rows in ((2, 3), (2, 1), (1, 5), (1, 1)):
            x = torch.randn(batch, 3, rows, 4)
            torch.testing.assert_close(region(x), module(x))
    assert (region.graphs, region.eager_calls) == (2 if minds else 1, 0)


@pytest.mark.parametrize(
    ("relation", "asks"),
    [("16*s != 16", True), ("s > 1", True), ("1 < s*t", False), ("s + t != 1", False), ("s > 8", False)],
)
def test_what_asks_for_a_size_of_one(relation: str, asks: bool) -> None:
    left, sign, right = re.split(r" (!=|>|<) ", relation)
    made = {"!=": sympy.Ne, ">": sympy.Gt, "<": sympy.Lt}[sign]
    names = {name: sympy.Symbol(name, positive=True, integer=True) for name in "st"}
    assert _asks_for_one(made(sympy.sympify(left, names), sympy.sympify(right, names))) is asks


class _AsksAgain(nn.Module):
    """A product asks for a size of 1, which says nothing of the result; the branch behind it is then known already."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = torch.matmul(x, x.transpose(-1, -2) @ x)
        return -product if x.shape[1] != 1 else product


def test_a_branch_that_a_harmless_question_decided() -> None:
    """The first call of a size that the trace was told does not occur is compared with eager, and has its own graph."""
    module = _AsksAgain()
    binder = SignatureBinder({"x": {0: "batch", 1: "rows"}})
    region = Region(module, role="m", binder=binder, options=RegionOptions(backend="eager"))
    with torch.no_grad():
        for batch, rows in ((2, 3), (2, 1), (1, 5), (1, 1), (4, 1)):
            x = torch.randn(batch, rows, 4)
            torch.testing.assert_close(region(x), module(x))
    assert (region.graphs, region.eager_calls) == (2, 0)


class _Inverts(nn.Module):
    """Sorts rows and brings them back, as layers of experts do; ``minds``: another value for one row."""

    def __init__(self, minds: bool) -> None:
        super().__init__()
        self.minds = minds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = x[:, 0].argsort()
        back = torch.empty_like(order)
        back[order] = torch.arange(order.size(0), device=x.device)
        out = (x[order] * 2)[back]
        return -out if self.minds and x.shape[0] == 1 else out


@pytest.mark.parametrize("minds", [False, True])
def test_numbering_one_row_needs_no_graph_of_its_own(minds: bool) -> None:
    """Unless the code asks for one row besides, which tracing does not tell apart: the first such call does."""
    module = _Inverts(minds)
    region = Region(module, role="m", binder=SignatureBinder({"x": {0: "rows"}}), options=RegionOptions("eager"))
    with torch.no_grad():
        for rows in (3, 1, 2, 1):
            x = torch.randn(rows, 4)
            assert torch.equal(region(x), module.forward(x))
    assert (region.graphs, region.eager_calls) == (2 if minds else 1, 0)


class _Squeezes(nn.Module):
    """Drops dims of size 1: the first, some, or any."""

    def __init__(self, *dims: Any) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.squeeze(x * 2, *self.dims) + 0 * x.exp().squeeze(*self.dims)


@pytest.mark.parametrize("dims", [(0,), ((0, 1),), ()])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_squeezed_size_of_one_needs_a_graph_of_its_own(dims: Any, backend: str) -> None:
    """Tracing takes no size for 1 and notes nothing where ``squeeze`` asks: the condition is ours."""
    module = _Squeezes(*dims)
    region = Region(module, role="m", binder=SignatureBinder({"x": {0: None}}), options=RegionOptions(backend=backend))
    with torch.no_grad():
        for rows in (3, 1, 2):
            x = torch.randn(rows, 4, 5)
            got, want = region(x), module.forward(x)
            assert got.shape == want.shape
            torch.testing.assert_close(got, want)
    assert (region.entry_count(), region.eager_calls) == (2, 0)
