"""Where a tensor comes from that a tower hands to a layout function: an argument of the call, or made from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Column:
    """One column of a grid that a tower derives from the one that it was called with.

    Attributes:
        source: the column that it is a multiple of; ``None`` for a constant.
        factor: the multiple, or the constant.
    """

    source: int | None
    factor: int

    def of(self, grid: torch.Tensor) -> torch.Tensor:
        return torch.full_like(grid[:, 0], self.factor) if self.source is None else grid[:, self.source] * self.factor


@dataclass(frozen=True)
class Derived:
    """A tensor that comes from an argument of the call, or from an earlier layout function.

    Attributes:
        argument: the argument, or the name of the earlier result.
        columns: the columns of a grid made from it; empty: it is taken as it is.
        summed: frames of a mask that are counted together, 0 for a whole row; ``None``: nothing is counted.
    """

    argument: str
    columns: tuple[Column, ...] = ()
    summed: int | None = None

    def of(self, values: Mapping[str, Any]) -> Any:
        given = values[self.argument]
        if self.summed is not None:
            return _counted(given, self.summed)
        return torch.stack([c.of(given) for c in self.columns], dim=1) if self.columns else given


def origin(value: torch.Tensor, values: Mapping[str, Any]) -> Derived | None:
    """How ``value`` comes from the arguments of the call."""
    tensors = {n: v for n, v in values.items() if isinstance(v, torch.Tensor) and not v.is_floating_point()}
    for name, given in values.items():  # sound itself too, but not by comparing it
        if value is given:
            return Derived(name)
    for name, candidate in tensors.items():
        if torch.equal(value, candidate):
            return Derived(name)
    for name, candidate in tensors.items():
        if value.dim() == candidate.dim() == 2 and len(value) == len(candidate):
            columns = [_column(column, candidate, i) for i, column in enumerate(value.unbind(1))]
            known = tuple(c for c in columns if c is not None)
            if len(known) == len(columns):
                return Derived(name, known)
    for name, candidate in tensors.items():
        if value.dim() == 1 and candidate.dim() == 2 and len(value):
            chunk, rest = divmod(candidate.numel(), len(value))
            if rest == 0 and candidate.shape[1] % chunk == 0 and torch.equal(_counted(candidate, chunk), value):
                return Derived(name, summed=0 if chunk == candidate.shape[1] else chunk)
    return None


def _counted(mask: torch.Tensor, chunk: int) -> torch.Tensor:
    """How many frames of a mask (pieces, frames) count, for every ``chunk`` of them, or every piece."""
    return mask.reshape(-1, chunk or mask.shape[1]).sum(-1).to(torch.long)


def _column(column: torch.Tensor, grid: torch.Tensor, place: int) -> Column | None:
    """How ``column`` comes from ``grid``; its own place is the likely one."""
    for i in sorted(range(grid.shape[1]), key=lambda i: i != place):
        source = grid[:, i].cpu()
        factor = int(column[0]) // max(int(source[0]), 1)
        likely = factor and (i == place or source.unique().numel() > 1)  # a column that never varies says little
        if likely and torch.equal(source * factor, column.cpu().to(source.dtype)):
            return Column(i, factor)
    return Column(None, int(column[0])) if column.unique().numel() == 1 else None
