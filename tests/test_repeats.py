"""Layers that do the same are traced once: how many were traced, what the graph then is, and what is never taken for
the same."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from compile_policy.capture import compile_call
from compile_policy.compiled import CompiledGraph
from compile_policy.events import Event, listening
from compile_policy.lowering import InductorJit
from compile_policy.region import Region, RegionOptions, SignatureBinder


class Layer(nn.Module):
    def __init__(self, index: int = 0, factor: float = 0.5) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.index = index
        self.factor = factor
        self.limit = 1000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > self.limit:
            return x
        return x + self.factor * torch.tanh(self.linear(x)) * x.shape[0]


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module], behind: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.behind = behind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        for layer in self.layers:
            x = layer(x)
        return x.sin() if self.behind else x


def uniform(count: int) -> list[nn.Module]:
    torch.manual_seed(count)
    return [Layer(i) for i in range(count)]


def region_of(module: nn.Module) -> Region:
    binder = SignatureBinder({"x": {0: None}})
    return Region(module, role="t", binder=binder, options=RegionOptions(backend="eager"))


def check(module: nn.Module, depth: str) -> Region:
    """One graph, right for several sizes, of which so much was traced."""
    region = region_of(module)
    with torch.no_grad():
        for rows in (3, 5, 1):
            x = torch.rand(rows, 4)
            torch.testing.assert_close(region(x), module(x))
    assert (region.graphs, region.eager_calls) == (1, 0), region.fallback
    assert the_graph(region).depth == depth
    return region


def the_graph(region: Region) -> CompiledGraph:
    (entry,) = [e for found in region.entries.values() for e in found]
    return entry.graph


def traced(count: int) -> str:
    return f"2 of {count} layers were traced, which stand for the others"


@pytest.mark.parametrize("behind", [True, False])
def test_what_is_traced_does_not_grow_with_depth(behind: bool) -> None:
    captured = []
    for count in (5, 20):
        before = counters["stats"]["calls_captured"]
        region = check(Stack(uniform(count), behind), traced(count))
        captured.append(counters["stats"]["calls_captured"] - before)
        modules = {str(source["module"]) for source in the_graph(region).sources}
        assert sum(m.endswith(".linear") for m in modules) == count
    assert captured[0] == captured[1]


def test_the_graph_is_that_of_all_layers() -> None:
    """Operation by operation, with the parameters of the right layer."""
    module = Stack(uniform(6))
    x = torch.rand(7, 4)

    def remake(m: nn.Module) -> Any:
        forward = m.forward

        def fn(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (forward(*leaves),)

        return fn

    graphs = []
    with torch.no_grad():
        for given in (None, remake):
            graph = compile_call(
                remake(module), [x.clone()], [("n", None)], InductorJit("eager"), lambda: None, module, given
            )
            graphs.append(graph)
    whole, stitched = graphs
    assert (whole.depth, stitched.depth) == ("", traced(6))
    told = [[(s["module"], s["op"], s["shape"]) for s in graph.sources] for graph in graphs]
    assert told[0] == told[1]
    bound = [{id(a.tensor) for a in graph.arguments if a.kind == "tensor"} for graph in graphs]
    assert bound[0] == bound[1]
    assert stitched.accepts([x]) and torch.equal(whole.run([x])[0], stitched.run([x])[0])
    names = [{(g.kind, g.name) for g in graph.guards if "layers" in g.name} for graph in graphs]
    assert len(names[1]) >= len(names[0])


def test_every_layer_reads_its_own_parameters() -> None:
    module = Stack(uniform(6))
    region = check(module, traced(6))
    x = torch.rand(3, 4)
    for layer in module.layers:
        before = module(x)
        with torch.no_grad():
            layer.get_parameter("linear.weight").mul_(1.5)
            assert not torch.allclose(before, module(x))
            torch.testing.assert_close(region(x), module(x))
    assert region.graphs == 1


def test_a_change_in_a_layer_that_was_not_traced_is_noticed() -> None:
    module = Stack(uniform(6))
    region = check(module, traced(6))
    module.layers[4].factor = 0.25  # type: ignore[assignment]
    x = torch.rand(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(region(x), module(x))
    assert region.graphs == 2


class Other(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.linear(x))


def test_kinds_that_take_turns() -> None:
    kinds = [(Layer, Layer, Other)[i % 3] for i in range(12)]
    check(Stack([cls(i) for i, cls in enumerate(kinds)]), "4 of 12 layers were traced, which stand for the others")


class ByIndex(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / (1 + self.index)


class Limits:
    def __init__(self, limits: list[int]) -> None:
        self.limits = limits


class Listed(Layer):
    """Reads what it may do from a list that all layers share."""

    config = Limits([20] * 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.shape[0] > self.config.limits[self.index] else super().forward(x)


class Between(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) * 1.5
        return x


class Counted(Stack):
    """Does something with the number of its layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / len(self.layers)


class Collected(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = [x]
        for layer in self.layers:
            seen.append(layer(seen[-1]))
        return seen[-1] + seen[-3]


class Backwards(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in reversed(self.layers):
            x = layer(x)
        return x


def limited(limits: list[int]) -> list[nn.Module]:
    layers = uniform(8)
    for layer, limit in zip(layers, limits, strict=True):
        layer.limit = limit  # type: ignore[assignment]
    return layers


def listed(limits: list[int]) -> list[nn.Module]:
    config = Limits(limits)
    layers = [Listed(i) for i in range(8)]
    for layer in layers:
        layer.config = config
    return list(layers)


def test_what_only_other_sizes_show() -> None:
    """Layers that do the same on the example, but not on every call."""
    check(Stack(limited([20] * 8)), traced(8))
    check(Stack(listed([20] * 8)), traced(8))
    for case in (Stack(limited([20] * 6 + [10, 20])), Stack(listed([20] * 6 + [10, 20]))):
        region = region_of(case)
        with torch.no_grad():
            for rows in (3, 15, 25):
                x = torch.rand(rows, 4)
                torch.testing.assert_close(region(x), case(x))
        depths = {e.graph.depth for found in region.entries.values() for e in found}
        assert all(depth.startswith("all layers were traced: ") for depth in depths), depths


class Shared(Stack):
    """The first layer's result goes into every other layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.layers[0](x)
        x = first
        for layer in list(self.layers)[1:]:
            x = layer(x) + 0 * first
        return x


def tied() -> Stack:
    """Every second layer has the parameters of the one before."""
    layers = uniform(8)
    for a, b in zip(layers[::2], layers[1::2], strict=True):
        b.linear = a.linear
    return Stack(layers)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Stack([ByIndex(i) for i in range(6)]), "layer 5 does what none before it does"),
        (Stack([*uniform(5), Other()]), "layer 5 does what none before it does"),
        (Between(uniform(6)), "operators run between the layers"),
        (Shared(uniform(6)), "operators run between the layers"),
        (Counted(uniform(6)), "with fewer layers, the rest of the component does something else"),
        (Collected(uniform(6)), "what layer 3 makes is used in many places"),
        (Backwards(uniform(6)), "its layers are not called one after the other"),
    ],
)
def test_what_is_traced_in_full(module: nn.Module, why: str) -> None:
    """Said with the reason, and never wrong."""
    events: list[Event] = []
    with listening(events.append):
        check(module, f"all layers were traced: {why}")
    (end,) = [e for e in events if e.kind == "compile_end"]
    assert end.data["depth"] == f"all layers were traced: {why}"


def test_layers_that_share_parameters() -> None:
    region = region_of(tied())
    module = region.module
    with torch.no_grad():
        for rows in (3, 5):
            x = torch.rand(rows, 4)
            torch.testing.assert_close(region(x), module(x))
    assert region.eager_calls == 0


class Deeper(Limits):
    names: ClassVar[dict[str, float]] = {"factor": 0.5}


class Deepest(Deeper):
    pass


class Inherited(Listed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.config.names["factor"]  # type: ignore[attr-defined, no-any-return]


def test_bases_of_a_class_are_not_counted_by_layer() -> None:
    """A configuration with as many base classes as there are layers."""
    config = Deepest([20] * 4)
    layers = [Inherited(i) for i in range(4)]
    for layer in layers:
        layer.config = config
    check(Stack(list(layers)), traced(4))


def test_short_lists_are_left_alone() -> None:
    check(Stack(uniform(3)), "")


def test_other_threads_see_all_layers() -> None:
    """Nothing about the component itself changes while fewer layers are traced."""
    module = Stack(uniform(6))
    seen: list[int] = []

    class Watched(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.compiler.is_compiling():
                seen.append(len(module.layers))
            return super().forward(x)

    module.layers = nn.ModuleList(Watched(i) for i in range(6))
    check(module, traced(6))
    assert set(seen) == {6}
