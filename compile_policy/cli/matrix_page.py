"""The matrix as a table in the terminal and as a page in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from compile_policy.cli.terminal import clean

Row = Mapping[str, Any]
_KINDS = (("none", "no cache"), ("dynamic", "dynamic cache"), ("static", "static cache"))
_HEAD = ("architecture", *(title for _, title in _KINDS), "encoders", "control")
_STYLES = {"ok": "green", "graphs": "yellow", "eager": "yellow", "wrong": "bold red", "raises": "bold red"}
_INTRODUCTION = """\
Measured with torch {torch} and Transformers {transformers} by `compile-policy matrix --out docs/models.md`.
`compile-policy matrix --check docs/models.md` fails where a line is no longer true. Do not edit by hand.

Each architecture is built tiny with random weights. Up to six requests (several lengths, one to three rows with
padding, none to three pictures of different sizes) run eager and under the policy: the model's forward without a
cache, then `generate` with a dynamic and with a static cache. A number is the count of graphs for all of these
requests, every call compiled and equal to eager. `eager`: some or all calls run eager, for the reason given. `n/a`:
eager itself cannot run it. `-`: the model has no such component. Control: whether an ignored mask or a blank picture
would have been noticed."""
#: A difference that the comparison could not miss, relative to the largest logit.
_BITES = 0.05


def cells(row: Row) -> dict[str, Mapping[str, Any]]:
    """Title -> what happened, for every column that was measured."""
    found = {title: row["decoder"][kind] for kind, title in _KINDS} if row.get("decoder") else {}
    return {**found, "encoders": row["encoder"]} if row.get("encoder") else found


def word(cell: Mapping[str, Any]) -> str:
    """A cell in a word: the number of graphs, or what happened instead."""
    if cell["state"] in ("ok", "graphs"):
        return str(cell["graphs"])
    state = str(cell["state"])
    return {"absent": "-", "no reference": "n/a"}.get(state, state)


def control(row: Row) -> str:
    return "bites" if row.get("control", 0.0) > _BITES else "weak"


def table(rows: Sequence[Row]) -> Table:
    """For a terminal: a line each, and the reasons below their architecture."""
    out = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, border_style="dim")
    for title in (*_HEAD, "why not one graph"):
        out.add_column(title, no_wrap=title == "architecture")
    for row in rows:
        if row.get("obstacle"):
            blanks = [Text("") for _ in _HEAD[1:]]
            out.add_row(Text(clean(row["model_type"])), *blanks, Text(clean(row["obstacle"])))
            continue
        found = cells(row)
        words = [Text(word(found[t]), style=_STYLES.get(found[t]["state"], "dim")) for t in _HEAD[1:-1]]
        out.add_row(Text(clean(row["model_type"])), *words, Text(control(row)), Text(clean("\n".join(reasons(row)))))
    return out


def reasons(row: Row) -> list[str]:
    """One sentence for each different obstacle, with the columns that it stands in."""
    by_reason: dict[str, list[str]] = {}
    for title, cell in cells(row).items():
        if cell["state"] in ("ok", "absent"):
            continue
        where = f" ({cell['place']})" if cell.get("place") else ""
        text = f"{cell['reason'] or 'more graphs than one'}{where}"
        remedy = f" {cell['remedy']}" if cell.get("remedy") else ""
        by_reason.setdefault(f"{text}.{remedy}".replace("..", "."), []).append(title)
    return [f"{', '.join(titles)}: {text}" for text, titles in by_reason.items()]


def row_lines(row: Row) -> list[str]:
    """The lines of the page that belong to one architecture."""
    name = row["model_type"]
    if row.get("obstacle"):
        return [f"| `{name}` | | | | | | {_escaped(row['obstacle'])} |"]
    found = cells(row)
    words = " | ".join(word(found[title]) for title in _HEAD[1:-1])
    why = "<br>".join(_escaped(reason) for reason in reasons(row))
    return [f"| `{name}` | {words} | {control(row)} | {why} |"]


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def page(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """The page; every line below the introduction is measured."""
    measured = [row for row in rows if not row.get("obstacle")]
    counts = []
    for title in _HEAD[1:-1]:
        states = [cells(row)[title]["state"] for row in measured]
        there = [s for s in states if s not in ("absent", "no reference")]
        counts.append(f"| {title} | {sum(s == 'ok' for s in there)} | {len(there)} |")
    return "\n".join(
        [
            "# Architectures",
            "",
            *_INTRODUCTION.format(**versions).splitlines(),
            "",
            "| column | one graph, equal | measured |",
            "|---|---|---|",
            *counts,
            "",
            f"| {' | '.join(_HEAD)} | why not one graph |",
            f"|{'---|' * (len(_HEAD) + 1)}",
            *(line for row in rows for line in row_lines(row)),
            "",
        ]
    )
