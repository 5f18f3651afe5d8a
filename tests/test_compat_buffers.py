"""A module that assigns a buffer to itself is captured, and is afterwards as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compile_policy.compat_buffers import plain_buffers
from compile_policy.region import Region, RegionOptions, SignatureBinder


class Moves(nn.Module):
    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.table: torch.Tensor = nn.Buffer(torch.arange(4.0), persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.table = self.table.to(device=x.device, dtype=x.dtype)
        return x + self.table


@pytest.mark.parametrize("persistent", [False, True])
def test_a_buffer_that_is_assigned_again(persistent: bool) -> None:
    module = Moves(persistent)
    before = module.table
    region = Region(module, role="m", binder=SignatureBinder({"x": {0: None}}), options=RegionOptions(backend="eager"))
    with torch.no_grad():
        for rows in (3, 1, 2):
            x = torch.randn(rows, 4)
            assert torch.equal(region(x), x + torch.arange(4.0))
    assert (region.graphs, region.eager_calls) == (1, 0)
    assert module.table is before and isinstance(before, nn.Buffer)
    assert ("table" in module.state_dict()) is persistent


def test_the_mark_comes_back() -> None:
    """Also when the block is left by an exception; a buffer of two modules has it taken away once."""
    shared = Moves(True)
    module = nn.ModuleList([shared, Moves(False)])
    module[1].table = shared.table
    with pytest.raises(KeyError), plain_buffers(module):
        assert not any(isinstance(b, nn.Buffer) for b in module.buffers())
        raise KeyError
    assert all(isinstance(b, nn.Buffer) for b in module.buffers())
