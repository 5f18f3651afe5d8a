"""What is compiled and why: data only.

A `Plan` lists the components of one model, each with a decision and its reason; a `Report` adds what happened
since. Both print as tables elsewhere and travel as plain dictionaries.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Decision = Literal["compile", "eager", "skip"]


@dataclass(frozen=True)
class Component:
    """One part of a model that has a role.

    Attributes:
        role: ``decoder``, ``encoder[image]`` (or ``video``, ``audio``), ``projector``, ``head`` or ``draft``.
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


@dataclass(frozen=True)
class Report:
    """What the policy did for one model so far."""

    components: tuple[ComponentReport, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"components": [asdict(c) for c in self.components], "notes": list(self.notes)}
