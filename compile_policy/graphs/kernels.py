"""The kernels of an entry, and which operations went into each."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from compile_policy.errors import InputError
from compile_policy.graphs.reading import DumpedEntry

_DEFINED = re.compile(r"^(?:(\w+) = async_compile\.|extern \"C\"\s+void\s+(\w+)\()", re.M)
_LIBRARY = ("extern_kernels.", "torch.ops.", "aten.", "aoti_torch_")


@dataclass(frozen=True)
class Kernel:
    """One call of generated code or of a library.

    Attributes:
        name: in the generated code.
        lowered: operations of the lowered graph that went into it; empty where that is not known.
        captured: operations of the captured graph that those came from.
    """

    name: str
    lowered: tuple[str, ...] = ()
    captured: tuple[str, ...] = ()

    @property
    def generated(self) -> bool:
        """Whether the code was generated; otherwise it is a library's."""
        return not self.name.startswith(_LIBRARY)


def kernels_of(entry: DumpedEntry) -> list[Kernel]:
    """Kernels in the order of the generated code; none where nothing was generated."""
    if "provenance" in entry.files:
        return _with_origins(entry)
    if not {"output_code", "aot_kernels"} & set(entry.files):
        return []
    names = ("".join(found) for found in _DEFINED.findall(entry.read("kernels")))
    return [Kernel(name) for name in names if name != "kernel"]  # what generated Python calls the C++ inside


def kernel_codes(entry: DumpedEntry) -> dict[str, str]:
    """Generated kernel -> its code."""
    if not {"output_code", "aot_kernels"} & set(entry.files):
        return {}
    text = entry.read("kernels")
    found = [m for m in _DEFINED.finditer(text) if "".join(m.groups("")) != "kernel"]
    ends = [m.start() for m in found[1:]] + [_end(text, m.end()) for m in found[-1:]]
    return {"".join(m.groups("")): text[m.start() : end].rstrip() for m, end in zip(found, ends, strict=True)}


def _end(text: str, start: int) -> int:
    """Where the last kernel ends and the code that calls the kernels begins."""
    after = re.search(r"^(?:async_compile\.wait|def call|class Runner)", text[start:], re.M)
    return start + after.start() if after else len(text)


def _with_origins(entry: DumpedEntry) -> list[Kernel]:
    """Inductor numbers the kernels' calls: ``name:number``."""
    try:
        origins = json.loads(entry.read("provenance"))
        to_captured, calls = origins["postToPre"], origins["cppCodeToPost"]
        return [_kernel(str(call), nodes, to_captured) for call, nodes in calls.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{entry.id}/{entry.files['provenance']} is not what Inductor writes: {error!r}.") from None


def _kernel(call: str, nodes: Any, to_captured: dict[str, list[str]]) -> Kernel:
    name, _, number = call.rpartition(":")
    captured = dict.fromkeys(pre for node in nodes for pre in to_captured.get(node, []))
    return Kernel(name if number.isdigit() else call, tuple(map(str, nodes)), tuple(map(str, captured)))
