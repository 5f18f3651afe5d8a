"""One example call, one graph: captured once, for every size, never mixed up with another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compile_policy.capture import compile_call
from compile_policy.compiled import CompiledGraph
from compile_policy.lowering import lower_with
from compile_policy.region import Region, RegionOptions, SignatureBinder

EAGER = lower_with("eager")


def capture(fn: Any, *leaves: torch.Tensor, labels: Any) -> CompiledGraph:
    return compile_call(fn, list(leaves), labels, EAGER)


class Scales(nn.Module):
    """Equal code for every instance; width and factor differ."""

    def __init__(self, width: int, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), factor))
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.factor + x.shape[0]


def test_one_capture_for_every_size() -> None:
    """Sizes 0, 1, 2 and larger ones run one graph that was traced on none of them."""

    def fn(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (leaves[0].cumsum(0) @ leaves[1] + leaves[0].shape[0],)

    graph = capture(fn, torch.rand(3, 7), torch.rand(7, 2), labels=[("n", "k"), ("k", None)])
    for n, k in [(0, 7), (1, 1), (2, 2), (3, 7), (7, 3), (64, 5), (1, 0)]:
        leaves = [torch.rand(n, k), torch.rand(k, 2)]
        assert graph.accepts(leaves), (n, k, graph.accepts.conditions)
        torch.testing.assert_close(graph.run(leaves)[0], fn(*leaves)[0])
    assert not graph.accepts([torch.rand(3, 7), torch.rand(6, 2)]), "equal labels are equal sizes"
    assert not graph.accepts([torch.rand(3, 7), torch.rand(7, 3)]), "a dim without label is static"


def test_modules_of_equal_code_are_never_mixed_up() -> None:
    """Guards are gone, so each entry needs a code object of its own: widths, constants and weights stay apart."""
    modules = [Scales(4, 1.0), Scales(4, 2.0), Scales(6, 2.0), Scales(4, 1.0)]
    modules[3].weight = nn.Parameter(torch.full((4,), 9.0))
    binder = SignatureBinder({"x": {0: None}})
    regions = [Region(m, role="t", binder=binder, options=RegionOptions("eager")) for m in modules]
    for _ in range(2):
        for region, module in zip(regions, modules, strict=True):
            x = torch.rand(3, module.weight.shape[0])
            assert torch.equal(region(x), module.forward(x))
    assert [r.graphs for r in regions] == [1] * 4


def test_guards_are_recorded() -> None:
    """What Dynamo would have checked at every call is on record, kind and name."""
    offset = nn.Parameter(torch.ones(2))

    def fn(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (leaves[0] + offset,)

    graph = capture(fn, torch.rand(3, 2), labels=[("n", None)])
    assert {g.kind for g in graph.guards} >= {"TENSOR_MATCH", "GRAD_MODE"}
    assert any("leaves" in g.name for g in graph.guards) and any("offset" in g.name for g in graph.guards)


def test_arguments_are_bound_tensors_leaves_and_sizes() -> None:
    """Parameters are bound once, sizes are read off the leaves; a leaf that is not used is no input."""
    weight = nn.Parameter(torch.ones(2))

    def fn(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (leaves[1] * weight * leaves[1].shape[0],)

    graph = capture(fn, torch.rand(9), torch.rand(3, 2), labels=[("m",), ("n", None)])
    kinds = {a.kind for a in graph.arguments}
    assert kinds == {"tensor", "leaf", "size"}
    assert [a.tensor for a in graph.arguments if a.kind == "tensor"] == [weight]
    assert {a.leaf for a in graph.arguments if a.kind != "tensor"} == {1}
    with torch.no_grad():
        weight.fill_(3.0)
    assert torch.equal(graph.run([torch.rand(1), torch.ones(5, 2)])[0], torch.full((5, 2), 15.0))


def test_outputs_that_are_inputs_or_repeat() -> None:
    """A returned leaf is that very tensor; a tensor returned twice is one result."""

    def fn(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = leaves[0] + 1
        return (leaves[1], y, y)

    graph = capture(fn, torch.rand(3), torch.rand(3, 2), labels=[("n",), ("n", None)])
    leaves = [torch.rand(4), torch.rand(4, 2)]
    out = graph.run(leaves)
    assert out[0] is leaves[1] and torch.equal(out[1], leaves[0] + 1) and out[1] is out[2]


def test_what_cannot_be_one_graph_raises() -> None:
    """A branch on a value has no graph: the caller learns it as an exception, and settings are as before."""

    def fn(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (leaves[0] if leaves[0].sum() > 0 else -leaves[0],)

    before = (torch._dynamo.config.specialize_int, torch._dynamo.config.specialize_float)
    with pytest.raises(Exception, match=r"(?i)data-dependent"):
        capture(fn, torch.rand(3), labels=[("n",)])
    assert (torch._dynamo.config.specialize_int, torch._dynamo.config.specialize_float) == before


def test_the_graph_is_kept_as_text_with_its_source() -> None:
    """The captured graph can be read, and each operation knows the line it came from."""

    def fn(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.tanh(leaves[0]),)

    graph = capture(fn, torch.rand(3), labels=[("n",)])
    assert "tanh" in graph.readable
    assert any("torch.tanh(leaves[0])" in s["stack"] and s["shape"] is not None for s in graph.sources)
