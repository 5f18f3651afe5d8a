"""What a page shows, as plain data: tables of a dump's entries that name each other by number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compile_policy.graphs.kernels import Kernel, kernel_codes, kernels_of, lowered_of, lowered_texts
from compile_policy.graphs.reading import Dump, DumpedEntry
from compile_policy.graphs.sizes import numbers, tensor_type, type_of
from compile_policy.graphs.stats import bytes_moved, op_costs
from compile_policy.graphs.values import RETURNED, values_of

_EXAMPLES = 12  # names of guards of one kind
_MOST_EVENTS = 5000
_MOST_CALLS = 2000
_TEXTS = ("bytecode", "conditions")
Symbols = Mapping[str, Mapping[str, Any]]


def page_data(dump: Dump, events: Sequence[Mapping[str, Any]] = (), tlparse: str = "") -> dict[str, Any]:
    """Everything that a page shows.

    Args:
        dump: whose entries.
        events: beside those that the dump has.
        tlparse: link to tlparse's report.
    """
    runs = [_run(run.name, run.plans(), run.events(), run.calls()) for run in dump.runs()]
    if events:
        runs.append(_run("events", [], events, []))
    entries = [_entry(entry) for entry in dump.entries]
    return {"notes": list(dump.notes), "runs": runs, "entries": entries, "tlparse": tlparse}


def _run(
    name: str,
    plans: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    calls: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """One run. Of many calls the first ones and the last ones are shown, and all are counted."""
    known = [[str(c.get("component")), str(c.get("entry")), c["time"], c["seconds"]] for c in calls if _is_timed(c)]
    shown = known if len(known) <= _MOST_CALLS else [*known[: _MOST_CALLS // 2], *known[-_MOST_CALLS // 2 :]]
    counts: dict[str, list[float]] = {}
    for component, _, _, seconds in known:
        counts.setdefault(component, []).append(seconds)
    timed = {component: [len(found), sorted(found)[len(found) // 2]] for component, found in counts.items()}
    listed = [dict(event) for event in events[:_MOST_EVENTS] if isinstance(event.get("time"), (int, float))]
    return {"name": name, "plans": list(plans), "events": listed, "calls": shown, "timed": timed}


def _is_timed(call: Mapping[str, Any]) -> bool:
    return all(isinstance(call.get(name), (int, float)) for name in ("time", "seconds"))


def without_code(data: dict[str, Any], excess: int) -> dict[str, Any] | None:
    """The data with less text, where there is some to leave out: kernels, then lowered graphs, then events."""
    for field, said in (
        ("codes", "the code of its kernels"),
        ("lowered", "its lowered graph"),
        ("guards", "its guards"),
    ):
        largest = max(data["entries"], key=lambda entry: len(str(entry[field])), default=None)
        if largest is not None and len(str(largest[field])) > min(excess, 10_000):
            empty = {"codes": ["" for _ in largest["codes"]], "lowered": [], "guards": []}[field]
            smaller = {**largest, field: empty}
            if field == "lowered":
                smaller["ops"] = [[*op[:7], [], *op[8:]] for op in largest["ops"]]
                smaller["kernels"] = [[*kernel[:3], [], *kernel[4:]] for kernel in largest["kernels"]]
            entries = [smaller if entry is largest else entry for entry in data["entries"]]
            note = f"{largest['id']}: {said} is left out here, to keep the page small; the dump's folder has it"
            return {**data, "entries": entries, "notes": [*data["notes"], note]}
    if any(run["events"] for run in data["runs"]):
        runs = [{**run, "events": [], "calls": []} for run in data["runs"]]
        return {**data, "runs": runs, "notes": [*data["notes"], "events are left out, to keep the page small"]}
    return None


def _entry(entry: DumpedEntry) -> dict[str, Any]:
    record, symbols = entry.record, entry.symbols()
    ops = entry.ops() if "ops" in entry.files else []
    lowered = _Lowered(entry, symbols)
    kernels = kernels_of(entry)
    return {
        "id": entry.id,
        "component": entry.component,
        "cls": str(record.get("component", {}).get("cls", "")),
        **{name: record.get(name) for name in ("run", "backend", "road", "why_jit", "seconds", "max_error", "notes")},
        "modes": {str(k): str(v) for k, v in record.get("key", {}).get("modes", {}).items()},
        "key": {str(k): str(v) for k, v in record.get("key", {}).get("arguments", {}).items()},
        "arguments": [
            [str(row.get("path")), str(row.get("dtype")), _list(row.get("dims")), _list(row.get("example"))]
            for row in record.get("arguments", [])
        ],
        "symbols": {symbol: [known.get("label"), known.get("size")] for symbol, known in symbols.items()},
        "modules": {str(k): str(v) for k, v in record.get("modules", {}).items()},
        "guards": _guards(entry.guards()),
        "context": entry.sources(),
        "texts": {kind: entry.read(kind) for kind in _TEXTS if entry.has(kind)},
        **_ops(entry, ops, lowered, kernels, symbols),
        **_kernels(entry, ops, lowered, kernels),
        "lowered": lowered.rows,
    }


class _Lowered:
    """Operations of the lowered graphs by number."""

    def __init__(self, entry: DumpedEntry, symbols: Symbols) -> None:
        self.numbers: dict[tuple[int, str], int] = {}
        self.rows: list[list[str]] = []
        for graph, text in enumerate(lowered_texts(entry)):
            for value in values_of(text).values():
                if value.text and value.name != RETURNED:
                    self.numbers[graph, value.name] = len(self.rows)
                    self.rows.append([value.name, tensor_type(value.dtype, value.shape, symbols), value.text])

    def numbers_of(self, graph: int, names: Sequence[str]) -> list[int]:
        return [self.numbers[graph, name] for name in names if (graph, name) in self.numbers]


def _ops(
    entry: DumpedEntry, ops: list[dict[str, Any]], lowered: _Lowered, kernels: list[Kernel], symbols: Symbols
) -> dict[str, Any]:
    """Rows of name, operation, type, module, source, inputs, kernels, lowered, flops, bytes."""
    inputs = entry.inputs()
    numbered = {str(row.get("name")): -1 - i for i, row in enumerate(inputs)}
    numbered |= {str(op.get("name")): i for i, op in enumerate(ops)}
    to_lowered = lowered_of(entry)
    in_kernels: dict[str, list[int]] = {}
    for number, kernel in enumerate(kernels):
        for name in kernel.captured:
            in_kernels.setdefault(name, []).append(number)
    costs = op_costs(entry, numbers(symbols, {})) if ops else []
    strings, sources = _Table(), _Table()
    rows = [
        [
            str(op.get("name")),
            strings.number(str(op.get("op"))),
            strings.number(type_of(op, symbols)),
            strings.number(str(op.get("module") or "")),
            sources.number(_source(op.get("source"))),
            [numbered[name] for name in op.get("inputs", ()) if name in numbered],
            in_kernels.get(str(op.get("name")), []),
            [n for g, name in to_lowered.get(str(op.get("name")), ()) for n in lowered.numbers_of(g, [name])],
            cost.flops,
            cost.bytes,
        ]
        for op, cost in zip(ops, costs, strict=True)
    ]
    names = [[str(row.get("name")), str(row.get("is")), type_of(row, symbols)] for row in inputs]
    return {"ops": rows, "strings": strings.values, "sources": sources.values, "inputs": names}


def _kernels(entry: DumpedEntry, ops: list[dict[str, Any]], lowered: _Lowered, kernels: list[Kernel]) -> dict[str, Any]:
    """Rows of name, lowered graph, times, lowered operations, captured operations, code, bytes, special."""
    numbered = {str(op.get("name")): i for i, op in enumerate(ops)}
    codes, rows = _Table(), []
    of_graph = [kernel_codes(entry, number) for number in range(len(entry.packages))]
    moved = bytes_moved(entry, kernels, numbers(entry.symbols(), {}))
    for kernel, size in zip(kernels, moved, strict=True):
        code = of_graph[kernel.graph].get(kernel.name, "")
        members = [numbered[name] for name in kernel.captured if name in numbered]
        mine = lowered.numbers_of(kernel.graph, kernel.lowered)
        rows.append(
            [kernel.name, kernel.graph, kernel.times, mine, sorted(members), codes.number(code), size, kernel.special]
        )
    return {"kernels": rows, "codes": codes.values}


class _Table:
    """Distinct values, and the number of each."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def number(self, value: Any) -> int:
        if value not in self._numbers:
            self._numbers[value] = len(self.values)
            self.values.append(value)
        return self._numbers[value]


def _guards(guards: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Kind, what covers it, why, how many, and some of the names; most frequent first."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for guard in guards:
        key = (str(guard.get("kind")), str(guard.get("covered_by") or ""), str(guard.get("rule") or ""))
        found.setdefault(key, []).append(str(guard.get("name", "")))
    rows = [[*key, len(names), list(dict.fromkeys(names))[:_EXAMPLES]] for key, names in found.items()]
    return sorted(rows, key=lambda row: -row[3])


def _source(source: Any) -> tuple[str, int, str, str, str]:
    if not isinstance(source, dict):
        return "", 0, "", "", ""
    file, function, code, caller = (str(source.get(name, "")) for name in ("file", "function", "code", "caller"))
    return file, int(source.get("line", 0)), function, code, caller


def _list(value: Any) -> list[Any]:
    return [v if isinstance(v, (int, str)) else str(v) for v in value] if isinstance(value, list) else []
