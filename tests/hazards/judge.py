"""Compare a way of compiling with eager: equal, an error, or silently wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from compile_policy.reference import relative_error

from .drive import Outcome, Run

Kind = Literal["ok", "raises", "wrong"]
#: Ways capture and do not lower, so that only the order of additions differs; attention may run in another kernel.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Verdict:
    """What became of a hazard in one way on one architecture.

    Attributes:
        how: how it came out right, or what was raised, or what was wrong.
        before: it was no better before the change, so that the change is not the reason.
    """

    kind: Kind
    how: str = ""
    before: bool = False


def error_between(got: Outcome, want: Outcome, rounding: float = 0.0) -> float:
    """Largest relative error of the tensors in units of the tolerance; infinite where they cannot be compared."""
    if len(got.tensors) != len(want.tensors) or got.error or want.error:
        return float("inf")
    errors = [
        relative_error(a, b) / max(TOLERANCE.get(b.dtype, 1e-9), rounding)
        for a, b in zip(got.tensors, want.tensors, strict=True)
    ]
    return max(errors, default=0.0)


def same(got: Outcome, want: Outcome, rounding: float = 0.0) -> bool:
    """Equal within the tolerance, or the same error."""
    if got.error or want.error:
        return got.error == want.error
    return error_between(got, want, rounding) <= 1.0


def bites(eager: Run) -> bool:
    """The control: eager gives another result with the change than without."""
    return not same(eager.second, eager.unchanged)


def verdict(run: Run, eager: Run, rounding: float = 0.0) -> Verdict:
    """What became of a hazard, given the same run eager."""
    if same(run.second, eager.second, rounding):
        return Verdict("ok", _how(run))
    before = not same(run.first, eager.first, rounding) or not same(run.unchanged, eager.unchanged, rounding)
    if run.second.error:
        return Verdict("raises", run.second.error, before)
    if eager.second.error:
        return Verdict("wrong", f"eager raises {eager.second.error}", before)
    return Verdict("wrong", f"off by {error_between(run.second, eager.second) * 1e-4:.2g}", before)


def _how(run: Run) -> str:
    if run.second.error:
        return f"raises as eager does: {run.second.error}"
    if run.reason:
        return f"eager: {run.reason}"
    return "new graph" if run.graphs else "same graph"
