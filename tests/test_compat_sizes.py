"""Sizes that a capture leaves open although Dynamo would fix them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compile_policy.region import Region, RegionOptions, SignatureBinder


class Tower(nn.Module):
    """Checks a size, and goes through its input in pieces of four."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = nn.ModuleDict({f"of {n}": nn.Linear(3, 3) for n in (6, 9)})

    def forward(self, x: torch.Tensor, keyed: bool = False) -> torch.Tensor:
        n = x.shape[0]
        self.hold(n < 100, f"{n} rows, at most {n * 2} of them")
        if keyed:
            return self.sums[f"of {n}"](x)
        out = torch.zeros_like(x)
        for start in range(0, n, 4):
            part = slice(start, min(start + 4, n))
            out[part] = x[part].flip(0) * (start + 1)
        return out

    @staticmethod
    def hold(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(message)


def _region() -> Region:
    return Region(
        Tower(), role="tower", binder=SignatureBinder({"x": {0: None}}), options=RegionOptions(backend="eager")
    )


def test_a_graph_for_each_number_of_pieces() -> None:
    """Sizes that fall into so many pieces share a graph, the message of the check fixes none of them."""
    region = _region()
    with torch.no_grad():
        for size in (5, 6, 7, 8):
            x = torch.randn(size, 3)
            assert torch.equal(region(x), region.module.forward(x))
        within = region.graphs
        for size in (9, 12, 10):
            x = torch.randn(size, 3)
            assert torch.equal(region(x), region.module.forward(x))
    # the first is traced on an example of one piece
    assert (region.eager_calls, within, region.graphs) == (0, 2, 3)


def test_a_text_that_is_read_fixes_its_sizes() -> None:
    """A layer looked up by a text with a size in it: a graph for each size, as without us."""
    region = _region()
    with torch.no_grad():
        for size in (6, 9, 6):
            x = torch.randn(size, 3)
            assert torch.equal(region(x, keyed=True), region.module.forward(x, keyed=True))
    assert region.eager_calls == 0 and region.graphs >= 2


def test_a_failing_check_tells_the_size() -> None:
    """The message is made where somebody reads it."""
    region = _region()
    with torch.no_grad(), pytest.raises(ValueError, match="120 rows, at most 240 of them"):
        region(torch.randn(120, 3))


def test_dynamo_is_as_before() -> None:
    """Outside of captures nothing of Dynamo's translator is ours."""
    with torch.no_grad():
        _region()(torch.randn(5, 3))
    graphs: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(Tower().forward, backend=backend, dynamic=True)
    for size in (5, 6):
        compiled(torch.randn(size, 3))
    assert len(graphs) == 2
