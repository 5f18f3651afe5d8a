"""Plan, report and configuration as tables.

A name is never broken and a sentence never squeezed: where the screen is too narrow for all columns, the table keeps
what is short and the rest stands below it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from compile_policy.cli.terminal import clean

Row = dict[str, Any]

_STYLES = {"compile": "green", "compiled": "green", "eager": "default", "skip": "dim", "fell back": "bold yellow"}
_COUNTS = ("graphs", "calls", "eager", "compile s")
_GAP = 2
_SENTENCE = 32  # columns that a sentence needs to read well
_SHORT_TABLE = 72  # columns that the table of short things needs


def print_report(console: Console, rows: Sequence[Row]) -> None:
    """One row a component: what it did in effect, why, and how often; then what would change a fallback."""
    _print_components(console, rows, counted=True)
    for row in rows:
        if row["fallback"] and row["remedy"]:
            console.print(Text.assemble((f"{clean(row['role'])}: ", "bold"), clean(row["remedy"])))


def print_compiled(console: Console, rows: Sequence[Row]) -> None:
    """How many calls of each component were compiled, one sentence each."""
    wanted = [row for row in rows if row["decision"] == "compile"]
    for row in wanted:
        compiled = row["calls"] - row["eager_calls"]
        good = row["state"] == "compiled"
        said = f"{compiled} of {row['calls']} {row['role']} calls were compiled"
        console.print(Text(clean(said), style="green" if good else "bold yellow"))
    if not wanted:
        console.print(Text("nothing of this model is to be compiled", style="bold yellow"))


def print_plan(console: Console, rows: Sequence[Row], notes: Iterable[str]) -> None:
    """One row a component: what will happen and why, and what would change it."""
    _print_components(console, rows, counted=False)
    for row in rows:
        if row.get("remedy"):
            console.print(Text.assemble((f"{clean(row['role'])}: ", "bold"), clean(row["remedy"])))
    for note in notes:
        console.print(Text(clean(f"note: {note}")))


def print_warmup(console: Console, rows: Sequence[Row], seconds: float, *, checked: bool) -> None:
    """One row a component: what was compiled and loaded; or, for a check, what the store lacks."""
    table = _table()
    for title in ("component", "compiled", "loaded", "compile s"):
        table.add_column(title, justify="left" if title == "component" else "right", no_wrap=True)
    for row in rows:
        name = Text(clean(f"{row['role']} {row['qualname']}".strip()))
        table.add_row(name, str(row["graphs"]), str(row["loaded"]), f"{row['compile_seconds']:.1f}")
    console.print(table)
    for row in rows:
        for reason in row["missing"] if checked else [row["fallback"]] if row["fallback"] else []:
            console.print(Text.assemble((f"{clean(row['role'])}: ", "bold yellow"), clean(reason)))
    if not checked:
        console.print(f"in {seconds:.1f} s", style="dim")


def print_config(console: Console, rows: Iterable[tuple[str, Any, str]]) -> None:
    """Field, value, origin; what isn't a default stands out."""
    table = _table()
    for title in ("field", "value", "origin"):
        table.add_column(title, overflow="fold")
    for name, value, origin in rows:
        style = "" if origin == "default" else "bold cyan"
        table.add_row(name, Text(clean(_spelled(value))), Text(clean(origin)), style=style)
    console.print(table)


def _spelled(value: Any) -> str:
    """A configuration value as a file or a flag would spell it."""
    if value is None:
        return "-"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP, 0, 0), border_style="dim")


def _print_components(console: Console, rows: Sequence[Row], *, counted: bool) -> None:
    if console.width >= _width_of_all(rows, counted=counted):
        console.print(_full(rows, counted=counted))
        return
    tabular = counted and console.width >= _SHORT_TABLE
    if tabular:
        console.print(_short(rows))
        console.print()
    for row in rows:
        name = Text.assemble((clean(row["role"]), "bold"), f"  {clean(row['qualname'])}  ", (clean(row["cls"]), "dim"))
        console.print(name)
        for line in _sentences(row, counted=counted, tabular=tabular):
            console.print(Padding(line, (0, 0, 0, 2), expand=False))


def _width_of_all(rows: Sequence[Row], *, counted: bool) -> int:
    names = max((max(len(row["role"]), len(row["qualname"])) for row in rows), default=0)
    classes = max((len(row["cls"]) for row in rows), default=0)
    width = names + classes + len("fell back") + _SENTENCE + 4 * _GAP
    if counted:
        width += sum(len(title) + _GAP for title in _COUNTS) + len("1 loaded") + len("fallback")
        width += _SENTENCE if any(row["fallback"] for row in rows) else 0
    return width


def _full(rows: Sequence[Row], *, counted: bool) -> Table:
    """Everything in one table."""
    table = _table()
    for title in ("component", "class", "state" if counted else "decision"):
        table.add_column(title, no_wrap=True)
    table.add_column("reason", max_width=72)
    if counted:
        _add_counts(table)
        table.add_column("fallback", max_width=60)
    for row in rows:
        name = Text(clean(row["role"]), style="bold")
        if row["qualname"]:
            name.append(f"\n{clean(row['qualname'])}", style="not bold dim")
        decided = _state(row) if counted else _decision(row)
        cells = [name, Text(clean(row["cls"])), decided, Text(_why(row))]
        if counted:
            cells += [*_counts(row), _fallback(row["fallback"])]
        table.add_row(*cells)
    return table


def _short(rows: Sequence[Row]) -> Table:
    """What fits everywhere: roles, states, numbers."""
    table = _table()
    table.add_column("component", no_wrap=True)
    table.add_column("state", no_wrap=True)
    _add_counts(table)
    table.add_column("fallback", no_wrap=True)
    for row in rows:
        name = Text(clean(row["role"]), style="bold")
        table.add_row(name, _state(row), *_counts(row), _fallback("see below" if row["fallback"] else None))
    return table


def _sentences(row: Row, *, counted: bool, tabular: bool) -> Iterable[Text]:
    """What the short table leaves out, or all there is when there is no room for a table."""
    decided = _state(row) if counted else _decision(row)
    yield Text.assemble(decided, ": ", _why(row))
    if counted and not tabular:
        yield Text(", ".join(f"{title} {cell.plain}" for title, cell in zip(_COUNTS, _counts(row), strict=True)))
    if counted and (row["fallback"] or not tabular):
        yield Text.assemble("fallback: ", _fallback(row["fallback"]))


def _why(row: Row) -> str:
    """The reason, and how the graph was divided where that is known."""
    return clean("; ".join(part for part in (row["reason"], row.get("blocks")) if part))


def _add_counts(table: Table) -> None:
    for title in _COUNTS:
        table.add_column(title, justify="right", no_wrap=True)


def _decision(row: Row) -> Text:
    return Text(clean(row["decision"]), style=_STYLES.get(row["decision"], ""))


def _state(row: Row) -> Text:
    """What a component did in effect; ``skip`` is eager by plan."""
    return Text(clean(row["state"]), style=_STYLES.get(row["state"], ""))


def _counts(row: Row) -> list[Text]:
    """Graphs, calls, eager calls, seconds; calls are only counted where the policy sees them."""
    if row["decision"] != "compile":
        return [Text("-", style="dim") for _ in _COUNTS]
    made = [str(row["graphs"])] if row["graphs"] or not row["loaded"] else []
    loaded = [f"{row['loaded']} loaded"] if row["loaded"] else []
    took = f"{row['compile_seconds']:.1f}" if row["graphs"] or not row["loaded"] else "-"
    return [Text(" + ".join(made + loaded)), Text(str(row["calls"])), Text(str(row["eager_calls"])), Text(took)]


def _fallback(reason: str | None) -> Text:
    return Text(clean(reason), style="yellow") if reason else Text("none", style="dim")
