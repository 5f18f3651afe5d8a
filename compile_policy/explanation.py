"""What an explanation consists of: plain records that travel as dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from compile_policy.failure import Failure


@dataclass(frozen=True)
class DynamicDim:
    """A size that may differ between calls of one graph.

    Attributes:
        label: its name; ``a+b`` is as long as both together.
        where: the dims that have it, as ``argument dim``.
        origin: ``annotation`` of ``forward``, ``decorator``, ``configuration``, ``rule`` of the backend, or ``probe``.
        meaning: what it counts.
    """

    label: str
    where: tuple[str, ...]
    origin: str
    meaning: str


@dataclass(frozen=True)
class Another:
    """Something that another graph would be needed for: what it is now, and how to avoid it."""

    what: str
    now: str
    remedy: str


@dataclass(frozen=True)
class EntryExplained:
    """One graph of a component.

    Attributes:
        because: what differs from the graph before; empty for the first.
        road: ``ahead`` of time or ``jit``; ``why_jit`` says why not ahead although that was tried.
        depth: which layers were traced for others, or why none was.
        key: arguments, fixed sizes and modes that a call must share.
        conditions: what it assumes about sizes beyond that, in words.
        guards: what covers Dynamo's guards -> how many; ``unclassified`` where nobody has said.
    """

    number: int
    because: str
    road: str
    why_jit: str
    depth: str
    seconds: float
    calls: int
    ops: int
    max_error: float
    key: dict[str, Any]
    conditions: tuple[str, ...]
    guards: dict[str, int]


@dataclass(frozen=True)
class ComponentExplained:
    """All about one component.

    Attributes:
        facts: what the model itself says, where the plan differs from it.
        sizes: tensor -> its sizes; a label where a size varies, a number where it is part of the call key.
        dims: the labels; ``dims_unknown`` says why they are not known yet.
        another: what would need another graph.
        graphs, loaded, calls, eager_calls, compile_seconds, fallback: as in `ComponentReport`.
        failure: what stood in the way of a compile.
        entries: the graphs that there are.
    """

    role: str
    qualname: str
    cls: str
    decision: str
    reason: str
    remedy: str = ""
    facts: tuple[str, ...] = ()
    sizes: Mapping[str, list[int | str]] = field(default_factory=dict)
    dims: tuple[DynamicDim, ...] = ()
    dims_unknown: str = ""
    another: tuple[Another, ...] = ()
    graphs: int = 0
    loaded: int = 0
    calls: int = 0
    eager_calls: int = 0
    compile_seconds: float = 0.0
    fallback: str | None = None
    failure: Failure | None = None
    entries: tuple[EntryExplained, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """All about one model; ``ran`` says whether a run is part of it."""

    model_cls: str
    ran: bool
    components: tuple[ComponentExplained, ...]
    facts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
