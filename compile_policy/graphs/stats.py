"""Numbers about an entry: operations by kind, by module and by line of the model, and what was fused."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from compile_policy.graphs.kernels import Kernel, kernels_of
from compile_policy.graphs.reading import DumpedEntry


@dataclass(frozen=True)
class Stats:
    """Numbers about one entry; each mapping has the largest number first."""

    ops: int
    kinds: dict[str, int]
    modules: dict[str, int]
    lines: dict[str, int]
    kernels: tuple[Kernel, ...]

    @property
    def fused(self) -> int:
        """Operations of the lowered graph that share a generated kernel with another."""
        return len({op for k in self.kernels if k.generated and len(k.lowered) > 1 for op in k.lowered})

    def to_dict(self) -> dict[str, Any]:
        kernels = [{**vars(k), "generated": k.generated} for k in self.kernels]
        return {**vars(self), "kernels": kernels, "fused": self.fused}


def stats_of(entry: DumpedEntry) -> Stats:
    """Count.

    Raises:
        InputError: the entry's operations are not in the dump.
    """
    ops = entry.ops()
    return Stats(
        len(ops),
        _counted(str(op.get("op")) for op in ops),
        _counted(str(op["module"]) for op in ops if op.get("module")),
        _counted(place for op in ops if (place := line_of(op))),
        tuple(kernels_of(entry)),
    )


def line_of(op: dict[str, Any]) -> str:
    """``file:line`` of the model that an operation is from; empty where it is not known."""
    source = op.get("source")
    return f"{source.get('file')}:{source.get('line')}" if isinstance(source, dict) else ""


def code_of(op: dict[str, Any]) -> str:
    """The line itself."""
    source = op.get("source")
    return str(source.get("code", "")) if isinstance(source, dict) else ""


def _counted(values: Any) -> dict[str, int]:
    return dict(Counter(values).most_common())
