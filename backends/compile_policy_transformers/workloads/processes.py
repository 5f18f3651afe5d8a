"""Workloads of several processes: a store that the next one starts from, and two ranks that train."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from compile_policy_transformers.workloads.batches import batch, llama, sgd
from compile_policy_transformers.workloads.caches import asked
from compile_policy_transformers.workloads.workload import Counts, Trial, Way, Workload

#: Seconds after which a rank that waits for another one gives up.
WATCHDOG = 60
#: Seconds for all that a process does.
PATIENCE = 240


def two_processes(trial: Trial) -> None:
    """The same answers in two processes, one after the other, with one store."""
    for number in range(2):
        _run(trial, 1, _answer, f"answers {number}")


def ranks(trial: Trial) -> None:
    """Two ranks on gloo, each with other batch sizes; gradients are means of both."""
    _run(trial, 2, _train_rank, "ranks")


def _run(trial: Trial, count: int, target: Any, name: str) -> None:
    """Run ``target`` in ``count`` processes and keep what they write down.

    Raises:
        TimeoutError: they have not ended in time; they are killed.
    """
    folder = trial.folder / name
    folder.mkdir()
    setting = (folder, trial.store, trial.way, trial.mistaken, trial.wishes, count)
    spawner: Any = torch.multiprocessing
    context = spawner.start_processes(target, setting, nprocs=count, join=False, start_method="spawn")
    until = datetime.datetime.now() + datetime.timedelta(seconds=PATIENCE)
    try:
        while not context.join(timeout=5):
            if datetime.datetime.now() > until:
                raise TimeoutError(f"{count} processes took longer than {PATIENCE} s")
    finally:
        for process in context.processes:
            process.kill()
    for rank in range(count):
        found = torch.load(folder / f"{rank}.pt")
        for kind, tensors in found["results"].items():
            trial.keep(kind, *tensors)
        trial.elsewhere.append(Counts(*found["counts"]))


def _answer(rank: int, folder: Path, store: Path, way: Way, mistaken: bool, wishes: dict[str, Any], count: int) -> None:
    trial = Trial(way, folder, store, mistaken, wishes)
    asked(trial, trial.compiled(llama()))
    _write(trial, rank)


def _train_rank(
    rank: int, folder: Path, store: Path, way: Way, mistaken: bool, wishes: dict[str, Any], count: int
) -> None:
    torch.set_num_threads(1)
    trial = Trial(way, folder, store, mistaken, wishes)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=WATCHDOG),
    )
    try:
        _steps(trial, rank)
    finally:
        dist.destroy_process_group()
    _write(trial, rank)


def _steps(trial: Trial, rank: int) -> None:
    model = trial.compiled(llama()).train()
    parallel: Any = DistributedDataParallel(model)
    optimizer = sgd(model)
    for step, shape in enumerate((((2, 9), (1, 6)), ((3, 7), (2, 12)), ((1, 5), (2, 9)))):
        rows, tokens = shape[rank]
        loss = parallel(**batch(rows, tokens, 1 - step if trial.mistaken else step)).loss
        loss.backward()
        trial.keep("losses", loss)
        trial.keep_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    trial.keep_weights(model)


def _write(trial: Trial, rank: int) -> None:
    counts = trial.counts()
    numbers = (counts.graphs, counts.calls, counts.eager_calls)
    torch.save({"results": trial.results, "counts": numbers}, trial.folder / f"{rank}.pt")


WORKLOADS = (
    Workload("two processes", "One after the other, with one store.", "padding is seen", two_processes),
    Workload("two ranks", "DDP on gloo; other sizes on each rank.", "other texts", ranks),
)
