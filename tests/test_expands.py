"""A tensor that is expanded only where it has to be: one graph, where that is all that the question is for."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import nn

from compile_policy.expands import expands_where_it_differs
from compile_policy.region import Region, RegionOptions, SignatureBinder


def first(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    rows = x.shape[0]
    if p.shape[0] != rows:
        p = p.expand(rows, -1)
    return p


def named_from_the_left(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    if x.shape[0] != p.size(0):
        p = p.expand(x.shape[0], -1)
    return p


def another_size(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    if p.shape[0] != x.shape[0]:
        p = p.expand(x.shape[0] + 1, -1)
    return p


def another_dim(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    if p.shape[0] != x.shape[0]:
        p = p[:, None].expand(-1, x.shape[0], -1)[0]
    return p


def more_than_that(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    if p.shape[0] != x.shape[0]:
        p = p.expand(x.shape[0], -1)
        p = p * 2
    return p


def something_else_otherwise(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    if p.shape[0] != x.shape[0]:
        p = p.expand(x.shape[0], -1)
    else:
        p = -p
    return p


class Expands(nn.Module):
    def __init__(self, expand: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.expand = expand

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.expand(x, torch.arange(x.shape[1]).unsqueeze(0)) * 1.5


@pytest.mark.parametrize(
    ("expand", "graphs"),
    [
        (first, 1),
        (named_from_the_left, 1),
        (another_size, 2),
        (another_dim, 2),
        (more_than_that, 2),
        (something_else_otherwise, 2),
    ],
)
def test_one_row_shares_the_graph_where_expanding_is_all(
    expand: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], graphs: int
) -> None:
    """Whatever the body does besides keeps the condition, and every result is eager's."""
    module = Expands(expand)
    binder = SignatureBinder({"x": {0: "rows", 1: "columns"}})
    region = Region(module, role="m", binder=binder, options=RegionOptions(backend="eager"))
    with torch.no_grad():
        for rows in (3, 1, 2):
            x = torch.randn(rows, 5)
            got, want = region(x), module.forward(x)
            assert got.shape == want.shape
            assert torch.equal(got, want)
    assert (region.graphs, region.eager_calls) == (graphs, 0)


@pytest.mark.parametrize(("cut", "found"), [(0, True), (1, True), (2, True), (len("/of_nobody/"), True), (3, False)])
def test_the_file_is_found_wherever_torch_cuts_its_name(monkeypatch: pytest.MonkeyPatch, cut: int, found: bool) -> None:
    """Torch leaves out the directories in common with its own; of the root alone, one character more."""
    file = "/of_nobody/expanding.py"
    module = ModuleType("expanding")
    module.__file__ = file
    monkeypatch.setitem(sys.modules, "expanding", module)
    lines = ["if p.shape[0] != rows:\n", "    p = p.expand(rows, -1)\n"]
    monkeypatch.setitem(linecache.cache, file, (sum(map(len, lines)), None, lines, file))
    assert expands_where_it_differs(f"{lines[0].strip()}  # {file[cut:]}:1 in first") is found
