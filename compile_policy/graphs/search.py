"""Finding operations in dumped graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from compile_policy.graphs.reading import DumpedEntry


@dataclass(frozen=True)
class Hit:
    """One operation that was found."""

    entry: str
    op: dict[str, Any]
    symbols: dict[str, dict[str, Any]] = field(default_factory=dict)


def find_ops(entries: Sequence[DumpedEntry], wanted: str) -> list[Hit]:
    """Operations whose kind is ``wanted``, else whose kind or name contains it."""
    hits = [Hit(entry.id, op, entry.symbols()) for entry in entries for op in entry.ops()]
    exact = [hit for hit in hits if wanted in (hit.op.get("op"), hit.op.get("name"))]
    return exact or [hit for hit in hits if wanted in str(hit.op.get("op")) or wanted in str(hit.op.get("name"))]
