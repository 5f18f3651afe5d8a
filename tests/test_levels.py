"""What each level compiles: packages counted, results equal, what runs as captured written and read again."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule, symbolic_trace

from compile_policy import CompilationConfig
from compile_policy.ahead import Sizes, lower_ahead
from compile_policy.blocks import BlockSummary
from compile_policy.captured import FIRST_LINE, NotWritable, runner, written
from compile_policy.events import Event, listening
from compile_policy.lowering import AheadOfTime
from compile_policy.options import RegionOptions
from compile_policy.program import Package, Program
from compile_policy.region import Region, SignatureBinder


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x)) * table


class Stack(nn.Module):
    """Something before, blocks, something after."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(count))
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(x.shape[0], dtype=torch.float32, device=x.device)
        table = torch.cat((rows[..., None].cos(), rows[:, None].sin()), dim=-1).repeat(1, 2)[: x.shape[0]]
        x = x * 2
        for layer in self.layers:
            x = layer(x, table)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (x * self.scale).to(torch.float32).view(x.shape[0], -1)


class Counting(AheadOfTime):
    """Native packages whose code is the piece's graph run in Python: what is counted is how many there are."""

    made: list[GraphModule]

    def program(self, gm: GraphModule, sizes: Sizes = ()) -> tuple[Program, BlockSummary]:
        def make(piece: GraphModule) -> Package:
            self.made.append(piece)
            return Package(b"", lambda inputs: list(piece(*inputs)))

        return lower_ahead(gm, sizes, flat=self.autotune, blocks_only=self.blocks_only, make=make)


class Options(RegionOptions):
    def lowering(self) -> Any:
        lowering = Counting("inductor", autotune=self.autotune, blocks_only=self.blocks_only)
        lowering.made = made
        return lowering


made: list[GraphModule] = []


def compiled(module: nn.Module, mode: int) -> tuple[Region, int]:
    """A region that has answered, and how many packages were compiled for it."""
    made.clear()
    options = Options.from_config(CompilationConfig(mode=mode))
    region = Region(module, role="t", binder=SignatureBinder({"x": {0: None}}), options=options)
    with torch.no_grad():
        for rows in (3, 5, 1):
            x = torch.rand(rows, 4)
            torch.testing.assert_close(region(x), module(x))
    assert (region.graphs, region.eager_calls) == (1, 0), region.fallback
    return region, len(made)


@pytest.mark.parametrize(
    ("mode", "packages", "said"),
    [
        (1, 1, "1 distinct block of 5, the rest as captured"),
        (2, 3, "1 distinct block of 5"),
        (3, 1, None),
    ],
)
def test_what_a_level_compiles(mode: int, packages: int, said: str | None) -> None:
    events: list[Event] = []
    with listening(events.append):
        region, count = compiled(Stack(5), mode)
    assert count == packages and region.report().blocks == said
    assert [e.data.get("blocks") for e in events if e.kind == "compile_end"] == [said]


def test_without_blocks_the_whole_is_compiled_and_that_is_said() -> None:
    region, count = compiled(Stack(1), 1)
    assert count == 1
    assert region.report().blocks == "one package: no module is repeated, so -O1 compiles it whole"


def test_a_program_of_blocks_alone_travels() -> None:
    """What was captured is data, and runs the same when read again."""
    module = Stack(5)
    region, _ = compiled(module, 1)
    (entry,) = [e for found in region.entries.values() for e in found]
    program = entry.graph.program
    assert program is not None
    again = [Package.load(p.data) if p.data else p for p in program.packages]
    assert sum(bool(p.data) for p in again) == 2
    read = Program.from_dict(json.loads(json.dumps(program.to_dict())), again)
    x = torch.rand(7, 4)
    with torch.no_grad():
        (result,) = read.run([*entry.graph.bound, x])
        assert torch.equal(result, program.run([*entry.graph.bound, x])[0])
        torch.testing.assert_close(result, module(x))


def test_levels_do_not_share_what_is_on_disk() -> None:
    keys = [RegionOptions.from_config(CompilationConfig(mode=mode)).lowered() for mode in (1, 2, 3)]
    assert all(keys[i] != keys[j] for i in range(3) for j in range(i))


def test_every_kind_of_argument_is_spelled() -> None:
    class Kinds(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
            y = x[1:, ..., None].to(torch.float64).to("cpu").permute((0, 2, 1))
            n = torch.ops.aten.sym_size.int(x, 0)
            z = torch.zeros([n, 2], dtype=torch.int64, layout=torch.strided)
            return y, z, torch.nn.functional.pad(x, [1, 0], value=float("-inf")), x.new_full((n,), True), x

    gm = symbolic_trace(Kinds())
    x = torch.rand(3, 4)
    results = runner(written(gm))([x])
    assert len(results) == 5 and results[4] is x
    for mine, its in zip(results, gm(x), strict=True):
        assert mine.dtype == its.dtype and torch.equal(mine, its)


def home_made(x: torch.Tensor) -> torch.Tensor:
    return x


def test_what_has_no_name_is_not_written() -> None:
    for target in (home_made, torch.load, eval, print):
        graph = Graph()
        graph.output((graph.call_function(target, (graph.placeholder("x"),)),))
        with pytest.raises(NotWritable):
            written(GraphModule(nn.Module(), graph))


@pytest.mark.parametrize(
    "call",
    [
        [["torch", "load"], ["list", ["plain", "/tmp/x"]], ["dict"]],
        [["operator", "__import__"], ["list"], ["dict"]],
        [["method", "__reduce__"], ["list", ["value", 0]], ["dict"]],
        [["builtins", "eval"], ["list", ["plain", "1"]], ["dict"]],
        [["torch", "cat"], ["list", ["pickle", "x"]], ["dict"]],
    ],
)
def test_what_is_no_operator_is_not_read(call: Any) -> None:
    data = FIRST_LINE + json.dumps({"inputs": 1, "calls": [call], "outputs": [["value", 0]]}).encode()
    with pytest.raises(ValueError, match="not the description of operators"):
        runner(data)
