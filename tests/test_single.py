"""Code for a single row: attention of one query is what the operator gives; only what it can express is rewritten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from compile_policy.ahead import Sizes, lower_ahead
from compile_policy.blocks import BlockSummary
from compile_policy.capture import compile_call
from compile_policy.compiled import CompiledGraph
from compile_policy.lowering import AheadOfTime
from compile_policy.program import Package, Program
from compile_policy.single import OPTIONS

HEADS, WIDTH = 2, 4


class Interpreted(AheadOfTime):
    """Packages that run a piece's graph in Python, and the graphs that were made into them."""

    def __init__(self) -> None:
        super().__init__("inductor")
        self.made: list[torch.fx.GraphModule] = []

    def program(self, gm: torch.fx.GraphModule, sizes: Sizes = ()) -> tuple[Program, BlockSummary]:
        return lower_ahead(gm, sizes, make=self._make)

    def _make(self, gm: torch.fx.GraphModule) -> Package:
        self.made.append(gm)
        return Package(b"", lambda inputs: list(gm(*inputs)))


class Attention(nn.Module):
    """Queries of the last rows over all keys; ``arguments`` go to the operator."""

    def __init__(self, *, masked: bool = True, **arguments: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
        self.masked = masked
        self.arguments = arguments

    def forward(self, x: torch.Tensor, past: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query = self.linear(x).view(x.shape[0], x.shape[1], HEADS, WIDTH).transpose(1, 2)
        past = past[:, :1] if self.arguments.get("enable_gqa") else past
        used = mask if self.masked else None
        return scaled_dot_product_attention(query, past, past * 2, attn_mask=used, **self.arguments)


def captured(model: nn.Module, dtype: torch.dtype, mask_dtype: torch.dtype) -> tuple[CompiledGraph, list[int]]:
    """The graph, and how often the operator is in each package: the one for all sizes, the one for a single row."""
    lowering = Interpreted()

    def fn(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (model.forward(*leaves),)

    leaves = [torch.rand(2, 3, HEADS * WIDTH, dtype=dtype), torch.rand(2, HEADS, 7, WIDTH, dtype=dtype)]
    leaves.append(torch.ones(2, 1, 3, 7, dtype=mask_dtype))
    labels: Any = [("b", "s", None), ("b", None, "k", None), ("b", None, "s", "k")]
    with torch.no_grad():
        graph = compile_call(fn, leaves, labels, lowering.for_sizes({"b": 1, "s": 1}))
    found = [sum(n.target is scaled_dot_product_attention for n in gm.graph.nodes) for gm in lowering.made]
    return graph, found


#: In Python the sums of bfloat16 round every product, in a package they do not.
TOLERANCE = {torch.bfloat16: {"rtol": 0.05, "atol": 0.02}}


def check(model: nn.Module, graph: CompiledGraph, dtype: torch.dtype, mask: torch.Tensor) -> None:
    for rows in (1, 2):
        x, past = torch.randn(1, rows, HEADS * WIDTH, dtype=dtype), torch.randn(1, HEADS, 5, WIDTH, dtype=dtype)
        given = mask.expand(1, 1, rows, 5).contiguous()
        with torch.no_grad():
            result, expected = graph.run([x, past, given])[0], model(x, past, given)
        torch.testing.assert_close(result, expected, **TOLERANCE.get(dtype, {}))


BOOL = torch.tensor([True, False, True, True, False]).view(1, 1, 1, 5)
FLOAT = torch.tensor([0.0, 0.5, -1.0, float("-inf"), 2.0]).view(1, 1, 1, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, BOOL, FLOAT, BOOL & False], ids=["no mask", "bool", "float", "all hidden"])
def test_attention_of_one_query(mask: torch.Tensor | None, dtype: torch.dtype) -> None:
    """As sums it is what the operator gives, for every kind of mask, and zeros for a query that may see nothing."""
    given = BOOL if mask is None else mask.to(dtype) if mask is FLOAT else mask
    model = Attention(masked=mask is not None, scale=0.3).to(dtype)
    graph, operators = captured(model, dtype, given.dtype)
    assert operators == [1, 0]
    check(model, graph, dtype, given)


@pytest.mark.parametrize("arguments", [{"is_causal": True}, {"enable_gqa": True}], ids=["causal", "grouped"])
def test_other_attention_keeps_the_operator(arguments: dict[str, Any]) -> None:
    """Causal and grouped attention stays what it was, beside a linear layer that has code for one row."""
    model = Attention(masked="is_causal" not in arguments, **arguments)
    graph, operators = captured(model, torch.float32, torch.bool)
    assert operators == [1, 1]
    check(model, graph, torch.float32, BOOL)


class Stack(nn.Module):
    """A layer, and two that are the same code."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).sigmoid()
        for layer in self.layers:
            x = layer(x) + x
        return x


def test_options_of_the_compiler() -> None:
    """Code for a single row asks for options of its own; only for blocks that are repeated is the wrapper optimised."""
    lowering, model = Interpreted(), Stack()

    def fn(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (model.forward(*leaves),)

    with torch.no_grad():
        compile_call(fn, [torch.rand(3, 4)], [("n", None)], lowering.for_sizes({"n": 1}))
    options = [gm.meta.get(OPTIONS, {}) for gm in lowering.made]
    single = [o for o in options if o]
    assert len(single) == 2  # what is repeated, and what is not
    assert [o.get("aot_inductor.compile_wrapper_opt_level") for o in single].count("O1") == 1
