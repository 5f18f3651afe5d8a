"""Dumped graphs as tables and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from compile_policy.cli.terminal import clean
from compile_policy.graphs.cost import Cost
from compile_policy.graphs.difference import Change, Difference, alike_facts, grouped
from compile_policy.graphs.folding import without_numbers
from compile_policy.graphs.kernels import Kernel
from compile_policy.graphs.search import Hit
from compile_policy.graphs.sizes import type_of
from compile_policy.graphs.stats import Stats, code_of, line_of

_COMMENT = "  # "
_NUMBERS = ("count", "ops", "inputs", "seconds", "#", "lowered", "captured", "runs", "moves", "FLOP", "share", "bytes")
_LONG_HITS = 150
_MOST_OPS = 20  # operations of one side of a change
_REST_OF_A_ROW = 64  # columns for the other things that are said of an entry
_RUN = 26
_LONG_TABLE = 110  # columns that a table with a column of sentences needs


def print_entries(console: Console, records: Sequence[Mapping[str, Any]]) -> None:
    """One row an entry; runs only where there are several."""
    runs = len({record.get("run") for record in records}) > 1
    names = max((len(str(record.get("id"))) + len(_brief(record)[0]) for record in records), default=0)
    if console.width < max(_LONG_TABLE, names + _REST_OF_A_ROW + _RUN * runs):
        for record in records:
            _print_entry(console, record, runs)
        return
    table = _table("entry", "class", "ops", "inputs", "seconds", "dynamic dims", *["run"][:runs])
    for record in records:
        cells = [record.get("id"), *_brief(record), dynamic_dims(record), *[record.get("run")][:runs]]
        table.add_row(*(Text(clean(str(cell))) for cell in cells))
    console.print(table)


def _print_entry(console: Console, record: Mapping[str, Any], runs: bool) -> None:
    """Where there is no room for a table."""
    cls, ops, inputs, seconds = _brief(record)
    console.print(Text(clean(str(record.get("id"))), style="bold"))
    said = [f"{cls}: {ops} ops, {inputs} inputs, {seconds} s", f"dynamic: {dynamic_dims(record)}"]
    for line in [*said, *[f"run {record.get('run')}"][:runs]]:
        console.print(Padding(Text(clean(line)), (0, 0, 0, 2), expand=False))


def _brief(record: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Class, operations, inputs, seconds."""
    inputs = sum(record.get("inputs", {}).values())
    component = record.get("component", {})
    return str(component.get("cls")), str(record.get("ops")), str(inputs), f"{record.get('seconds', 0.0):.1f}"


def dynamic_dims(record: Mapping[str, Any]) -> str:
    """Labels, and in how many arguments each varies a dim."""
    uses: dict[str, int] = {}
    for argument in record.get("arguments", []):
        for label in argument.get("dynamic", {}).values():
            uses[label] = uses.get(label, 0) + 1
    return ", ".join(f"{label} (x{count})" if count > 1 else label for label, count in uses.items()) or "none"


def print_stats(console: Console, record: Mapping[str, Any], stats: Stats, top: int) -> None:
    """Numbers of one entry."""
    console.print(Text(clean(f"{record.get('id')}: {stats.ops:,} operations"), style="bold"))
    _print_cost(console, record, stats)
    _print_counts(console, "operation", stats.kinds, stats.kind_costs, top)
    modules: dict[str, int] = {}
    costs: dict[str, Cost] = {}
    for name, count in stats.modules.items():
        path = without_numbers(name)
        modules[path] = modules.get(path, 0) + count
        costs[path] = costs.get(path, Cost()) + stats.module_costs.get(name, Cost())
    _print_counts(console, "module", modules, costs, top)
    _print_counts(console, "line of the model", stats.lines, {}, top)
    _print_kernels(console, stats, top)


def _print_cost(console: Console, record: Mapping[str, Any], stats: Stats) -> None:
    if not (stats.cost.flops or stats.cost.bytes):
        return
    symbols = record.get("symbols", {})
    sizes = {str(symbols.get(s, {}).get("label") or s): size for s, size in stats.sizes.items()}
    said = f"about {amount(stats.cost.flops, 'FLOP')}, {amount(stats.cost.bytes, 'B')} were each operation run alone"
    if stats.moved is not None:
        said += f", {amount(stats.moved, 'B')} through its kernels"
    if stats.cost.unknown:
        said += f"; {stats.cost.unknown} operations of unknown cost"
    console.print(Text(clean(said)))
    console.print(Text(clean("for " + ", ".join(f"{name}={size}" for name, size in sizes.items())), style="dim"))
    console.print()


def _print_kernels(console: Console, stats: Stats, top: int) -> None:
    if not stats.kernels:
        console.print(Text("no kernels: the backend generated no code, or it is not in the dump", style="dim"))
        return
    table = _table("#", "lowered", "captured", "runs", "moves", "kernel")
    groups: dict[tuple[str, int, bool], list[tuple[Kernel, int | None, int]]] = {}
    for number, (kernel, moved) in enumerate(zip(stats.kernels, stats.kernel_bytes, strict=True)):
        groups.setdefault((kernel.name, len(kernel.lowered), kernel.special), []).append((kernel, moved, number))
    rows = sorted(groups.values(), key=lambda same: (-len(same[0][0].lowered), same[0][2]))
    for same in rows[:top]:
        kernel, moved, number = same[0]
        runs = sum(one.times for one, _, _ in same)
        cells = (str(number), str(len(kernel.lowered)), str(len(kernel.captured)), str(runs))
        table.add_row(
            *cells,
            "" if moved is None else amount(moved, "B"),
            Text(clean(kernel.name + " (frequent sizes)" * kernel.special)),
        )
    if len(rows) > top:
        table.add_row("", "", "", "", "", Text(f"{len(rows) - top} others, of fewer operations (--top)", style="dim"))
    console.print(table)
    generated = sum(kernel.times for kernel in stats.kernels if kernel.generated and not kernel.special)
    said = f"{stats.kernel_calls:,} kernel calls, {generated:,} of generated code"
    console.print(Text(f"{said}; {stats.fused:,} lowered operations fused"))
    console.print()


def amount(number: int, unit: str) -> str:
    """``12.3 MFLOP``."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {letter}{unit}"
    return f"{number} {unit}"


def _print_counts(console: Console, title: str, counts: Mapping[str, int], costs: Mapping[str, Cost], top: int) -> None:
    """How many, and what they cost where that is known; the most expensive first, then the most frequent."""
    if not counts:
        return
    total = sum(cost.flops for cost in costs.values())
    table = _table("count", *(("FLOP", "share", "bytes") if total else ()), title)
    ordered = sorted(counts.items(), key=lambda item: (-costs.get(item[0], Cost()).flops, -item[1]))
    for name, count in ordered[:top]:
        cost = costs.get(name, Cost())
        cells = (amount(cost.flops, ""), f"{cost.flops / total:.0%}", amount(cost.bytes, "B")) if total else ()
        table.add_row(str(count), *cells, Text(clean(name)))
    if len(counts) > top:
        rest = sum(count for _, count in ordered[top:])
        table.add_row(
            str(rest),
            *("" for _ in range(3 if total else 0)),
            Text(f"in {len(counts) - top} others (--top)", style="dim"),
        )
    console.print(table)
    console.print()


def print_hits(console: Console, hits: Sequence[Hit], every: bool) -> None:
    """One row an operation; what repeated blocks have in common is one row with a count, unless ``every`` is wanted."""
    groups: dict[Any, list[Hit]] = {}
    for hit in hits:
        key = (
            id(hit) if every else (hit.entry, hit.op.get("op"), str(hit.op.get("shape")), _line(hit.op), _block(hit.op))
        )
        groups.setdefault(key, []).append(hit)
    if console.width < _LONG_HITS:
        for same in groups.values():
            _print_hit(console, same)
        return
    table = _table("entry", "name", "op", "type", "in", "line of the model")
    for same in groups.values():
        op = same[0].op
        place = _block(op) if len(same) > 1 else op.get("module")
        line = f"{_short(_line(op))}  {code_of(dict(op))}"
        cells = (
            same[0].entry,
            f"{op.get('name')}{_times(same)}",
            op.get("op"),
            type_of(op, same[0].symbols),
            place,
            line,
        )
        table.add_row(*(Text(clean(str(cell or ""))) for cell in cells))
    console.print(table)


def _print_hit(console: Console, same: Sequence[Hit]) -> None:
    """Where there is no room for a table."""
    op = same[0].op
    said = f"{same[0].entry}: {op.get('name')}{_times(same)} = {op.get('op')} {type_of(op, same[0].symbols)}"
    console.print(Text(clean(said)), soft_wrap=True)
    place = _block(op) if len(same) > 1 else str(op.get("module") or "")
    console.print(Text(clean(f"  {_short(_line(op))}  {code_of(dict(op))}")), soft_wrap=True)
    if place:
        console.print(Text(clean(f"  in {place}"), style="dim"), soft_wrap=True)


def _times(same: Sequence[Hit]) -> str:
    return f" (x{len(same)})" if len(same) > 1 else ""


def _block(op: Mapping[str, Any]) -> str:
    return without_numbers(str(op.get("module") or ""))


def _line(op: Mapping[str, Any]) -> str:
    return line_of(dict(op))


def _short(place: str) -> str:
    return place.rpartition("/")[2]


def print_difference(console: Console, first: str, second: str, found: Difference) -> None:
    """What differs first, what the calls differ in, then the operations; what blocks repeat is told once."""
    if not found:
        console.print(Text("the graphs are the same"))
        return
    console.print(Text(clean(f"- {first}"), style="red"))
    console.print(Text(clean(f"+ {second}"), style="green"))
    console.print(Text.assemble(("first: ", "bold"), clean(found.first)), soft_wrap=True)
    console.print()
    for what, mine, other in alike_facts(found.facts):
        console.print(Text.assemble((clean(what), "bold"), clean(f": {mine}  ->  {other}")), soft_wrap=True)
    for same in grouped(found.changes):
        _print_change(console, same)
    if not found.changes:
        console.print(Text("the operations are the same"))
    else:
        ops = sum(len(change.removed) + len(change.added) for change in found.changes)
        console.print(Text(f"{ops:,} operations differ in {len(found.changes):,} places", style="dim"))


def _print_change(console: Console, same: Sequence[Change]) -> None:
    change = same[0]
    place = next((str(op.get("module")) for op in (*change.removed, *change.added) if op.get("module")), "")
    console.print(Text(clean(f"@ operation {change.position}{', ' + place if place else ''}"), style="cyan"))
    pairs = list(zip(change.removed, change.added, strict=False))
    if len(change.removed) == len(change.added) and all(_same_line(x, y) for x, y in pairs):
        for x, y in pairs[:_MOST_OPS]:
            line = f"{_COMMENT}{_short(_line(x))}: {code_of(x)}"
            said = f"~ {x.get('name')} = {x.get('op')} {x.get('type')} -> {y.get('type')}{line}"
            console.print(Text(clean(said), style="yellow"), soft_wrap=True)
        _print_more(console, "~", len(pairs), "yellow")
    else:
        for sign, ops, style in (("-", change.removed, "red"), ("+", change.added, "green")):
            for op in ops[:_MOST_OPS]:
                console.print(Text(clean(f"{sign} {_said(op)}"), style=style), soft_wrap=True)
            _print_more(console, sign, len(ops), style)
    if len(same) > 1:
        console.print(Text(f"  and the same in {len(same) - 1:,} more places", style="dim"))


def _same_line(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return first.get("op") == second.get("op") and code_of(dict(first)) == code_of(dict(second))


def _print_more(console: Console, sign: str, count: int, style: str) -> None:
    if count > _MOST_OPS:
        console.print(Text(f"{sign} and {count - _MOST_OPS:,} more", style=style))


def _said(op: Mapping[str, Any]) -> str:
    return f"{op.get('name')} = {op.get('op')} {op.get('type')}{_COMMENT}{_short(_line(op))}: {code_of(dict(op))}"


def _table(*titles: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), border_style="dim")
    for title in titles:
        numbers = title in _NUMBERS
        table.add_column(title, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    return table
