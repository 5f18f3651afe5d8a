"""Several threads, and processes that fork."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from .case import Case, Hazard, behind, chunk, forward, prompt, prompt_inputs

THREADS = 8


def _together(work: list[Callable[[], Any]]) -> list[Any]:
    """Results of functions that start together, each in a thread of its own."""
    results: list[Any] = [None] * len(work)
    gate = threading.Barrier(len(work))

    def run(i: int) -> None:
        gate.wait()
        try:
            results[i] = work[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = next((r for r in results if isinstance(r, Exception)), None)
    if failed is not None:
        raise failed
    return results


def _call(case: Case, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return case.model(**copy.deepcopy(inputs)).logits[:, -1]  # type: ignore[no-any-return]


def _each_its_own(case: Case) -> Any:
    """Threads with calls of other sizes, with and without caches."""
    if not case.kept.get("many"):
        return forward(case)
    calls = []
    for i in range(THREADS):
        if i % 2:
            calls.append({**prompt_inputs(case, seed=i, batch=1 + i % 3, text_len=5 + i), "use_cache": False})
        else:
            calls.append(behind(case, DynamicCache(config=case.text_config), batch=1 + i % 3, new=1 + i, seed=i))
    return _together([lambda inputs=inputs: _call(case, inputs) for inputs in calls])  # type: ignore[misc]


def _with_and_without_gradients(case: Case) -> Any:
    if not case.kept.get("many"):
        return forward(case)

    def differentiated() -> Any:
        with torch.enable_grad():
            return case.model(**copy.deepcopy(case.inputs)).logits.requires_grad

    def not_differentiated() -> Any:
        with torch.no_grad():
            return case.model(**copy.deepcopy(case.inputs)).logits.requires_grad

    return [torch.tensor(r) for r in _together([differentiated, not_differentiated] * 4)]


def _autocast_elsewhere(case: Case) -> Any:
    """Autocast is on in other threads only."""
    if not case.kept.get("many"):
        return forward(case)

    def lower() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return _call(case, case.inputs)

    return _together([lower, lambda: _call(case, case.inputs)] * 4)


def _in_a_fork(case: Case) -> Any:
    """A call of another kind in a forked child."""
    if not case.kept.get("many"):
        return forward(case)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            result = _call(case, {**case.inputs, "output_hidden_states": True})
            os.write(writing, result.numpy().tobytes())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    data = b""
    while piece := os.read(reading, 1 << 16):
        data += piece
    os.waitpid(child, 0)
    return torch.frombuffer(bytearray(data), dtype=torch.float32) if data else RuntimeError("the child said nothing")


def _many(case: Case) -> None:
    case.kept["many"] = True


HAZARDS = [
    Hazard("eight threads", "Calls of many sizes from eight threads at once.", _many, chunk, _each_its_own),
    Hazard(
        "threads with and without gradients",
        "Gradient mode differs between threads.",
        _many,
        prompt,
        _with_and_without_gradients,
    ),
    Hazard("autocast in other threads", "Autocast is on in every other thread.", _many, prompt, _autocast_elsewhere),
    Hazard("forked child", "A new kind of call in a child of the process.", _many, prompt, _in_a_fork),
]
