"""Numbers about an entry: operations by kind, by module and by line of the model, and what was fused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compile_policy.graphs.cost import Cost, Traffic, op_cost
from compile_policy.graphs.kernels import Kernel, kernels_of, lowered_texts
from compile_policy.graphs.reading import DumpedEntry
from compile_policy.graphs.sizes import numbers
from compile_policy.graphs.values import Value, values_of


@dataclass(frozen=True)
class Stats:
    """Numbers about one entry; each mapping has the largest number first.

    Attributes:
        ops: operations of the captured graph.
        kinds: operation -> how many.
        modules: module -> how many operations.
        lines: ``file:line`` of the model -> how many operations.
        kernels: calls of generated code or of a library, in order.
        sizes: symbol -> the number that costs are worked out for.
        cost: of all operations, were each run alone.
        kind_costs: the same by operation.
        module_costs: the same by module.
        kernel_bytes: what each kernel moves, in the order of ``kernels``; ``None`` where that is not known.
    """

    ops: int
    kinds: dict[str, int]
    modules: dict[str, int]
    lines: dict[str, int]
    kernels: tuple[Kernel, ...]
    sizes: dict[str, int] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    kind_costs: dict[str, Cost] = field(default_factory=dict)
    module_costs: dict[str, Cost] = field(default_factory=dict)
    kernel_bytes: tuple[int | None, ...] = ()

    @property
    def moved(self) -> int | None:
        """Bytes that one call's kernels move; ``None`` where that is not known of each."""
        run = [(b, k.times) for b, k in zip(self.kernel_bytes, self.kernels, strict=True) if not k.special]
        known = [moved * times for moved, times in run if moved is not None]
        return sum(known) if known and len(known) == len(run) else None

    @property
    def kernel_calls(self) -> int:
        """Kernels that one call runs: of a package that serves many blocks, those of every block; no special ones."""
        return sum(kernel.times for kernel in self.kernels if not kernel.special)

    @property
    def fused(self) -> int:
        """Operations of the lowered graph that share a generated kernel with another."""
        return len(
            {op for k in self.kernels if k.generated and not k.special and len(k.lowered) > 1 for op in k.lowered}
        )

    def to_dict(self) -> dict[str, Any]:
        kernels = [
            {**vars(kernel), "generated": kernel.generated, "bytes": moved}
            for kernel, moved in zip(self.kernels, self.kernel_bytes, strict=True)
        ]
        costs = {
            name: {key: vars(cost) for key, cost in found.items()}
            for name, found in (("kind_costs", self.kind_costs), ("module_costs", self.module_costs))
        }
        return {
            **vars(self),
            **costs,
            "cost": vars(self.cost),
            "kernels": kernels,
            "kernel_bytes": self.moved,
            "kernel_calls": self.kernel_calls,
            "fused": self.fused,
        }


def stats_of(entry: DumpedEntry, given: Mapping[str, int] | None = None) -> Stats:
    """Count.

    Args:
        entry: of a dump.
        given: label of a dim -> the size that costs are for; by default the size in the example that was traced.

    Raises:
        InputError: the entry's operations are not in the dump.
    """
    ops, kernels = entry.ops(), tuple(kernels_of(entry))
    sizes = numbers(entry.symbols(), given or {})
    costs = op_costs(entry, sizes)
    return Stats(
        len(ops),
        _counted(str(op.get("op")) for op in ops),
        _counted(str(op["module"]) for op in ops if op.get("module")),
        _counted(place for op in ops if (place := line_of(op))),
        kernels,
        sizes,
        sum(costs, Cost()),
        _summed((str(op.get("op")) for op in ops), costs),
        _summed((str(op.get("module") or "") for op in ops), costs),
        bytes_moved(entry, kernels, sizes),
    )


def op_costs(entry: DumpedEntry, sizes: Mapping[str, int]) -> list[Cost]:
    """What each operation costs, in order; of unknown cost where a dump does not say what it reads."""
    rows = [*entry.inputs(), *entry.ops()]
    values = {str(row.get("name")): _value(row) for row in rows}
    return [
        op_cost(
            str(op.get("op")),
            values[str(op.get("name"))],
            [values[name] for name in op.get("inputs", ()) if name in values],
            sizes,
        )
        if "inputs" in op
        else Cost(unknown=1)
        for op in entry.ops()
    ]


def _value(row: Mapping[str, Any]) -> Value:
    shape = row.get("shape")
    return Value(
        str(row.get("name")), str(row.get("dtype", "")), tuple(map(str, shape)) if isinstance(shape, list) else None
    )


def bytes_moved(entry: DumpedEntry, kernels: Sequence[Kernel], sizes: Mapping[str, int]) -> tuple[int | None, ...]:
    """What one run of each kernel reads and writes; ``None`` where that is not known."""
    traffic = [Traffic(values_of(text), sizes) for text in lowered_texts(entry)]
    return tuple(traffic[k.graph].bytes(k.lowered) if k.graph < len(traffic) else None for k in kernels)


def _summed(keys: Iterable[str], costs: Iterable[Cost]) -> dict[str, Cost]:
    found: dict[str, Cost] = {}
    for key, cost in zip(keys, costs, strict=True):
        found[key] = found.get(key, Cost()) + cost
    return dict(sorted(found.items(), key=lambda item: (-item[1].flops, -item[1].bytes)))


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
