"""What differs between two captured graphs, aligned by operation and line of the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from compile_policy.graphs.folding import without_numbers
from compile_policy.graphs.reading import DumpedEntry
from compile_policy.graphs.sizes import type_of
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

    @property
    def first(self) -> str:
        """What differs first, in a sentence: in the graph, else in the calls; empty where nothing does."""
        if not self.changes:
            return "{}: {} -> {}".format(*self.facts[0]) if self.facts else ""
        change = self.changes[0]
        was, now = (" then ".join(_brief(op) for op in ops[:2]) for ops in (change.removed, change.added))
        op = (*change.removed, *change.added)[0]
        place = f", from {line_of(op)}" if line_of(op) else ""
        if was and now:
            return f"operation {change.position} is {now}, was {was}{place}"
        only = f"only the second has {now}" if now else f"only the first has {was}"
        return f"operation {change.position}: {only}{place}"

    def to_dict(self) -> dict[str, Any]:
        facts = [{"what": what, "first": a, "second": b} for what, a, b in self.facts]
        return {
            "equal": not self,
            "first": self.first,
            "facts": facts,
            "changes": [vars(change) for change in self.changes],
        }


def alike_facts(facts: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Facts for reading: those that differ in a number only, such as the states of a cache's layers, are one."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for what, first, second in facts:
        found.setdefault((re.sub(r"\d+", "*", what), _squeezed(first), _squeezed(second)), []).append(what)
    return [
        (names[0] if len(names) == 1 else f"{what} ({len(names)} of them)", first, second)
        for (what, first, second), names in found.items()
    ]


def _squeezed(text: str) -> str:
    """``(a), (a), (a)`` as ``(a) x3``."""
    return re.sub(r"(\([^()]*\))(?:, \1){2,}", lambda m: f"{m[1]} x{m[0].count(m[1])}", text)


def grouped(changes: Sequence[Change]) -> list[list[Change]]:
    """Changes that are the same in several blocks together, in the order of the first of each."""
    found: dict[Any, list[Change]] = {}
    for change in changes:
        sides = (tuple(_alike(op, in_block=True) for op in ops) for ops in (change.removed, change.added))
        found.setdefault(tuple(sides), []).append(change)
    return list(found.values())


def difference(first: DumpedEntry, second: DumpedEntry) -> Difference:
    """Compare keys, dims and operations.

    Names of operations and sizes' symbols are chosen by torch and say nothing; line numbers change with every edit
    of a file. So operations are alike when kind, module and the text of the model's line are.
    """
    a, b = _typed(first), _typed(second)
    matcher = SequenceMatcher(None, [_alike(op) for op in a], [_alike(op) for op in b], autojunk=False)
    changes = tuple(
        Change(i1, tuple(a[i1:i2]), tuple(b[j1:j2])) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal"
    )
    return Difference(tuple(_facts(first.record, second.record)), changes)


def _typed(entry: DumpedEntry) -> list[Op]:
    """Operations, each with its ``type`` such as ``f32[batch, 64]``."""
    symbols = entry.symbols()
    return [{**op, "type": type_of(op, symbols)} for op in entry.ops()]


def _brief(op: Op) -> str:
    return f"{op.get('op')} {op.get('type')}".strip()


def _alike(op: Op, in_block: bool = False) -> tuple[str, ...]:
    place = line_of(op).rpartition(":")[0]
    module = str(op.get("module"))
    return (
        str(op.get("op")),
        without_numbers(module) if in_block else module,
        place,
        code_of(op),
        _sizes(op.get("shape")),
    )


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
