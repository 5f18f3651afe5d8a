"""The trail of an operation: captured operation, line of the model, lowered operations, kernels; in both directions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from compile_policy.errors import InputError
from compile_policy.graphs.kernels import Kernel, kernel_codes, kernels_of, lowered_of, lowered_texts
from compile_policy.graphs.reading import DumpedEntry
from compile_policy.graphs.values import Value, values_of


@dataclass(frozen=True)
class OpTrail:
    """Everything about one captured operation.

    Attributes:
        op: as `DumpedEntry.ops` has it.
        around: line number -> text of the model, round the operation's own.
        lowered: what it became.
        kernels: what runs it, by number.
        users: names of the operations that read it.
    """

    op: dict[str, Any]
    around: dict[int, str]
    lowered: tuple[Value, ...]
    kernels: dict[int, Kernel]
    users: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        kernels = [{"number": number, **asdict(kernel)} for number, kernel in self.kernels.items()]
        return {**asdict(self), "kernels": kernels}


@dataclass(frozen=True)
class KernelTrail:
    """Everything about one kernel.

    Attributes:
        number: place in the order in which kernels are called, from 0.
        lowered: operations of the lowered graph in it.
        ops: captured operations that those came from.
        code: what was generated; empty for a library's.
    """

    number: int
    kernel: Kernel
    lowered: tuple[Value, ...]
    ops: tuple[dict[str, Any], ...]
    code: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def op_trail(entry: DumpedEntry, name: str) -> OpTrail:
    """From an operation by its name.

    Raises:
        InputError: there is none of this name.
    """
    ops = entry.ops()
    op = next((op for op in ops if op.get("name") == name), None)
    if op is None:
        raise InputError(f"{entry.id} has no operation {name!r}.", remedy=f"`graphs find DIR {name}` looks for a part.")
    graphs = [values_of(text) for text in lowered_texts(entry)]
    lowered = [graphs[g][post] for g, post in lowered_of(entry).get(name, ()) if post in graphs[g]]
    kernels = {n: kernel for n, kernel in enumerate(kernels_of(entry)) if name in kernel.captured}
    users = tuple(str(other.get("name")) for other in ops if name in other.get("inputs", ()))
    return OpTrail(op, _around(entry, op), tuple(lowered), kernels, users)


def kernel_trail(entry: DumpedEntry, wanted: str) -> KernelTrail:
    """From a kernel by its number or name, or a part of its name that no other kernel has.

    Raises:
        InputError: none fits, or several kernels do.
    """
    kernels = kernels_of(entry)
    if wanted.isdigit() and int(wanted) < len(kernels):
        number = int(wanted)
    else:
        exact = [n for n, kernel in enumerate(kernels) if kernel.name == wanted]
        found = exact or [n for n, kernel in enumerate(kernels) if wanted in kernel.name]
        if not found:
            raise InputError(f"{entry.id} has no kernel {wanted!r}.", remedy="`graphs stats` lists them.")
        if len({(kernels[n].name, kernels[n].graph) for n in found}) > 1:
            said = ", ".join(f"{n} {kernels[n].name}" for n in found[:8])
            raise InputError(f"{wanted!r} fits several kernels.", remedy=f"Choose one by its number: {said}")
        number = found[0]
    kernel = kernels[number]
    graph = values_of(lowered_texts(entry)[kernel.graph])
    ops = {str(op.get("name")): op for op in entry.ops()}
    return KernelTrail(
        number,
        kernel,
        tuple(graph[name] for name in kernel.lowered if name in graph),
        tuple(ops[name] for name in kernel.captured if name in ops),
        kernel_codes(entry, kernel.graph).get(kernel.name, ""),
    )


def _around(entry: DumpedEntry, op: dict[str, Any], reach: int = 3) -> dict[int, str]:
    source = op.get("source")
    if not isinstance(source, dict):
        return {}
    line = int(source.get("line", 0))
    known = entry.sources().get(str(source.get("file")), {})
    near = {n: text for n, text in known.items() if abs(n - line) <= reach}
    return near if line in near else {line: str(source.get("code", ""))}
