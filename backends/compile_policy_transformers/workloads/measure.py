"""A workload run in three ways, and what is said about it: equal to eager, graphs, eager calls, reason."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from compile_policy.errors import first_line
from compile_policy.events import Event, listening
from compile_policy.failure import failure_of
from compile_policy_transformers.workloads.registry import SECTIONS, WORKLOADS
from compile_policy_transformers.workloads.workload import Trial, Way, Workload

#: A tensor that is small beside the others of its name is measured by a share of the largest of them.
SMALL = 1e-3
#: Error where something else came out: other tokens, another shape, infinity. JSON knows no infinite number.
OTHER = 1e9


@dataclass(frozen=True)
class Result:
    """What happened in one way.

    Attributes:
        state: ``equal``, ``wrong``, ``raises``, ``eager raises`` (there is nothing to be equal to) or ``missing`` (a
            package that the workload needs).
        error: largest error, see `error`.
        reason: why not equal, why eager, or what the last new graph was for.
    """

    state: str
    graphs: int = 0
    calls: int = 0
    eager_calls: int = 0
    error: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """One workload; ``control`` is the error that its mistake makes."""

    workload: str
    section: str
    what: str
    mistake: str
    tolerance: float
    control: float
    policy: Result
    stock: Result | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def names() -> list[str]:
    return list(WORKLOADS)


def measure(name: str, *, stock: bool = True, store: Path | None = None, **wishes: Any) -> Row:
    """Run a workload eager, with its mistake, under the policy and, if asked, with stock `torch.compile`.

    Args:
        name: of the workload.
        stock: run that way too.
        store: where the policy keeps compiled code; an empty folder when left out.
        wishes: fields of the configuration; the table is made without any.
    """
    workload = WORKLOADS[name]
    section = next(title for title, found in SECTIONS.items() if workload in found)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lab = _Lab(Path(folder), store or Path(folder, "store"), wishes)
        return _measured(workload, section, lab, stock)


@dataclass(frozen=True)
class _Lab:
    """Where trials are made: a folder for theirs, the store that they share, and the policy's configuration."""

    folder: Path
    store: Path
    wishes: Mapping[str, Any]

    def trial(self, way: Way, mistaken: bool = False) -> Trial:
        return Trial(way, Path(tempfile.mkdtemp(dir=self.folder)), self.store, mistaken, dict(self.wishes))


def _measured(workload: Workload, section: str, lab: _Lab, stock: bool) -> Row:
    def row(policy: Result, beside: Result | None = None, control: float = 0.0) -> Row:
        told = (workload.name, section, workload.what, workload.mistake, workload.tolerance, control)
        return Row(*told, policy, beside)

    missing = [package for package in workload.needs if importlib.util.find_spec(package) is None]
    if missing:
        return row(Result("missing", reason=f"{', '.join(missing)} is not installed"))
    want = _run(workload, lab.trial("eager"))
    if isinstance(want, Exception):
        return row(Result("eager raises", reason=_cause(want)))
    mistaken = _run(workload, lab.trial("eager", mistaken=True))
    control = OTHER if isinstance(mistaken, Exception) else error(mistaken.results, want.results)
    policy = _judged(workload, lab.trial("policy"), want)
    return row(policy, _judged(workload, lab.trial("stock"), want) if stock else None, control)


def _run(workload: Workload, trial: Trial) -> Trial | Exception:
    """The trial, or what it raised."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    try:
        workload.run(trial)
    except TimeoutError:  # of the measurement, which says nothing about the workload
        trial.close()
        raise
    except Exception as raised:
        trial.close()
        return raised
    return trial


def _judged(workload: Workload, trial: Trial, want: Trial) -> Result:
    told: list[Event] = []
    with listening(told.append):
        got = _run(workload, trial)
    if isinstance(got, Exception):
        return Result("raises", reason=_cause(got))
    found = error(got.results, want.results)
    counts = got.counts()
    got.close()
    numbers: dict[str, Any] = {"graphs": counts.graphs, "calls": counts.calls, "eager_calls": counts.eager_calls}
    if found > workload.tolerance:
        return Result("wrong", **numbers, error=found)
    return Result("equal", **numbers, error=found, reason=_reason(told, counts.eager_calls, counts.graphs))


def _reason(told: Sequence[Event], eager_calls: int, graphs: int) -> str:
    """Why calls ran eager; else what the graphs beside the first are for."""
    fallbacks = [event.data["reason"] for event in told if event.kind == "fallback"]
    if eager_calls and fallbacks:
        return str(fallbacks[0])
    new = dict.fromkeys(str(event.data["difference"]) for event in told if event.kind == "new_entry")
    return "; ".join(new) if graphs > 1 else ""


def _cause(raised: BaseException) -> str:
    """An exception in a sentence."""
    found = failure_of(raised)
    return found.cause if found.error else first_line(raised)


def error(got: Mapping[str, Sequence[torch.Tensor]], want: Mapping[str, Sequence[torch.Tensor]]) -> float:
    """Largest error of all results; `OTHER` where what came out is no number that is a little off.

    That of a tensor is max abs(got - want) / max abs(want), or a thousandth of the largest number among the tensors
    of its name where that is more: a gradient that is zero but for rounding is measured by its neighbours. Integers
    and flags must be equal, and so must names, shapes, dtypes and places of NaN and infinity.
    """
    if got.keys() != want.keys() or any(len(got[name]) != len(want[name]) for name in want):
        return OTHER
    worst = 0.0
    for name, expected in want.items():
        largest = max((_largest(t) for t in expected), default=0.0)
        for one, other in zip(got[name], expected, strict=True):
            worst = max(worst, _error(one, other, largest * SMALL))
    return worst


def _largest(t: torch.Tensor) -> float:
    finite = t[t.isfinite()] if t.is_floating_point() else t.new_empty(0)
    return float(finite.abs().max()) if finite.numel() else 0.0


def _error(got: torch.Tensor, want: torch.Tensor, least: float) -> float:
    if got.shape != want.shape or got.dtype != want.dtype:
        return OTHER
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else OTHER
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite) or not torch.equal(_rest(got, finite), _rest(want, finite)):
        return OTHER
    if not finite.any():
        return 0.0
    off = float((got[finite].double() - want[finite].double()).abs().max())
    scale = max(_largest(want), least)
    return off / scale if scale else (0.0 if off == 0.0 else OTHER)


def _rest(t: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(t[~finite], nan=0.0, posinf=1.0, neginf=-1.0)
