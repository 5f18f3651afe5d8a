"""Hazards: whatever changes after a component was compiled, the policy gives eager's answer.

The fast tests run a sample of the hazards under the policy, the slow ones the rest, each on one architecture
(neighbours on different ones); one slow test runs the whole matrix and holds ``docs/safety.md`` to it. See the package
`hazards` beside this file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hazards.case import ARCHITECTURES
from hazards.isolated import Died, isolated
from hazards.judge import Outcome, Run, same, verdict
from hazards.table import HAZARDS, KINDS, lines, written

from compile_policy_transformers.tiny import tiny_inputs, tiny_model

ROOT = Path(__file__).resolve().parents[1]

#: Hazards that are not mastered yet, each with the reason. One that is mended fails its test until it is taken out.
OPEN: dict[str, str] = {}


def _run(*arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(ROOT / part) for part in ("tests", "", "backends"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "hazards", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)


#: A capture costs most of a second, so the fast suite takes one in three of the kinds that need no adapters or threads.
SHARE = 3
FAST = ("Arguments", "Sizes", "Caches", "Hooks", "Attributes and configuration")
SAMPLE = tuple([h.name for kind in FAST for h in KINDS[kind].HAZARDS][::SHARE])
REST = tuple(h.name for h in HAZARDS if h.name not in SAMPLE)


@cache
def _rotated(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Hazards on one architecture each, in a process of their own: some change torch itself."""
    done = _run("--rotate", json.dumps(names), seconds=1700)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _parameters(names: tuple[str, ...]) -> list[Any]:
    marks = {name: [pytest.mark.xfail(reason=OPEN[name], strict=True)] for name in names if name in OPEN}
    return [pytest.param(name, marks=marks.get(name, [])) for name in names]


def _holds(name: str, found: dict[str, Any]) -> None:
    """Eager's result or eager's error; the event of a new graph names what differed, with its values."""
    hazard = next(h for h in HAZARDS if h.name == name)
    assert not found["first"], "the call before the change is a good one"
    assert found["kind"] == "ok", f"{found['kind']} on {found['architecture']}: {found['how']}"
    if found["graphs"] and hazard.differs:
        told = "; ".join(found["told"])
        assert all(word in told for word in hazard.differs), told


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", _parameters(SAMPLE))
def test_hazard(name: str) -> None:
    """A sample of the hazards, neighbours on different architectures."""
    _holds(name, _rotated(SAMPLE)[name])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", _parameters(REST))
def test_other_hazard(name: str) -> None:
    """The rest of them."""
    _holds(name, _rotated(REST)[name])


def test_names_are_unique() -> None:
    """Sixty hazards at least, each told from the others by its name."""
    assert len({h.name for h in HAZARDS}) == len(HAZARDS) >= 60


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_comparison_bites(architecture: str) -> None:
    """Control: with these weights a padding mask that is ignored, or one more epsilon, is a wrong result."""
    model = tiny_model(architecture)
    inputs = tiny_inputs(model, text_len=9, batch=2)
    with torch.no_grad():
        want = Outcome([model(**inputs).logits[:, -1]])
        ignored = Outcome([model(**{**inputs, "attention_mask": None}).logits[:, -1]])
        again = Outcome([model(**inputs).logits[:, -1]])
    assert same(again, want) and not same(ignored, want)


def test_verdicts() -> None:
    """Equal is ok, also as the same error; another error raises; another number, or a number for an error, is wrong."""
    one, two, error = Outcome([torch.ones(2)]), Outcome([torch.full((2,), 2.0)]), Outcome(error="ValueError: no")
    other = Outcome(error="KeyError: no")

    def kind(got: Outcome, want: Outcome) -> str:
        return verdict(Run(one, got, one), Run(one, want, one)).kind

    assert kind(one, one) == kind(error, error) == "ok"
    assert kind(error, one) == kind(other, error) == "raises"
    assert kind(two, one) == kind(one, error) == kind(Outcome([]), one) == "wrong"
    assert kind(Outcome([torch.ones(2, dtype=torch.float64)]), one) == "wrong"
    assert kind(Outcome([torch.full((2,), float("nan"))]), one) == "wrong"


def test_a_process_of_its_own() -> None:
    """What is changed inside is as it was outside; a crash and a hang are told from a result."""
    changed: list[int] = []
    assert isolated(lambda: [changed.append(1), len(changed)][1], 30) == 1 and changed == []
    with pytest.raises(Died, match="without a result"):
        isolated(lambda: os._exit(3), 30)
    with pytest.raises(Died, match="too long"):
        isolated(lambda: __import__("time").sleep(30), 0.2)
    with pytest.raises(Died, match="ZeroDivisionError"):
        isolated(lambda: 1 // 0, 30)


def test_every_hazard_is_on_the_page() -> None:
    """The page was written from these definitions: a hazard that was added, renamed or taken out is noticed."""
    page = written()
    rows = [line.split("**")[1] for line in page if line.startswith("| **") and ": " in line]
    assert rows == [h.name for h in HAZARDS]
    assert lines.__doc__


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_written_table_is_true() -> None:
    """The whole matrix, run again, gives the table that is in the documentation."""
    done = _run("--check", seconds=3500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
