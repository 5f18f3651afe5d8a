"""What differs between two captured graphs, aligned by operation and line of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from compile_policy.graphs.reading import DumpedEntry
from compile_policy.graphs.stats import code_of, line_of

Op = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """Operations that one side has where the other has none or others; equal runs are left out.

    Attributes:
        position: index of the operation in the first graph.
        removed: only in the first.
        added: only in the second.
    """

    position: int
    removed: tuple[Op, ...]
    added: tuple[Op, ...]


@dataclass(frozen=True)
class Difference:
    """All that differs between two entries, what differs first in front."""

    facts: tuple[tuple[str, str, str], ...]
    changes: tuple[Change, ...]

    def __bool__(self) -> bool:
        return bool(self.facts or self.changes)

    def to_dict(self) -> dict[str, Any]:
        facts = [{"what": what, "first": a, "second": b} for what, a, b in self.facts]
        return {"equal": not self, "facts": facts, "changes": [vars(change) for change in self.changes]}


def difference(first: DumpedEntry, second: DumpedEntry) -> Difference:
    """Compare keys, dims and operations.

    Names of operations and sizes' symbols are chosen by torch and say nothing; line numbers change with every edit
    of a file. So operations are alike when kind, module and the text of the model's line are.
    """
    a, b = first.ops(), second.ops()
    matcher = SequenceMatcher(None, [_alike(op) for op in a], [_alike(op) for op in b], autojunk=False)
    changes = tuple(
        Change(i1, tuple(a[i1:i2]), tuple(b[j1:j2])) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal"
    )
    return Difference(tuple(_facts(first.record, second.record)), changes)


def _alike(op: Op) -> tuple[str, ...]:
    place = line_of(op).rpartition(":")[0]
    return (str(op.get("op")), str(op.get("module")), place, code_of(op), _sizes(op.get("shape")))


def _sizes(shape: Any) -> str:
    """A shape in which every symbol is the same."""
    sizes = shape if isinstance(shape, list) else []
    return ",".join(str(s) if str(s).isdigit() else "*" for s in sizes)


def _facts(first: dict[str, Any], second: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Where the index says different things about the two."""
    for what in ("backend", "road", "inputs", "outputs", "conditions"):
        if first.get(what) != second.get(what):
            yield what, str(first.get(what)), str(second.get(what))
    for part in ("arguments", "modes", "structure"):
        yield from _unequal(f"key {part}", first.get("key", {}).get(part), second.get("key", {}).get(part))
    rows = [{row["path"]: row for row in record.get("arguments", [])} for record in (first, second)]
    for path in dict.fromkeys([*rows[0], *rows[1]]):
        mine, other = ({k: row.get(k) for k in ("dtype", "device", "dims")} for row in _rows(rows, path))
        if mine != other:
            yield path, _said(mine), _said(other)


def _rows(rows: Sequence[dict[str, Op]], path: str) -> Iterator[Op]:
    return (side.get(path, {}) for side in rows)


def _unequal(what: str, first: Any, second: Any) -> Iterator[tuple[str, str, str]]:
    if isinstance(first, dict) and isinstance(second, dict):
        for name in dict.fromkeys([*first, *second]):
            if first.get(name) != second.get(name):
                yield f"{what}: {name}", _said(first.get(name)), _said(second.get(name))
    elif first != second:
        yield what, _said(first), _said(second)


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(str(v) for v in value.values() if v is not None) or "absent"
    return "absent" if value is None else str(value)
