"""Artifacts, findings and differences as tables."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from compile_policy.artifacts import Store
from compile_policy.artifacts.doctor import Examination
from compile_policy.artifacts.key import Difference
from compile_policy.cli.terminal import clean
from compile_policy.errors import InputError
from compile_policy.settings import bytes_in

_SHORT = 12  # letters of a digest that people need
_LONG_TABLE = 90  # columns that the table of artifacts needs
_VALUE = 160  # letters of a factor's value
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_AGES = ((86_400.0, "d"), (3600.0, "h"), (60.0, "min"))


def print_artifacts(console: Console, rows: Sequence[dict[str, Any]], store: Store) -> None:
    """One row an artifact, and the sum."""
    if rows and console.width >= _LONG_TABLE:
        table = _table("artifact", "of", "size", "files", "used", "signed")
        for column in (2, 3, 4):
            table.columns[column].justify = "right"
        for row in rows:
            table.add_row(Text(row["digest"][:_SHORT], style="bold"), _subject(row), *_facts(row))
        console.print(table)
        console.print()
    elif rows:
        for row in rows:
            size, files, used, signed = (fact.plain for fact in _facts(row))
            console.print(Text.assemble((row["digest"][:_SHORT], "bold"), "  ", _subject(row)))
            line = f"{size}, {files} files, used {used}, {'signed' if signed == 'yes' else 'not signed'}"
            console.print(Padding(Text(line, style="dim"), (0, 0, 0, 2), expand=False))
    total = size_text(sum(row["bytes"] for row in rows))
    what = "1 artifact" if len(rows) == 1 else f"{len(rows)} artifacts"
    said, place = f"{what}, {total} of {size_text(store.limit_bytes)}", clean(f"in {store.root}")
    fits = len(said) + len(place) + 2 <= console.width
    console.print(Text(f"{said}, {place}" if fits else f"{said}\n{place}"))


def print_examination(console: Console, found: Examination, store: Store) -> None:
    """What was looked at, then what was found, each with its remedy."""
    signed = "signed with a key" if store.secret else "not signed"
    facts = (
        ("directory", str(store.root)),
        ("artifacts", f"{found.good} good, {found.damaged} damaged, {signed}"),
        ("size", f"{size_text(found.size)} of {size_text(store.limit_bytes)}"),
    )
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(Text(name, style="dim"), Text(clean(value)))
    console.print(grid)
    console.print()
    for finding in sorted(found.findings, key=lambda finding: finding.kind != "problem"):
        style = "bold red" if finding.kind == "problem" else "yellow"
        console.print(Text.assemble((f"{finding.kind}: ", style), clean(finding.what)))
        console.print(Padding(Text(clean(finding.remedy), style="cyan"), (0, 0, 0, 2), expand=False))
    if not found.findings:
        console.print(Text("nothing is wrong", style="green"))


def print_differences(console: Console, rows: Sequence[Difference]) -> None:
    """Factor, stored, wanted."""
    table = _table("factor", "stored", "wanted")
    for row in rows:
        table.add_row(Text(clean(row.factor), style="bold"), _value(row.stored), _value(row.wanted))
    console.print(table)


def size_text(size: float) -> str:
    """``1.5 MiB``."""
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} B" if unit == 0 else f"{size:.1f}".removesuffix(".0") + f" {_UNITS[unit]}"


def parse_size(text: str) -> int:
    """Bytes: ``500MB`` counts in thousands, ``500MiB`` in 1024s.

    Raises:
        InputError: it is no size.
    """
    try:
        return bytes_in(text)
    except ValueError:
        raise InputError(f"{text!r} is no size.", remedy="Write 500MB or 2GiB.") from None


def _table(*titles: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), border_style="dim")
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _subject(row: dict[str, Any]) -> Text:
    """What an artifact is of, as whoever saved it says."""
    if "damaged" in row:
        return Text(clean(row["damaged"]), style="red")
    meta = row["meta"]
    parts = [str(meta[name]) for name in ("component", "class", "kind") if meta.get(name) not in (None, "")]
    return Text(clean(" ".join(parts) or "-"))


def _facts(row: dict[str, Any]) -> list[Text]:
    signed = Text("yes", style="green") if row["signed"] else Text("no", style="yellow")
    return [Text(size_text(row["bytes"])), Text(str(row.get("files", "-"))), Text(_age(row["used"])), signed]


def _age(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for length, unit in _AGES:
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return "just now"


def _value(value: Any) -> Text:
    text = value if isinstance(value, str) else json.dumps(value)
    return Text(clean(text if len(text) <= _VALUE else f"{text[:_VALUE]} ..."))
