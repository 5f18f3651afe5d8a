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
from compile_policy.graphs.difference import Change, Difference
from compile_policy.graphs.search import Hit
from compile_policy.graphs.stats import Stats, code_of, line_of

_COMMENT = "  # "
_NUMBERS = ("count", "ops", "inputs", "seconds", "lowered operations in it", "captured operations")
_LONG_TABLE = 110  # columns that a table with a column of sentences needs


def print_entries(console: Console, records: Sequence[Mapping[str, Any]]) -> None:
    """One row an entry; runs only where there are several."""
    runs = len({record.get("run") for record in records}) > 1
    if console.width < _LONG_TABLE:
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


def print_source(console: Console, text: str) -> None:
    """A file as it is; on a terminal, comments step back."""
    if not console.is_terminal:
        console.out(clean(text), end="", highlight=False)
        return
    for line in clean(text).splitlines():
        code, mark, comment = line.partition(_COMMENT)
        whole = Text(line, style="dim") if line.startswith("# ") else Text.assemble(code, (mark + comment, "dim cyan"))
        console.print(whole, soft_wrap=True)


def print_stats(console: Console, record: Mapping[str, Any], stats: Stats, top: int) -> None:
    """Numbers of one entry."""
    console.print(Text(clean(f"{record.get('id')}: {stats.ops} operations"), style="bold"))
    _print_counts(console, "operation", stats.kinds, top)
    _print_counts(console, "module", stats.modules, top)
    _print_counts(console, "line of the model", stats.lines, top)
    if not stats.kernels:
        console.print(Text("no kernels: the backend generated no code, or it is not in the dump", style="dim"))
        return
    generated = sum(kernel.generated for kernel in stats.kernels)
    table = _table("lowered operations in it", "captured operations", "kernel")
    for kernel in sorted(stats.kernels, key=lambda k: -len(k.lowered))[:top]:
        table.add_row(str(len(kernel.lowered)), str(len(kernel.captured)), Text(clean(kernel.name)))
    console.print(table)
    said = f"{len(stats.kernels)} kernel calls, {generated} of generated code; {stats.fused} lowered operations fused"
    console.print(Text(said))
    console.print()


def _print_counts(console: Console, title: str, counts: Mapping[str, int], top: int) -> None:
    if not counts:
        return
    table = _table("count", title)
    for name, count in list(counts.items())[:top]:
        table.add_row(str(count), Text(clean(name)))
    if len(counts) > top:
        table.add_row(str(sum(list(counts.values())[top:])), Text(f"in {len(counts) - top} others", style="dim"))
    console.print(table)
    console.print()


def print_hits(console: Console, hits: Sequence[Hit]) -> None:
    """One row an operation."""
    if console.width < _LONG_TABLE:
        for hit in hits:
            console.print(Text(clean(f"{hit.entry}: {_said(hit.op)}")), soft_wrap=True)
        return
    table = _table("entry", "name", "op", "shape", "line of the model")
    for hit in hits:
        cells = (
            hit.entry,
            hit.op.get("name"),
            hit.op.get("op"),
            _shape(hit.op),
            f"{line_of(hit.op)} {code_of(hit.op)}",
        )
        table.add_row(*(Text(clean(str(cell))) for cell in cells))
    console.print(table)


def print_difference(console: Console, first: str, second: str, found: Difference) -> None:
    """What the calls differ in, then the operations, first ones first."""
    if not found:
        console.print(Text("the graphs are the same"))
        return
    console.print(Text(clean(f"- {first}"), style="red"))
    console.print(Text(clean(f"+ {second}"), style="green"))
    for what, mine, other in found.facts:
        console.print(Text(clean(f"{what}: {mine}  ->  {other}")), soft_wrap=True)
    for change in found.changes:
        _print_change(console, change)
    if not found.changes:
        console.print(Text("the operations are the same"))


def _print_change(console: Console, change: Change) -> None:
    console.print(Text(f"@ operation {change.position}", style="cyan"))
    for sign, ops, style in (("-", change.removed, "red"), ("+", change.added, "green")):
        for op in ops:
            console.print(Text(clean(f"{sign} {_said(op)}"), style=style), soft_wrap=True)


def _said(op: Mapping[str, Any]) -> str:
    return f"{op.get('name')} = {op.get('op')} {_shape(op)}{_COMMENT}{line_of(dict(op))}: {code_of(dict(op))}"


def _shape(op: Mapping[str, Any]) -> str:
    shape = op.get("shape")
    return f"[{', '.join(map(str, shape))}]" if isinstance(shape, list) else ""


def _table(*titles: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), border_style="dim")
    for title in titles:
        numbers = title in _NUMBERS
        table.add_column(title, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    return table
