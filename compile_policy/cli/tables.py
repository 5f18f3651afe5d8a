"""Plan, report and configuration as tables; on a narrow terminal the sentences move below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from compile_policy.cli.terminal import clean

_STYLES = {"compile": "green", "eager": "default", "skip": "dim"}
_WIDE = 110

Row = dict[str, Any]


def print_report(console: Console, rows: Sequence[Row]) -> None:
    """One row a component: what was decided, why, and what happened."""
    counts = [("graphs", "graphs"), ("calls", "calls"), ("compile s", "compile_seconds")]
    fallback = any(row["fallback"] for row in rows)
    table = _table(console, fallback=fallback, counts=[title for title, _ in counts])
    for row in rows:
        cells = [_cell(row[key]) for _, key in counts]
        _add(console, table, row, cells, fallback=fallback)
    _print(console, table, rows)


def print_plan(console: Console, rows: Sequence[Row], notes: Iterable[str]) -> None:
    """One row a component: what will happen and why, and what would change it."""
    table = _table(console, fallback=False, counts=[])
    for row in rows:
        _add(console, table, row, [], fallback=False)
    _print(console, table, rows)
    for row in rows:
        if row.get("remedy"):
            console.print(Text(clean(f"{row['role']}: {row['remedy']}"), style="yellow"))
    for note in notes:
        console.print(Text(clean(f"note: {note}")))


def print_config(console: Console, rows: Iterable[tuple[str, Any, str]]) -> None:
    """Field, value, origin; what isn't a default stands out."""
    table = Table("field", "value", "origin", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, value, origin in rows:
        style = "dim" if origin == "default" else "bold"
        table.add_row(name, Text(clean(spelled(value))), Text(clean(origin)), style=style)
    console.print(table)


def spelled(value: Any) -> str:
    """A configuration value as a file or a flag would spell it."""
    if value is None or isinstance(value, bool):
        return {None: "-", True: "true", False: "false"}[value]
    return str(value)


def _table(console: Console, *, fallback: bool, counts: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("component", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("decision", no_wrap=True)
    if console.width >= _WIDE:
        table.add_column("reason", overflow="fold", ratio=1, min_width=24)
    for title in counts:
        table.add_column(title, justify="right", no_wrap=True)
    if counts:
        # Named also when nothing fell back: that nothing did is what the reader wants to know.
        table.add_column("fallback", overflow="fold", ratio=1 if fallback else None)
    return table


def _add(console: Console, table: Table, row: Row, cells: list[str], *, fallback: bool) -> None:
    name = Text(clean(row["role"]), style="bold")
    if row["qualname"]:
        name.append(f"\n{clean(row['qualname'])}", style="not bold dim")
    decision = Text(clean(row["decision"]), style=_STYLES.get(row["decision"], ""))
    line: list[Text] = [name, Text(clean(row["cls"])), decision]
    if console.width >= _WIDE:
        line.append(Text(clean(row["reason"])))
    line += [Text(cell) for cell in cells]
    if cells:
        reason = row["fallback"]
        line.append(Text(clean(reason), style="yellow") if reason else Text("-" if fallback else "none", style="dim"))
    table.add_row(*line)


def _print(console: Console, table: Table, rows: Sequence[Row]) -> None:
    console.print(table)
    if console.width < _WIDE:
        for row in rows:
            console.print(Text.assemble((clean(row["role"]), "bold"), ": ", clean(row["reason"])))


def _cell(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
