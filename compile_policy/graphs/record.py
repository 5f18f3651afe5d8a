"""What the index says about an entry: schema 1, described in ``docs/dumps.md``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from compile_policy.entry import Entry
from compile_policy.graphs.source import Op
from compile_policy.region import Region

_PLACE = re.compile(r"s\[(\d+)\]\[(\d+)\]")
_MODES = ("grad mode", "inference mode", "training flag", "autocast")
_FIXED = re.compile(r"s\[(\d+)\]\[(\d+)\] == (\d+)")


def entry_record(region: Region, entry: Entry, example: dict[int, list[int]], ops: Sequence[Op]) -> dict[str, Any]:
    """Everything but files, sizes and notes, which the writer adds."""
    module = type(region.module)
    kinds = Counter(argument.kind for argument in entry.graph.arguments)
    return {
        "component": {
            "role": region.role,
            "qualname": region.qualname,
            "cls": module.__qualname__,
            "module": module.__module__,
        },
        "backend": region.options.backend,
        "road": str(getattr(entry.graph, "road", "jit")),
        "why_jit": entry.graph.why_jit,
        "depth": entry.graph.depth,
        "segments": _segments(entry),
        "special": _special(entry),
        "key": _key(entry),
        "arguments": _arguments(entry, example),
        "labels": _labels(entry, example),
        "modules": _modules(region, ops),
        "inputs": {kind: kinds[kind] for kind in ("leaf", "size", "tensor")},
        "outputs": len(entry.graph.outputs),
        "ops": len(ops),
        "kinds": dict(Counter(op.op for op in ops).most_common()),
        "conditions": len(entry.graph.accepts.conditions),
        "guards": len(entry.graph.guards),
        "seconds": round(entry.seconds, 4),
        "max_error": entry.max_error,
    }


def _key(entry: Entry) -> dict[str, Any]:
    """The call key in words."""
    spec, _, modes, structure, *ambient = entry.call.key
    named = {**dict(zip(_MODES, modes, strict=True)), **dict(pair for pairs in ambient for pair in pairs)}
    return {
        "arguments": {name: spelled(part) for name, part in spec},
        "modes": {str(name): _plain(value) if value != () else False for name, value in named.items()},
        "structure": str(structure),
    }


def spelled(spec: Any) -> str:
    """One argument's part of the key, as one would write it."""
    kind, *rest = spec if isinstance(spec, tuple) and spec else (spec,)
    if kind == "const":
        return repr(rest[-1])
    if kind in ("list", "tuple"):
        return ("[{}]" if kind == "list" else "({})").format(", ".join(map(spelled, rest[0])))
    if kind == "dict":
        return "{" + ", ".join(f"{k!r}: {spelled(s)}" for k, s in rest[0]) + "}"
    if kind == "adapted":
        return f"{rest[0].__name__} {_plain(rest[1])}"
    if kind == "unread":
        return f"any {rest[0].__name__}"
    if kind in ("data", "node"):
        return f"{rest[0].__name__}({', '.join(map(spelled, rest[-1]))})"
    return str(kind)


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, tuple):
        return f"({', '.join(str(_plain(v)) for v in value)})"
    return str(value)


def _arguments(entry: Entry, example: dict[int, list[int]]) -> list[dict[str, Any]]:
    """One row a tensor of the call: a dim is its label, or its size where that is part of the key or the graph."""
    fixed = {(int(m[1]), int(m[2])): int(m[3]) for c in entry.graph.accepts.conditions if (m := _FIXED.fullmatch(c))}
    call, rows = entry.call, []
    for i, (path, labels, metadata) in enumerate(zip(call.paths, call.labels, call.key[1], strict=True)):
        dtype, device, static, grad = metadata
        dims = [fixed.get((i, d), label or size) for d, (label, size) in enumerate(zip(labels, static, strict=True))]
        rows.append(
            {
                "path": path,
                "dtype": str(dtype).removeprefix("torch."),
                "device": str(device),
                "requires_grad": bool(grad),
                "dims": dims,
                "dynamic": {str(d): dim for d, dim in enumerate(dims) if isinstance(dim, str)},
                "example": example.get(i),
            }
        )
    return rows


def _segments(entry: Entry) -> list[int]:
    """The package that each step of a program runs, in order; where blocks repeat, one package serves many."""
    program = getattr(entry.graph, "program", None)
    return [] if program is None else [segment.package for segment in program.segments]


def _special(entry: Entry) -> list[int]:
    """The packages that run instead in calls of frequent sizes; empty where there are none."""
    special = getattr(getattr(entry.graph, "program", None), "special", None)
    return [] if special is None else list(special.packages)


def _modules(region: Region, ops: Sequence[Op]) -> dict[str, str]:
    """Module below the component -> its class, of those that operations are from."""
    known = {name: type(module).__name__ for name, module in region.module.named_modules()}
    return {name: known[name] for name in dict.fromkeys(op.module for op in ops) if name in known}


def _labels(entry: Entry, example: dict[int, list[int]]) -> dict[str, int | None]:
    """label -> size in the example that was traced, where it is known."""
    labels: dict[str, int | None] = {}
    for i, names in enumerate(entry.call.labels):
        for dim, name in enumerate(names):
            if name is not None:
                labels[name] = labels.get(name) or (example[i][dim] if i in example else None)
    return labels


def conditions_text(entry: Entry) -> str:
    """The sizes for which the graph holds, one condition a line."""

    def named(match: re.Match[str]) -> str:
        return f"{entry.call.paths[int(match[1])]}.shape[{match[2]}]"

    head = "# The graph holds for calls whose sizes meet all of these; others get another graph.\n"
    return head + "".join(f"{_PLACE.sub(named, c)}\n" for c in entry.graph.accepts.conditions)
