"""Verdicts have a kind: what was short for a moment is tried again, later and later; the rest is remembered."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from falling import falls_back
from torch import nn
from torch._inductor import cpu_vec_isa

from compile_policy import compat, verdicts
from compile_policy.errors import NotCompilable
from compile_policy.region import Region, RegionOptions, SignatureBinder
from compile_policy.verdicts import FIRST_WAIT, LONGEST_WAIT, Verdicts, passes


class Clock:
    """A clock that a test sets; `verdicts` reads it in place of the machine's."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(verdicts, "time", made)
    return made


PASSING = [
    MemoryError(),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EMFILE, "Too many open files"),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory"),
    RuntimeError("C++ compile error: g++: fatal error: Killed signal terminated program cc1plus"),
]
LASTING = [
    ValueError("no such kernel"),
    RuntimeError("expected size 7==3"),
    AssertionError(),
    OSError("odd"),
    KeyError("memory"),
]


@pytest.mark.parametrize("error", PASSING + LASTING, ids=lambda e: f"{type(e).__name__} {e}"[:40])
def test_what_passes(error: BaseException) -> None:
    assert passes(error) == (error in PASSING)


def _failed(cause: BaseException | None) -> NotCompilable:
    why = NotCompilable("it failed", remedy="Wait.")
    why.__cause__ = cause
    return why


def test_waits_grow_up_to_a_limit(clock: Clock) -> None:
    """Each failure doubles the wait; an attempt that took long waits longer; the time between costs nothing."""
    known = Verdicts()
    assert known.check("call") is False
    waits = []
    for _ in range(14):
        known.add("call", _failed(MemoryError()))
        start = clock.now
        with pytest.raises(NotCompilable, match="it failed"):
            known.check("call")
        while True:
            try:
                assert known.check("call") is True
                break
            except NotCompilable:
                clock.now += FIRST_WAIT / 2
        waits.append(clock.now - start)
    assert waits[:4] == [FIRST_WAIT, 2 * FIRST_WAIT, 4 * FIRST_WAIT, 8 * FIRST_WAIT]
    assert waits[-1] == LONGEST_WAIT and known.retries == 14
    known.forget("call")
    known.add("call", _failed(MemoryError()), seconds=30.0)
    clock.now += 59
    with pytest.raises(NotCompilable):
        known.check("call")
    clock.now += 1
    assert known.check("call")


def test_a_lasting_verdict_lasts(clock: Clock) -> None:
    """Without a passing cause it is never tried again; a passing one that turns out to be lasting becomes so."""
    known = Verdicts()
    for first in (None, ValueError("no such kernel"), MemoryError()):
        known.add(first, _failed(first))
        known.add(first, _failed(ValueError("no such kernel")))
        clock.now += 10 * LONGEST_WAIT
        with pytest.raises(NotCompilable):
            known.check(first)
    assert known.retries == 0


@dataclass(frozen=True)
class Options(RegionOptions):
    lower: Any = None

    def lowering(self) -> Any:
        return self.lower


class Short:
    """A lowering that lacks something so many times."""

    def __init__(self, error: BaseException, times: int) -> None:
        self.error, self.left = error, times

    def __call__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.left:
            self.left -= 1
            raise self.error
        return gm.forward

    def ahead(self, gm: torch.fx.GraphModule) -> bool:
        return False

    def takes_any_graph(self) -> bool:
        return False

    def jit(self) -> Short:
        return self


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.mark.parametrize("passing", [True, False])
def test_a_component_comes_back(clock: Clock, passing: bool) -> None:
    """After a MemoryError: eager, told once, compiled when the wait is over. After another error it stays eager."""
    error = MemoryError() if passing else ValueError("no such kernel")
    options = Options("eager", lower=Short(error, 2))
    ours = Region(Twice(), role="component", binder=SignatureBinder({"x": {0: None}}), options=options)
    ours.attach()
    x = torch.rand(3)
    with falls_back("compiling failed"):
        for _ in range(3):
            assert torch.equal(ours.module(x), x * 2)
        assert (ours.graphs, ours.eager_calls) == (1, 3)
        clock.now += 100 * LONGEST_WAIT
        for _ in range(2):
            assert torch.equal(ours.module(x), x * 2)
        assert (ours.graphs, ours.eager_calls) == ((2, 5) if passing else (1, 5))
        clock.now += 100 * LONGEST_WAIT
        assert torch.equal(ours.module(x), x * 2)
    row = ours.report()
    assert (row.graphs, row.eager_calls, row.retries) == ((3, 5, 2) if passing else (1, 6, 0))
    assert (ours.entry_count() == 1) == passing and row.state == "fell back"


def test_what_inductor_found_without_a_compiler_is_asked_again() -> None:
    """Its probes are cached, "no vector instructions" included."""
    cpu_vec_isa.valid_vec_isa_list()
    assert cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 1
    compat.forget_failed_probes()
    assert cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 0
    base = [value for name, value in vars(cpu_vec_isa.VecISA).items() if "bool__impl" in name]
    assert base and all(value.cache_info().currsize == 0 for value in base)
