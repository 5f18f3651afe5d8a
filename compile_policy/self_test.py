"""A short test of what every compiled component relies on, for versions that the tests have not run on.

A tiny module is compiled with the backend ``eager``: what is tested is how Dynamo and Python behave, not a compiler.
Nothing outside is changed, the random state included.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch

from compile_policy.binder import SignatureBinder
from compile_policy.errors import PolicyWarning, first_line
from compile_policy.options import RegionOptions
from compile_policy.region import Region
from compile_policy.shapes import infer_dynamic_arg_dims

#: Name of a check, whether it passed, and what was seen.
Result = tuple[str, bool, str]
_WIDTH = 4


class _Scores(torch.nn.Module):
    """Softmax of scores under a mask, times an attribute."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.linspace(-1.0, 1.0, _WIDTH * _WIDTH).view(_WIDTH, _WIDTH)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.scale = 2.0

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        scores = x @ self.weight
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e9)
        return scores.softmax(dim=-1) * self.scale


class _Trial:
    """One compiled `_Scores`, asked the same as an eager call."""

    def __init__(self) -> None:
        self.module = _Scores()
        binder = SignatureBinder(infer_dynamic_arg_dims(_Scores))
        options = RegionOptions(backend="eager")
        self.region = Region(self.module, role="self-test", binder=binder, options=options)
        self.region.attach()

    def call(self, rows: int, mask: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> str:
        """What differs from eager; empty where nothing does."""
        x = torch.linspace(-2.0, 2.0, rows * _WIDTH).view(rows, _WIDTH).to(dtype)
        eager_before = self.region.eager_calls
        with torch.no_grad():
            got = self.module(x, mask)
            want = self.module.forward(x, mask)
        if self.region.eager_calls != eager_before:
            return f"ran eager: {self.region.fallback}"
        if not torch.equal(got, want):
            return f"differs from eager by {(got - want).abs().max().item():.2g}"
        return ""


def self_test() -> list[Result]:
    """Run each check: (name, passed, what was seen)."""
    checks: dict[str, Callable[[], str]] = {
        "attribute change": _attribute_change,
        "mask change": _mask_change,
        "recompile": _recompile,
    }
    return [_run(name, check) for name, check in checks.items()]


def failures(results: Iterable[Result]) -> str:
    """The checks that failed, in words; empty where all passed."""
    return "; ".join(f"{name}: {detail}" for name, passed, detail in results if not passed)


def _run(name: str, check: Callable[[], str]) -> Result:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PolicyWarning)
            wrong = check()
    except Exception as error:
        wrong = first_line(error)
    return name, not wrong, wrong or "as eager"


def _attribute_change() -> str:
    """A plain attribute that `forward` reads is written between two calls."""
    trial = _Trial()
    wrong = trial.call(3)
    trial.module.scale = 5.0
    return wrong or trial.call(3)


def _mask_change() -> str:
    """No mask, a mask, and a mask of other values."""
    trial = _Trial()
    opened = torch.ones(3, _WIDTH, dtype=torch.bool)
    closed = opened.clone()
    closed[:, 1] = False
    for mask in (None, opened, closed):
        if wrong := trial.call(3, mask):
            return wrong
    return ""


def _recompile() -> str:
    """Other sizes share a graph, another dtype gets its own."""
    trial = _Trial()
    for rows in (3, 5, 1):
        if wrong := trial.call(rows):
            return wrong
    if trial.region.graphs != 1:
        return f"{trial.region.graphs} graphs for three sizes"
    trial.module.double()
    wrong = trial.call(3, dtype=torch.float64)
    if not wrong and trial.region.graphs != 2:
        return f"{trial.region.graphs} graphs for two dtypes"
    return wrong
