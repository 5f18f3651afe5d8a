"""A component's graph as a test looks at it."""

from __future__ import annotations

from dataclasses import dataclass

from compile_policy.explain import EntryExplained


@dataclass(frozen=True)
class Captured:
    """One captured graph.

    Attributes:
        component: role and path.
        code: the graph as Python text, the model's line beside each operation.
        ops: kinds of its operations, in order.
        lines: the model's line of each operation, as ``file:line code``; empty where unknown.
        sizes: tensor of the call -> its sizes, a label where one varies.
        conditions: what the graph assumes about sizes beyond its labels, in words.
        entry: all else that is known of it.
    """

    component: str
    code: str
    ops: tuple[str, ...]
    lines: tuple[str, ...]
    sizes: dict[str, list[int | str]]
    conditions: tuple[str, ...]
    entry: EntryExplained
