"""Two ranks with the same component: one compiles, both run the compiled code, and nobody waits for ever."""

from __future__ import annotations

import os
import shutil
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from compile_policy.artifacts import Store
from compile_policy.binder import SignatureBinder
from compile_policy.errors import CompileFault
from compile_policy.events import Event, listening
from compile_policy.region import Region, RegionOptions
from compile_policy.saving import between, replicas, sources
from compile_policy.saving.replicas import rank_factor

DEADLINE_SECONDS = 300.0
pytestmark = pytest.mark.slow
PATIENCE = 20.0  # of two processes on a busy machine


class Ranked(nn.Module):
    """Asks for its rank while it is traced."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input * self.weight + dist.get_rank()


def replica(width: int) -> nn.Module:
    """The same on every rank, but for the values of its weights."""
    return nn.Sequential(nn.Linear(width, 3), nn.ReLU())


class Run:
    """A new region on a store, as in a new process, and what it did with one call."""

    def __init__(
        self, store: Store, width: int, build: Callable[[int], nn.Module] = replica, on_fault: str = "eager"
    ) -> None:
        self.heard: list[Event] = []
        torch.manual_seed(dist.get_rank())
        module = build(width)
        options = RegionOptions(store=store, on_fault="error" if on_fault == "error" else "eager")
        self.region = Region(module, role="t", binder=SignatureBinder({"input": {0: None}}), options=options)
        self.x = torch.rand(3 + dist.get_rank(), width)

    @torch.no_grad()
    def __call__(self) -> Run:
        with listening(self.heard.append):
            result = self.region(self.x)
        torch.testing.assert_close(result, self.region.module.forward(self.x))
        return self

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.region.graphs, self.region.loaded, self.region.eager_calls


def store_in(folder: Path) -> Store:
    folder.mkdir(parents=True, exist_ok=True)
    return Store(folder)


def own(folder: Path, name: str) -> Store:
    return store_in(folder / name / f"cache{dist.get_rank()}")


def damage(store: Store) -> None:
    """One byte of every file of the entry."""
    found = [p for p in store.root.rglob("*") if p.is_file() and "manifest" not in p.name and "v1" in p.parts]
    assert found
    for path in found:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def _scenario(folder: Path, _: int, rank0: str, rank1: str) -> None:
    """Stores of their own, in the given states: one graph where both miss, none where one of them hits."""
    state, name = (rank0, rank1)[dist.get_rank()], f"{rank0}-{rank1}"
    if state != "miss":  # what rank 0 compiled when both missed
        shutil.copytree(folder / "miss-miss" / "cache0", folder / name / f"cache{dist.get_rank()}")
    store = own(folder, name)
    if state == "corrupt":
        damage(store)
    makes = "hit" not in (rank0, rank1) and dist.get_rank() == 0
    run = Run(store, 2)()
    assert run.counts == ((1, 0, 0) if makes else (0, 1, 0)), (run.counts, run.heard)
    assert Run(store, 2)().counts == (0, 1, 0)


def _shared(folder: Path, width: int) -> None:
    """One directory."""
    run = Run(store_in(folder / "shared"), width)()
    assert run.counts == ((1, 0, 0) if dist.get_rank() == 0 else (0, 1, 0)), run.heard


def _late(folder: Path, width: int) -> None:
    """A rank that comes later is waited for."""
    time.sleep(2.0 * dist.get_rank())
    run = Run(own(folder, "late"), width)()
    assert run.counts == ((1, 0, 0) if dist.get_rank() == 0 else (0, 1, 0)), run.heard


def _alone(folder: Path, width: int) -> None:
    """A rank that nobody joins compiles by itself, waits once only, and holds nobody up who comes later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(between, "PATIENCE_SECONDS", 0.3)
        store = own(folder, "alone")
        if dist.get_rank() == 0:
            run = Run(store, width)()
            assert run.counts == (1, 0, 0) and run.region.shelf is not None and run.region.shelf.alone
            assert "goes on without the other ranks" in " ".join(event.message for event in run.heard)
            dist.barrier()
        else:
            dist.barrier()
            assert Run(store, width)().counts == (1, 0, 0)


def _other_order(folder: Path, width: int) -> None:
    """Ranks that come to two components in opposite order do not wait for each other for ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(between, "PATIENCE_SECONDS", 0.3)
        patch.setattr("compile_policy.entries.build_entry", _broken)
        widths = [width + 50, width + 51]
        for each in widths if dist.get_rank() == 0 else widths[::-1]:
            assert Run(own(folder, "order"), each)().counts == (0, 0, 1)


def _raises(folder: Path, width: int) -> None:
    """What cannot be compiled on one rank runs eager on both, and both say why."""
    run = Run(own(folder, "raises"), width)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            patch.setattr("compile_policy.entries.build_entry", _broken)
        run()
    assert run.counts == (0, 0, 1), run.counts
    assert run.region.fallback is not None and "out of registers" in run.region.fallback


def _raises_error(folder: Path, width: int) -> None:
    """With ``on_fault="error"`` both raise."""
    run = Run(own(folder, "raises"), width, on_fault="error")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CompileFault, match="out of registers"):
        if dist.get_rank() == 0:
            patch.setattr("compile_policy.entries.build_entry", _broken)
        run()


def _broken(*_: Any) -> None:
    raise RuntimeError("out of registers")


def _rank_in_the_graph(folder: Path, width: int) -> None:
    """Code that speaks of ranks is compiled on each and kept for each; found out late, it is given to nobody."""
    for loaded in (0, 1):
        assert Run(store_in(folder / "ranked"), width, Ranked)().region.loaded == loaded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "_names_distributed", lambda module: False)
        run = Run(store_in(folder / "found late"), width, Ranked)()
    assert run.counts == (1, 0, 0) and "get_rank" in " ".join(e.message for e in run.heard if e.kind == "unsaved")


def _factor(folder: Path, width: int) -> None:
    """What the key says of ranks."""
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert rank_factor(module) == "any of 2"
    module[0].register_forward_hook(lambda m, a, r: dist.all_reduce(r))
    assert rank_factor(module) == f"{dist.get_rank()} of 2"
    assert rank_factor(nn.Sequential(nn.SyncBatchNorm(2))) == f"{dist.get_rank()} of 2"


CHECKS: dict[str, Callable[[Path, int], None]] = {
    **{
        f"{a}_{b}": lambda folder, width, a=a, b=b: _scenario(folder, width, a, b)
        for a, b in (("miss", "miss"), ("hit", "miss"), ("miss", "hit"), ("corrupt", "hit"), ("hit", "corrupt"))
    },
    "factor": _factor,
    "raises": _raises,
    "raises_error": _raises_error,
    "other_order": _other_order,
    "late": _late,
    "alone": _alone,
    "shared": _shared,
    "rank_in_the_graph": _rank_in_the_graph,
}


def _rank(rank: int, folder: str) -> None:
    """One of two processes; writes down what each check raised. Widths differ, so that keys do."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor{rank}"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sources._STARTED += 1e9  # this file may be newer than the process
    between.PATIENCE_SECONDS = PATIENCE
    options = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": 2}
    dist.init_process_group("gloo", timeout=timedelta(seconds=DEADLINE_SECONDS), **options)
    try:
        for width, (name, check) in enumerate(CHECKS.items(), start=3):
            try:
                check(Path(folder), width)
                found = "passed"
            except BaseException:
                found = traceback.format_exc()
            Path(folder, f"{name}.{rank}").write_text(found)

            dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both processes run all checks; they are killed at the deadline."""
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.spawn(_rank, (str(folder),), nprocs=2, join=False)
    deadline = time.monotonic() + DEADLINE_SECONDS
    try:
        while not context.join(timeout=1.0) and time.monotonic() < deadline:
            pass
    finally:
        for process in context.processes:
            process.kill()
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", list(CHECKS))
def test_two_ranks(folder: Path, name: str, rank: int) -> None:
    """The checks above, each on both ranks."""
    result = folder / f"{name}.{rank}"
    assert result.exists(), f"rank {rank} did not finish {name} within {DEADLINE_SECONDS:.0f} s"
    assert result.read_text() == "passed"
