"""Run hazards on one architecture in one way."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree

from compile_policy import events
from compile_policy.applied import regions
from compile_policy_transformers.tiny import tiny_model

from .case import Case, Hazard
from .isolated import Died, isolated
from .ways import Way

SECONDS = 120.0


@dataclass(frozen=True)
class Outcome:
    """What a call gave: tensors, or an error."""

    tensors: list[torch.Tensor] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class Run:
    """A hazard, run.

    Attributes:
        first, second: outcome before and after the change.
        unchanged: outcome of a second call where nothing has changed.
        graphs: graphs that the second call needed.
        reason: why it ran eager, where it did.
        told: what the events said of each new graph.
    """

    first: Outcome
    second: Outcome
    unchanged: Outcome
    graphs: int = 0
    reason: str = ""
    told: tuple[str, ...] = ()


def drive(architecture: str, way: Way, hazards: Sequence[Hazard]) -> dict[str, Run]:
    """Run each hazard in a separate process; those that begin with the same first call share it."""
    found: dict[str, Run] = {}
    for group in _with_the_same_first_call(h for h in hazards if not h.only or architecture in h.only):

        def run(group: Sequence[Hazard] = group) -> dict[str, Run]:
            return _run_group(architecture, way, group)

        try:
            found |= isolated(run, SECONDS * len(group))
        except Died as died:
            found |= {h.name: _lost(str(died)) for h in group}
    return found


def _with_the_same_first_call(hazards: Iterable[Hazard]) -> Iterator[list[Hazard]]:
    groups: dict[Any, list[Hazard]] = {}
    for hazard in hazards:
        groups.setdefault((hazard.prepare, hazard.call), []).append(hazard)
    return iter(groups.values())


def _run_group(architecture: str, way: Way, group: Sequence[Hazard]) -> dict[str, Run]:
    warnings.simplefilter("ignore")
    case = Case(architecture, way, tiny_model(architecture))
    group[0].prepare(case)
    way.attach(case.base)
    first = outcome(lambda: group[0].call(case))
    unchanged = isolated(lambda: outcome(lambda: group[0].call(case)), SECONDS)

    def after(hazard: Hazard) -> Run:
        try:
            return isolated(lambda: _after_change(case, hazard, first, unchanged), SECONDS)
        except Died as died:
            return _lost(str(died))

    return {hazard.name: after(hazard) for hazard in group}


def _after_change(case: Case, hazard: Hazard, first: Outcome, unchanged: Outcome) -> Run:
    torch.manual_seed(0)
    random.seed(0)
    hazard.change(case)
    heard: list[events.Event] = []
    before = _counts(case)
    with events.listening(heard.append):
        second = outcome(lambda: hazard.call(case))
    graphs, eager = (now - was for now, was in zip(_counts(case), before, strict=True))
    told = tuple(e.data["difference"] for e in heard if e.kind == "new_entry")
    reason = next((str(r.fallback) for r in regions(case.model) if r.fallback), "") if eager else ""
    return Run(first, second, unchanged, graphs, reason, told)


def _counts(case: Case) -> tuple[int, int]:
    """Graphs and eager calls of the decoder, as the policy counts them."""
    found = regions(case.model)
    return sum(r.graphs for r in found), sum(r.eager_calls for r in found)


def outcome(call: Callable[[], Any]) -> Outcome:
    """The tensors of a result, or its error in one line."""
    try:
        result = call()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Outcome(error=f"{type(error).__name__}: {lines[0][:200]}")
    tensors = [torch.as_tensor(t) for t in pytree.tree_leaves(result) if isinstance(t, (torch.Tensor, int, float))]
    return Outcome([t.detach().clone() for t in tensors])


def _lost(why: str) -> Run:
    lost = Outcome(error=f"Died: {why}")
    return Run(lost, lost, lost)
