"""The kernels of an entry, and which operations went into each."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

from compile_policy.errors import InputError
from compile_policy.graphs.reading import DumpedEntry

_DEFINED = re.compile(r"^(?:(\w+) = async_compile\.|extern \"C\"\s+void\s+(\w+)\()", re.M)
_LIBRARY = ("extern_kernels.", "torch.ops.", "aten.", "aoti_torch_")
_NUMBERED = re.compile(r"(.*?(?:^|\.)\d+)(?:\.|$)")
_LEVELS = 3


@dataclass(frozen=True)
class Kernel:
    """One call of generated code or of a library.

    Attributes:
        name: in the generated code.
        lowered: operations of the lowered graph that went into it; empty where that is not known.
        captured: operations of the captured graph that those came from, in every block that shares the kernel.
        graph: number of the lowered graph, where one captured graph was lowered in several packages.
        times: how often one call of the entry runs it.
        special: it runs instead of others, in calls of frequent sizes.
    """

    name: str
    lowered: tuple[str, ...] = ()
    captured: tuple[str, ...] = ()
    graph: int = 0
    times: int = 1
    special: bool = False

    @property
    def generated(self) -> bool:
        """Whether the code was generated; otherwise it is a library's."""
        return not self.name.startswith(_LIBRARY)


def kernels_of(entry: DumpedEntry) -> list[Kernel]:
    """Kernels in the order of the generated code; none where nothing was generated.

    Raises:
        InputError: what says which operations are in which kernel is damaged.
    """
    general, special, twins = Counter(_packages(entry)), Counter(_packages(entry, "special")), _twins_of(entry)
    found: list[Kernel] = []
    for number, prefix in enumerate(entry.packages):
        times, instead = general.get(number) or special.get(number, 1), number in special and number not in general
        to_captured, calls = _origins(entry, prefix)
        if not calls:
            calls = {name: [] for name in kernel_codes(entry, number)}
        for call, nodes in calls.items():
            name, _, serial = call.rpartition(":")  # Inductor numbers the calls
            first = dict.fromkeys(pre for node in nodes for pre in to_captured.get(node, ()))
            captured = tuple(dict.fromkeys(op for pre in first for op in (pre, *twins.get(pre, ()))))
            found.append(Kernel(name if serial.isdigit() else call, tuple(nodes), captured, number, times, instead))
    return found


def kernel_codes(entry: DumpedEntry, number: int = 0) -> dict[str, str]:
    """Generated kernel -> its code, of one lowered graph."""
    prefix = entry.packages[number]
    if not entry.has(f"{prefix}kernels"):
        return {}
    text = entry.read(f"{prefix}kernels")
    # Generated Python calls the C++ inside `kernel`.
    found = [m for m in _DEFINED.finditer(text) if "".join(m.groups("")) != "kernel"]
    ends = [m.start() for m in found[1:]] + [_end(text, m.end()) for m in found[-1:]]
    return {"".join(m.groups("")): text[m.start() : end].rstrip() for m, end in zip(found, ends, strict=True)}


def lowered_of(entry: DumpedEntry) -> dict[str, list[tuple[int, str]]]:
    """Captured operation -> what it was lowered to: (number of the lowered graph, name in it)."""
    twins = _twins_of(entry)
    found: dict[str, list[tuple[int, str]]] = {}
    for number, prefix in enumerate(entry.packages):
        for post, pres in _origins(entry, prefix)[0].items():
            for op in dict.fromkeys(op for pre in pres for op in (pre, *twins.get(pre, ()))):
                found.setdefault(op, []).append((number, post))
    return found


def lowered_texts(entry: DumpedEntry) -> list[str]:
    """The lowered graphs as text, one a package; empty where it is not in the dump."""
    return [entry.read(f"{prefix}lowered") if entry.has(f"{prefix}lowered") else "" for prefix in entry.packages]


def _end(text: str, start: int) -> int:
    """Where the last kernel ends and the code that calls the kernels begins."""
    after = re.search(r"^(?:async_compile\.wait|def call|class Runner)", text[start:], re.M)
    return start + after.start() if after else len(text)


def _origins(entry: DumpedEntry, prefix: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Lowered operation -> captured ones, and call of a kernel -> lowered operations in it; both empty if not known."""
    kind = f"{prefix}provenance"
    if not entry.has(kind):
        return {}, {}
    try:
        origins = json.loads(entry.read(kind))
        return _names(origins["postToPre"]), _names(origins["cppCodeToPost"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{entry.id}/{entry.files[kind]} is not what Inductor writes: {error!r}.") from None


def _names(mapping: Any) -> dict[str, list[str]]:
    return {str(key): [str(name) for name in names] for key, names in mapping.items()}


def _packages(entry: DumpedEntry, kind: str = "segments") -> list[int]:
    return [package for package in entry.record.get(kind, []) if isinstance(package, int)]


def _twins_of(entry: DumpedEntry) -> dict[str, list[str]]:
    """Of the packages for any sizes, and of those for frequent ones; where both begin at one block they agree."""
    if "ops" not in entry.files:
        return {}
    twins: dict[str, list[str]] = {}
    for segments in (_packages(entry), _packages(entry, "special")):
        if len(set(segments)) < len(segments):
            twins = {**_twins(entry.ops(), segments), **twins}
    return twins


def _twins(ops: Sequence[dict[str, Any]], segments: Sequence[int]) -> dict[str, list[str]]:
    """Operation of the block that was lowered -> the same operation of the blocks that share its package.

    The graph was cut where a block of repeated modules begins and ends. The cuts are found again here, and taken only
    where they are as many as the steps of the program.
    """
    for level in range(_LEVELS):
        tensors = [op for op in ops if isinstance(op.get("shape"), list)]
        blocks = [_block(str(op.get("module", "")), level) for op in tensors]
        runs = groupby(zip(blocks, tensors, strict=True), itemgetter(0))
        pieces = [[op for _, op in run] for _, run in runs]
        if len(pieces) == len(segments):
            return _paired(pieces, segments)
    return {}


def _block(module: str, level: int) -> str:
    """The repeated module that a module is in: ``layers.3`` of ``layers.3.mlp``."""
    found = _NUMBERED.findall(module)
    return ".".join(found[: level + 1]) if len(found) > level else ""


def _paired(pieces: Sequence[list[dict[str, Any]]], segments: Sequence[int]) -> dict[str, list[str]]:
    first: dict[int, list[dict[str, Any]]] = {}
    twins: dict[str, list[str]] = {}
    for piece, package in zip(pieces, segments, strict=True):
        original = first.setdefault(package, piece)
        if original is not piece and len(original) == len(piece):
            for op, twin in zip(original, piece, strict=True):
                twins.setdefault(str(op.get("name")), []).append(str(twin.get("name")))
    return twins
