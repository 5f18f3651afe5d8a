"""A relation between sizes that turns out to matter: sizes without it get an entry of their own, also in the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compile_policy.artifacts import Store, open_store
from compile_policy.binder import SignatureBinder
from compile_policy.events import Event, listening
from compile_policy.region import Region, RegionOptions
from compile_policy.saving import sources
from compile_policy.saving.shelf import Shelf


class Turns(nn.Module):
    """Another value for one row, asked behind a product that has asked for its layout: tracing notes nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.matmul(x, x.transpose(-1, -2) @ x)
        return -y if x.shape[1] != 1 else y


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(sources, "_STARTED", sources._STARTED + 1e9)  # this file may be newer than the process
    found = open_store(tmp_path / "cache", {})
    assert found is not None
    return found


def _called(store: Store) -> tuple[Region, list[str]]:
    """A region over the store after calls with one row and with more, and what happened."""
    heard: list[Event] = []
    binder = SignatureBinder({"x": {0: "batch", 1: "rows"}})
    region = Region(Turns(), role="t", binder=binder, options=RegionOptions(store=store))
    with listening(heard.append), torch.no_grad():
        for batch, rows in ((2, 3), (3, 1), (2, 5), (5, 1)):
            x = torch.randn(batch, rows, 4)
            torch.testing.assert_close(region(x), region.module.forward(x))
    return region, [event.kind for event in heard if event.kind in ("compile_end", "saved", "loaded", "fallback")]


@pytest.mark.slow
def test_the_next_process_loads_both(store: Store) -> None:
    first, happened = _called(store)
    assert happened == ["compile_end", "saved"] * 2 and (first.graphs, first.eager_calls) == (2, 0)
    second, happened = _called(store)
    assert happened == ["loaded"] * 2 and (second.graphs, second.eager_calls) == (0, 0)


@pytest.mark.slow
def test_where_the_store_cannot_be_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first entry it is full: what was found out is known in this process, and no call is tried for ever."""
    write, written = Shelf.write_index, list[Any]()

    def once(self: Shelf, factors: Any, index: Any) -> bool:
        written.append(factors)
        return len(written) == 1 and write(self, factors, index)

    monkeypatch.setattr(Shelf, "write_index", once)
    region, happened = _called(store)
    assert happened == ["compile_end", "saved", "compile_end"] and (region.graphs, region.eager_calls) == (2, 0)
    assert len(written) > 1
