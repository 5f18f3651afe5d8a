"""Repeated blocks of a graph: found in any model, equal only when they are the same code, never wrong at a border."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compile_policy.ahead import Sizes, lower_ahead
from compile_policy.blocks import BlockSummary
from compile_policy.capture import compile_call
from compile_policy.compiled import CompiledGraph
from compile_policy.events import Event, listening
from compile_policy.lowering import AheadOfTime
from compile_policy.program import Package, Program
from compile_policy.region import Region, RegionOptions, SignatureBinder


class Interpreted(AheadOfTime):
    """Packages whose code is the piece's graph run in Python: what is tested is where it was cut."""

    def program(self, gm: torch.fx.GraphModule, sizes: Sizes = ()) -> tuple[Program, BlockSummary]:
        return lower_ahead(gm, sizes, make=_interpreted)


def _interpreted(gm: torch.fx.GraphModule) -> Package:
    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        results = list(gm(*inputs))
        inputs.clear()
        return results

    return Package(b"", run)


def capture(module: nn.Module, *leaves: torch.Tensor, labels: Any, frequent: Any = None) -> CompiledGraph:
    forward = module.forward

    example = list(leaves)

    def fn(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = forward(*leaves)
        return result if isinstance(result, tuple) else (result,)

    with torch.no_grad():
        return compile_call(fn, example, labels, Interpreted("inductor").for_sizes(frequent or {}))


class Block(nn.Module):
    def __init__(self, width: int = 4, factor: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.factor * torch.tanh(self.linear(x)) * x.shape[0]


class Stack(nn.Module):
    """Something before, blocks, something after."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        for layer in self.layers:
            x = layer(x)
        return x.sin()


N = [("n", None)]


def check(module: nn.Module, graph: CompiledGraph, *shapes: tuple[int, int]) -> None:
    for shape in shapes:
        x = torch.rand(shape)
        assert graph.accepts([x])
        with torch.no_grad():
            torch.testing.assert_close(graph.run([x])[0], module(x))


def test_equal_blocks_are_lowered_once() -> None:
    """Six blocks, one package for all of them, each with its own weights; the spine is two packages more."""
    model = Stack([Block() for _ in range(6)])
    graph = capture(model, torch.rand(3, 4), labels=N)
    assert str(graph.blocks) == "1 distinct block of 6"
    assert graph.program is not None
    assert [s.package for s in graph.program.segments] == [0, 1, 1, 1, 1, 1, 1, 2]
    check(model, graph, (1, 4), (3, 4), (9, 4))


@pytest.mark.parametrize("change", ["constant", "bias", "hook"])
def test_a_block_that_differs_has_its_own_package(change: str) -> None:
    """One other constant, one missing bias or one hook is other code, although class and structure are the same."""
    model = Stack([Block() for _ in range(4)])
    odd = model.layers[2]
    if change == "constant":
        odd.factor = 1.5  # type: ignore[assignment]
    elif change == "bias":
        odd.linear.bias = None  # type: ignore[union-attr]
    else:
        odd.linear.register_forward_hook(lambda m, a, out: out * 2)  # type: ignore[union-attr]
    graph = capture(model, torch.rand(3, 4), labels=N)
    assert str(graph.blocks) == "2 distinct blocks of 4"
    check(model, graph, (3, 4), (1, 4))


class Narrow(Block):
    """Same parameters, another class, other arithmetic."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_kinds_that_take_turns() -> None:
    """Two classes in one list: each kind is found, wherever it stands."""
    model = Stack([Block() if i % 3 else Narrow() for i in range(7)])
    graph = capture(model, torch.rand(3, 4), labels=N)
    assert str(graph.blocks) == "2 distinct blocks of 7"
    check(model, graph, (3, 4), (5, 4))


class Staged(nn.Module):
    """Stages that differ, with blocks inside that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Stack([Block() for _ in range(n)]) for n in (2, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


def test_blocks_inside_stages() -> None:
    """Where the outer list holds nothing equal, the list inside is looked at."""
    model = Staged()
    graph = capture(model, torch.rand(3, 4), labels=N)
    assert str(graph.blocks) == "1 distinct block of 5"
    check(model, graph, (3, 4), (2, 4))


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ([Block()], "no module is repeated"),
        ([Block(factor=1.0), Block(factor=2.0)], "all 2 blocks are different"),
    ],
)
def test_what_has_no_equal_blocks_is_one_package(blocks: list[nn.Module], reason: str) -> None:
    """The reason is on record."""
    model = Stack(blocks)
    graph = capture(model, torch.rand(3, 4), labels=N)
    assert graph.blocks is not None and graph.blocks.reason == reason
    assert graph.program is not None and len(graph.program.packages) == 1
    check(model, graph, (3, 4), (7, 4))


class Sized(nn.Module):
    """Uses a size that none of its tensors has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))

    def forward(self, x: torch.Tensor, size: int) -> torch.Tensor:
        return x * self.weight + size * 2


class SizedStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Sized() for _ in range(3)])

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, other.shape[0] + other.shape[1])
        return x + other.sum()


def test_a_size_from_outside_is_carried_into_the_block() -> None:
    """The tensor that has the size is handed to every block, for its shape alone."""
    model = SizedStack()
    graph = capture(model, torch.rand(3, 4), torch.rand(5, 7), labels=[("n", None), ("k", "m")])
    assert str(graph.blocks) == "1 distinct block of 3"
    for n, k, m in ((3, 5, 7), (1, 2, 9), (4, 4, 4)):
        leaves = [torch.rand(n, 4), torch.rand(k, m)]
        with torch.no_grad():
            torch.testing.assert_close(graph.run(leaves)[0], model(*leaves))


class Writes(nn.Module):
    """Keeps its input in a row of a table that the caller owns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        table.index_copy_(0, torch.arange(x.shape[0]), x)
        return x * self.weight + table.sum(0)


class WritingStack(nn.Module):
    def __init__(self, *, views: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Writes() for _ in range(2)])
        self.views = views

    def forward(self, x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        seen = first[1:] if self.views else first
        x = self.layers[0](x, first)
        x = self.layers[1](x, second)
        return x + seen.sum()


@pytest.mark.parametrize("views", [False, True])
def test_writing_into_an_argument_stays_in_place(views: bool) -> None:
    """A table that a block writes into is the caller's; where a view of it crosses a border, nothing is cut."""
    model = WritingStack(views=views)
    leaves = [torch.rand(3, 4), torch.rand(9, 4), torch.rand(9, 4)]
    graph = capture(model, *(t.clone() for t in leaves), labels=[("n", None), ("t", None), ("t", None)])
    assert graph.blocks is not None and graph.program is not None
    if views:
        assert "written in place" in graph.blocks.reason and len(graph.program.packages) == 1
    else:
        assert str(graph.blocks) == "1 distinct block of 2"
    mine, theirs = ([t.clone() for t in leaves] for _ in range(2))
    with torch.no_grad():
        torch.testing.assert_close(graph.run(mine)[0], model(*theirs))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(mine[1], leaves[1]) and not torch.equal(mine[2], leaves[2])


class Options(RegionOptions):
    def lowering(self) -> Any:
        return Interpreted("inductor")


def test_report_and_event_say_how_the_graph_was_divided() -> None:
    """Two kinds of block out of four, in the words that the tables print; a graph in one piece says nothing."""
    events: list[Event] = []
    reports = []
    for blocks in ([Block(), Narrow(), Block(), Narrow()], [Block()]):
        region = Region(Stack(blocks), role="t", binder=SignatureBinder({"x": {0: None}}), options=Options())
        with listening(events.append), torch.no_grad():
            region(torch.rand(3, 4))
        reports.append(region.report().blocks)
    assert reports == ["2 distinct blocks of 4", None]
    assert [e.data.get("blocks") for e in events if e.kind == "compile_end"] == reports


def test_a_single_row_has_code_of_its_own() -> None:
    """With one row as the frequent size, blocks with linear layers get a second package, which then runs."""
    model = Stack([Block() for _ in range(3)])
    graph = capture(model, torch.rand(3, 4), labels=N, frequent={"n": 1})
    assert graph.program is not None and graph.program.special is not None
    assert graph.program.special.packages == (0, 2, 2, 2, 3)
    check(model, graph, (1, 4), (3, 4), (2, 4))
    assert capture(model, torch.rand(3, 4), labels=N, frequent={"m": 1}).program.special is None  # type: ignore[union-attr]


class Turns(nn.Module):
    """Its result is no contiguous tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).transpose(1, 2)


class Flips(nn.Module):
    """Its result is a view of its argument."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


def _native(module: nn.Module, *leaves: torch.Tensor, labels: Any, frequent: Any = None) -> CompiledGraph:
    def fn(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (module.forward(*leaves),)

    with torch.no_grad():
        return compile_call(fn, list(leaves), labels, AheadOfTime("inductor").for_sizes(frequent or {}))


@pytest.mark.slow
def test_layouts_and_views_cross_borders_between_native_packages() -> None:
    """A package trusts the strides of what it is given: transposed results and views of arguments arrive as traced."""
    model = Stack([Turns(), Turns(), Turns(), Flips(), Flips()])
    graph = _native(model, torch.rand(3, 4, 4), labels=[("n", None, None)])
    assert graph.road == "ahead" and graph.blocks is not None and graph.blocks.instances == 5
    for n in (1, 3, 8):
        x = torch.rand(n, 4, 4)
        with torch.no_grad():
            torch.testing.assert_close(graph.run([x])[0], model(x))


@pytest.mark.slow
def test_native_blocks_write_in_place_and_have_code_for_one_row() -> None:
    """The caller's tables are written, none is replaced, and one row gives what several give."""

    class Both(WritingStack):
        def forward(self, x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return self.after(super().forward(x, first, second))

    model = Both(views=False)
    model.after = nn.Linear(4, 4)
    leaves = [torch.rand(3, 4), torch.rand(9, 4), torch.rand(9, 4)]
    labels = [("n", None), ("t", None), ("t", None)]
    graph = _native(model, *(t.clone() for t in leaves), labels=labels, frequent={"n": 1})
    assert str(graph.blocks) == "1 distinct block of 2"
    assert graph.program is not None and graph.program.special is not None
    for n in (3, 1, 5):
        mine = [torch.rand(n, 4), torch.rand(9, 4), torch.rand(9, 4)]
        theirs, before = ([t.clone() for t in mine] for _ in range(2))
        with torch.no_grad():
            torch.testing.assert_close(graph.run(mine)[0], model(*theirs))
        for a, b, was in zip(mine[1:], theirs[1:], before[1:], strict=True):
            torch.testing.assert_close(a, b)
            assert not torch.equal(a, was)
