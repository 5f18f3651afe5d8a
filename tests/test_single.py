"""Code for a single row: attention of one query is what the operator gives; only what it can express is rewritten."""

from __future__ import annotations

from collections.abc import Callable
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

HEADS, WIDTH = 4, 4


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
        if self.arguments.get("enable_gqa"):
            past = past[:, :2]
        used = mask if self.masked else None
        return scaled_dot_product_attention(query, past, past * 2, attn_mask=used, **self.arguments)


def captured(
    model: nn.Module, dtype: torch.dtype, mask_dtype: torch.dtype, heads: int = 1
) -> tuple[CompiledGraph, list[int]]:
    """The graph, and how often the operator is in each package: the one for all sizes, the one for a single row."""
    lowering = Interpreted()

    def fn(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (model.forward(*leaves),)

    leaves = [torch.rand(2, 3, HEADS * WIDTH, dtype=dtype), torch.rand(2, HEADS, 7, WIDTH, dtype=dtype)]
    leaves.append(torch.ones(2, heads, 3, 7, dtype=mask_dtype))
    labels: Any = [("b", "s", None), ("b", None, "k", None), ("b", None, "s", "k")]
    with torch.no_grad():
        graph = compile_call(fn, leaves, labels, lowering.for_sizes({"b": 1, "s": 1}))
    found = [sum(n.target is scaled_dot_product_attention for n in gm.graph.nodes) for gm in lowering.made]
    return graph, found


#: In Python the sums of bfloat16 round every product, in a package they do not.
TOLERANCE: dict[torch.dtype, Any] = {torch.bfloat16: {"rtol": 0.05, "atol": 0.02}}


def check(model: nn.Module, graph: CompiledGraph, dtype: torch.dtype, mask: torch.Tensor) -> None:
    for rows in (1, 2):
        x, past = torch.randn(1, rows, HEADS * WIDTH, dtype=dtype), torch.randn(1, HEADS, 5, WIDTH, dtype=dtype)
        given = mask.expand(1, mask.shape[1], rows, 5).contiguous()
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


@pytest.mark.parametrize("mask", [None, BOOL, FLOAT], ids=["no mask", "bool", "float"])
def test_grouped_heads(mask: torch.Tensor | None) -> None:
    """Heads of queries that share a head of keys are sums too, under a mask for all heads or one for each."""
    given = BOOL if mask is None else mask
    model = Attention(masked=mask is not None, enable_gqa=True)
    graph, operators = captured(model, torch.float32, given.dtype)
    assert operators == [1, 0]
    check(model, graph, torch.float32, given)
    each = given.expand(1, HEADS, 1, 5).clone()
    each[:, 0] = each[:, 0].flip(-1)
    graph, operators = captured(model, torch.float32, given.dtype, heads=HEADS)
    assert operators == [1, 0]
    check(model, graph, torch.float32, each)


def test_causal_attention_keeps_the_operator() -> None:
    """It stays what it was, beside a linear layer that has code for one row."""
    model = Attention(masked=False, is_causal=True)
    graph, operators = captured(model, torch.float32, torch.bool)
    assert operators == [1, 1]
    check(model, graph, torch.float32, BOOL)


class Twice(Attention):
    """Its mask is read by ``reads`` beside the attention."""

    def __init__(self, reads: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.reads = reads

    def forward(self, x: torch.Tensor, past: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        attended: torch.Tensor = super().forward(x, past, mask)
        beside: torch.Tensor = self.reads(mask)
        return attended + beside


def test_the_hidden_tail_of_a_mask_is_not_read() -> None:
    """Keys behind the last one that a mask shows cost nothing: not even what is no number there can be seen."""
    model = Attention()
    graph, _ = captured(model, torch.float32, torch.bool)
    assert graph.program is not None and graph.program.special is not None
    (slot,) = graph.program.special.masks
    assert slot == graph.program.n_inputs - 1
    x, past = torch.randn(1, 1, HEADS * WIDTH), torch.randn(1, HEADS, 50, WIDTH)
    for seen in (1, 15, 16, 17, 49, 50):
        mask = torch.arange(50).lt(seen).view(1, 1, 1, 50)
        held = past.clone()
        held[:, :, -(-seen // 16) * 16 :] = torch.nan
        with torch.no_grad():
            torch.testing.assert_close(graph.run([x, held, mask])[0], model(x, past, mask))
    with torch.no_grad():  # nothing is seen: zeros, as from the operator
        nothing = torch.zeros(1, 1, 1, 50, dtype=torch.bool)
        torch.testing.assert_close(graph.run([x, past, nothing])[0], model(x, past, nothing))


def test_a_mask_that_something_else_reads_keeps_its_tail() -> None:
    """What is computed from all of a mask stays what it was, and so does what depends on how long it is."""
    x, past = torch.randn(1, 1, HEADS * WIDTH), torch.randn(1, HEADS, 50, WIDTH)
    mask = torch.arange(50).lt(20).view(1, 1, 1, 50)
    for reads, tails in ((lambda m: (~m).sum() * 1.0, 0), (lambda m: m.shape[-1] * 1.0, 1)):
        model = Twice(reads)
        graph, operators = captured(model, torch.float32, torch.bool)
        assert operators == [1, 0]
        assert graph.program is not None and graph.program.special is not None
        assert len(graph.program.special.masks) == tails
        with torch.no_grad():
            torch.testing.assert_close(graph.run([x, past, mask])[0], model(x, past, mask))


class Grows(Attention):
    """Keys are put together from held ones and new ones."""

    def forward(self, x: torch.Tensor, past: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(x, torch.cat([past[:, :, 1:], past[:, :, :1]], dim=2), mask)


def test_a_cache_that_grows_has_no_empty_slots() -> None:
    """Its mask is left alone: reading all states in the loop that puts them together costs less."""
    model = Grows()
    graph, operators = captured(model, torch.float32, torch.bool)
    assert operators == [1, 0]
    assert graph.program is not None and graph.program.special is not None and graph.program.special.masks == ()
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
