"""Ranks decide together: one hit is a hit for all, one compiles for all, and one failure is a failure of all."""

from __future__ import annotations

import os
import threading
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

from compile_policy import compat
from compile_policy.artifacts import ArtifactKey, Store
from compile_policy.artifacts.ranks import Made, Outcome, Ranks, RankTimeout, obtain
from compile_policy.errors import PolicyWarning

DEADLINE_SECONDS = 100.0
GROUP_SECONDS = 2.0  # of the process group: shorter than the slow rank is slow
FILES = {"graph.pt2": b"\x00code" * 2_000_000, "blocks/0.pt2": b"", "spine.json": b"{}"}  # more than one chunk


class Maker:
    """Stands for a compiler; counts."""

    def __init__(self, seconds: float = 0.0, error: BaseException | None = None) -> None:
        self.calls, self.seconds, self.error = 0, seconds, error

    def __call__(self) -> Made:
        self.calls += 1
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return FILES, {"entry": 1}


def key(name: str) -> ArtifactKey:
    return ArtifactKey({"name": name})


def own(folder: Path) -> Store:
    return Store(folder / f"cache{dist.get_rank()}")


def run(store: Store | None, name: str, make: Maker, **options: Any) -> Outcome:
    return obtain(store, key(name), make, ranks=Ranks(name, timeout=60), **options)


def damage(store: Store, wanted: ArtifactKey) -> None:
    path = store.folders.of(wanted.digest) / "graph.pt2"
    path.write_bytes(b"\x01" + path.read_bytes()[1:])


# -- one process ------------------------------------------------------------------------------------------------------


def test_one_process_makes_once_and_then_loads(tmp_path: Path) -> None:
    """Without a group, it is the store and its lock."""
    make, store = Maker(), Store(tmp_path)
    assert [run(store, "alone", make).how for _ in range(2)] == ["made", "hit"]
    assert make.calls == 1
    failed = run(store, "broken", Maker(error=ValueError("no\ncompiler")))
    assert (failed.how, failed.reason) == ("failed", "rank 0: ValueError: no")
    assert isinstance(failed.error, ValueError)
    assert run(None, "no store", make).how == "made"


def test_threads_of_one_process_make_once(tmp_path: Path) -> None:
    """The lock holds between threads too."""
    make = Maker(0.05)
    outcomes: list[Outcome] = []
    threads = [
        threading.Thread(target=lambda: outcomes.append(run(Store(tmp_path), "threads", make))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert make.calls == 1
    assert all(outcome.artifact is not None and outcome.artifact.files == FILES for outcome in outcomes)


# -- two processes ----------------------------------------------------------------------------------------------------


def _scenario(folder: Path, rank0: str, rank1: str) -> None:
    """Caches of their own, in the given states; afterwards both have the artifact, and their caches too."""
    name = f"{rank0} {rank1}"
    state = (rank0, rank1)[dist.get_rank()]
    store, make = own(folder), Maker()
    if state != "miss":
        assert store.save(key(name), FILES, {"entry": 1})
    if state == "corrupt":
        damage(store, key(name))
    outcome = run(store, name, make)
    hit = "hit" in (rank0, rank1)
    assert outcome.how == ("hit" if hit else "made"), outcome
    assert outcome.artifact is not None and dict(outcome.artifact.files) == FILES
    assert make.calls == (0 if hit or dist.get_rank() == 1 else 1)
    again = run(own(folder), name, make)
    assert again.how == "hit" and make.calls <= 1, again


def _shared(folder: Path) -> None:
    """In one directory, rank 1 loads what rank 0 has saved."""
    make = Maker()
    outcome = run(Store(folder / "shared"), "shared", make)
    assert outcome.how == "made" and outcome.artifact is not None and outcome.artifact.files == FILES
    assert make.calls == (1 if dist.get_rank() == 0 else 0)


def _no_store(folder: Path) -> None:
    """Ranks without a store get the bytes all the same."""
    store = own(folder) if dist.get_rank() == 1 else None
    outcome = run(store, "no store", Maker())
    assert outcome.how == "made" and outcome.artifact is not None and outcome.artifact.files == FILES


def _slow(folder: Path) -> None:
    """The maker takes longer than a collective may; no collective waits for it."""
    outcome = run(own(folder), "slow", Maker(seconds=1.25 * GROUP_SECONDS))
    assert outcome.how == "made"
    dist.all_reduce(torch.ones(1))


def _late(folder: Path) -> None:
    """A rank that comes late is waited for, not given up."""
    time.sleep(1.25 * GROUP_SECONDS * dist.get_rank())
    assert run(own(folder), "late", Maker()).how == "made"


def _raises(folder: Path) -> None:
    """Both fall back; the rank that raised has the exception."""
    make = Maker(error=RuntimeError("out of registers"))
    outcome = run(own(folder), "raises", make)
    assert (outcome.how, outcome.artifact) == ("failed", None)
    assert outcome.reason == "rank 0: RuntimeError: out of registers"
    assert (outcome.error is None) == (dist.get_rank() == 1)


def _interrupted(folder: Path) -> None:
    """Ctrl-C on the maker ends its wait and everybody else's."""
    make = Maker(error=KeyboardInterrupt())
    if dist.get_rank() == 0:
        with pytest.raises(KeyboardInterrupt):
            run(own(folder), "interrupted", make)
    else:
        outcome = run(own(folder), "interrupted", make)
        assert outcome.reason == "rank 0: KeyboardInterrupt"


def _different_keys(folder: Path) -> None:
    """Ranks with different graphs (a stage each) make one each; if one fails, both do."""
    for error in (None, ValueError("no")):
        make = Maker(error=error if dist.get_rank() == 1 else None)
        own_key = ArtifactKey({"rank": dist.get_rank(), "fails": error is not None})
        outcome = obtain(Store(folder / "stages"), own_key, make, ranks=Ranks("stages", timeout=60))
        assert make.calls == 1
        assert outcome.how == ("made" if error is None else "failed")


def _together(folder: Path) -> None:
    """A compile that communicates runs on all ranks or on none, also where one has a hit."""
    store, make = own(folder), Maker()
    if dist.get_rank() == 0:
        store.save(key("together"), FILES, {})
    communicating = Maker()
    communicating.__class__ = type("Communicating", (Maker,), {"__call__": _reducing})
    assert run(store, "together", communicating, together=True).how == "made"
    assert communicating.calls == 1
    assert run(store, "together", make, together=True).how == "hit"
    assert make.calls == 0


def _reducing(make: Maker) -> Made:
    dist.all_reduce(torch.ones(1))
    return Maker.__call__(make)


def _absent(folder: Path) -> None:
    """A rank that never comes is an error after the timeout, not a wait for ever."""
    if dist.get_rank() == 0:
        with pytest.raises(RankTimeout, match=r"no answer from another rank within 0\.2 s"):
            obtain(own(folder), key("absent"), Maker(), ranks=Ranks("absent", timeout=0.2))


def _nothing_left(folder: Path) -> None:
    """What was sent through the group's store is freed."""
    ranks = Ranks("freed", timeout=60)
    outcome = obtain(None, key("freed"), Maker(), ranks=ranks)
    assert outcome.artifact is not None
    ranks.gather(None)
    assert not compat.default_store().check([f"{ranks._prefix}/from0/0"])


CHECKS: dict[str, Callable[[Path], None]] = {
    **{
        f"{a}_{b}": lambda folder, a=a, b=b: _scenario(folder, a, b)
        for a, b in (("miss", "miss"), ("hit", "miss"), ("miss", "hit"), ("corrupt", "hit"), ("hit", "corrupt"))
    },
    "shared": _shared,
    "no_store": _no_store,
    "slow": _slow,
    "late": _late,
    "raises": _raises,
    "interrupted": _interrupted,
    "different_keys": _different_keys,
    "together": _together,
    "absent": _absent,
    "nothing_left": _nothing_left,
}


def _rank(rank: int, folder: str) -> None:
    """One of two processes; writes down what each check raised."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("error", PolicyWarning)
    store = f"file://{folder}/store"
    timeout = timedelta(seconds=GROUP_SECONDS)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
    try:
        for name, check in CHECKS.items():
            try:
                check(Path(folder))
                found = "passed"
            except BaseException:
                found = traceback.format_exc()
            Path(folder, f"{name}.{rank}").write_text(found)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both processes run all checks, as starting them takes longer than the checks; they are killed at the deadline."""
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
