"""Repeated blocks among captured operations: what a reader needs to see once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

Op = Mapping[str, Any]
_NUMBERED = re.compile(r"^(.*?(?:^|\.)\d+)(?:\.|$)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


@dataclass(frozen=True)
class Fold:
    """Blocks that follow one another and do the same.

    Attributes:
        blocks: their paths, such as ``layers.0``, in order.
        members: names of each block's operations.
    """

    blocks: tuple[str, ...]
    members: tuple[tuple[str, ...], ...]

    @property
    def hidden(self) -> frozenset[str]:
        """Operations of all blocks but the first."""
        return frozenset(name for names in self.members[1:] for name in names)


def folds(ops: Sequence[Op]) -> list[Fold]:
    """Runs of at least two blocks that are the same operation by operation; arithmetic with sizes does not count."""
    read = {name for op in ops if op.get("op") == "getitem" for name in op.get("inputs", ())}
    runs = [(path, list(run)) for path, run in groupby(ops, _block)]
    forms = [_form(path, run, read) if path else () for path, run in runs]
    found: list[Fold] = []
    start = 0
    for i in range(1, len(runs) + 1):
        if i == len(runs) or not forms[i] or forms[i] != forms[start]:
            if i - start > 1:
                same = runs[start:i]
                names = tuple(tuple(str(op.get("name")) for op in run) for _, run in same)
                found.append(Fold(tuple(path for path, _ in same), names))
            start = i
    return found


def without_numbers(path: str) -> str:
    """``layers.3.mlp`` as ``layers.*.mlp``: what blocks have in common."""
    return _NUMBER.sub("*", path)


def _block(op: Op) -> str:
    found = _NUMBERED.match(str(op.get("module", "")))
    return found[1] if found else ""


def _form(path: str, ops: Sequence[Op], read: set[Any]) -> tuple[Any, ...]:
    """The list that the block is in, and what each operation is."""
    said = (
        (op.get("op"), tuple(op.get("shape") or ()), str(op.get("module"))[len(path) :])
        for op in ops
        if op.get("shape") is not None or op.get("name") in read
    )
    return (path.rpartition(".")[0], *said)
