"""What is compiled and why: data only.

A `Plan` lists the components of one model, each with a decision and its reason; a `Report` adds what happened
since. Both print as tables elsewhere and travel as plain dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Decision = Literal["compile", "eager", "skip"]
#: What a component does in effect: ``idle`` is one that is to be compiled and of which no call has ended yet.
State = Literal["compiled", "eager", "fell back", "idle"]


@dataclass(frozen=True)
class Component:
    """One part of a model that has a role.

    Attributes:
        role: ``decoder``, ``encoder[image]`` (or ``video``, ``audio``, ``text``), ``projector``, ``head`` or ``draft``.
        qualname: dotted path below the model; empty for the model itself.
        cls: name of its class.
        decision: ``compile``, ``eager`` or ``skip``.
        reason: one sentence that says why.
        remedy: one sentence that says what would change it; empty when nothing has to.
    """

    role: str
    qualname: str
    cls: str
    decision: Decision
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Plan:
    """The decision for every component of one model; ``notes`` holds what concerns the model as a whole."""

    model_cls: str
    components: tuple[Component, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "model_cls": self.model_cls,
            "components": [asdict(c) for c in self.components],
            "notes": list(self.notes),
        }

    def compiled(self) -> tuple[Component, ...]:
        return tuple(c for c in self.components if c.decision == "compile")

    def __str__(self) -> str:
        rows = [(c.role, c.qualname, c.cls, c.decision, c.reason) for c in self.components]
        lines = aligned(("component", "path", "class", "decision", "reason"), rows)
        lines += [f"{c.role}: {c.remedy}" for c in self.components if c.remedy]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class ComponentReport:
    """One row of a report: the plan's decision and what happened since ``apply``.

    Attributes:
        graphs: how often the component was captured (traced), whatever the road; retries count.
        loaded: how many entries came from the store instead.
        calls: calls of the component, compiled or not.
        eager_calls: those of them that ran eager.
        compile_seconds: wall-clock seconds spent on capture and lowering.
        fallback: why the component runs eager although it was to be compiled; ``None`` when it doesn't.
        blocks: how many blocks of its graph are the same code, in words; ``None`` when the graph is in one piece,
            unless level 1 asked for blocks alone.
        state: ``compiled``: every call so far was; ``fell back``: at least one ran eager although it was to be
            compiled; ``eager``: as planned; ``idle``: to be compiled, but no call has ended yet.
        fallbacks: reason -> calls that ran eager for it; calls that raised are in none.
        remedy: what would change the last fallback, or the plan's decision; empty when nothing has to.
        retries: how often a compile that failed for want of memory, room or a compiler was tried again.
    """

    role: str
    qualname: str
    cls: str
    decision: Decision
    reason: str
    graphs: int = 0
    calls: int = 0
    eager_calls: int = 0
    compile_seconds: float = 0.0
    fallback: str | None = None
    loaded: int = 0
    blocks: str | None = None
    state: State = "eager"
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    remedy: str = ""
    retries: int = 0

    def told(self) -> list[str]:
        """What went wrong, one line a reason, and the remedy of the last; empty when nothing did."""
        name = f"{self.role} {self.qualname}".strip()
        lines = [f"{name} fell back in {_of(n, self.calls)}: {reason}" for reason, n in self.fallbacks.items()]
        return [*lines, f"  {self.remedy}"] if lines and self.remedy else lines


@dataclass(frozen=True)
class Report:
    """What the policy did for one model so far."""

    components: tuple[ComponentReport, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"components": [asdict(c) for c in self.components], "notes": list(self.notes)}

    def __str__(self) -> str:
        lines = aligned(_TITLES, [_cells(c) for c in self.components])
        lines += [line for c in self.components for line in c.told()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


_TITLES = ("component", "path", "class", "state", "calls", "eager", "graphs", "loaded", "compile s")


def _cells(row: ComponentReport) -> tuple[str, ...]:
    """A row of a report as text; calls of what is eager by plan are not counted."""
    name = (row.role, row.qualname, row.cls, row.state)
    if row.decision != "compile":
        return (*name, "-", "-", "-", "-", "-")
    counts = (row.calls, row.eager_calls, row.graphs, row.loaded)
    return (*name, *map(str, counts), f"{row.compile_seconds:.1f}")


def aligned(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a plain table: columns two blanks apart, counts to the right."""
    table = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for cells in table:
        padded = [
            cell.rjust(width) if title in _COUNTED else cell.ljust(width)
            for title, cell, width in zip(titles, cells, widths, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


_COUNTED = frozenset(_TITLES[4:])


def _of(part: int, whole: int) -> str:
    noun = "call" if whole == 1 else "calls"
    return f"{part} of {whole} {noun}"
