"""The matrix as a table in the terminal and as a page in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from compile_policy.cli.terminal import clean

Row = Mapping[str, Any]
_KINDS = (("none", "no cache"), ("dynamic", "dynamic"), ("static", "static"))
_ENCODERS = (("vision", "image/video"), ("audio", "audio"))
_COLUMNS = tuple(title for _, title in (*_KINDS, *_ENCODERS))
_LONG = {
    "no cache": "decoder, no cache",
    "dynamic": "decoder, dynamic cache",
    "static": "decoder, static cache",
    "image/video": "image and video encoders",
    "audio": "audio encoders",
}
_STYLES = {"ok": "green", "graphs": "yellow", "eager": "yellow", "wrong": "bold red", "raises": "bold red"}
_WORDS = {"absent": "-", "no reference": "n/a"}
#: Nothing to measure: no such component, eager cannot run it, or nothing reaches it.
_NOT_MEASURED = ("absent", "no reference", "idle")
_INTRODUCTION = """\
What the policy does with each architecture of the installed Transformers: measured, never written by hand.

Measured with torch {torch} and Transformers {transformers} by `compile-policy matrix --out docs/models.md`.
`compile-policy matrix --check docs/models.md [TYPES...]` fails where a line is no longer true.

Each architecture is built tiny with random weights. Up to eight requests (several lengths, one to three rows with
padding, none to three pictures of different sizes, none to two videos of different lengths and sizes, alone and
beside a picture, none to three pieces of sound of different lengths) run eager and under the policy: the model's
forward without a cache, then `generate` with a dynamic and with a static cache, then forward with the
encoders compiled too."""
_LEGEND = """\
- **1**: one graph for each component and all requests, every call compiled, equal to eager. A larger number: equal,
  with so many graphs.
- **eager**: equal, some or all calls run eager with a warning. **wrong**, **raises**: a fault of the policy.
- **-**: no such component. **n/a**: eager itself cannot run it. **idle**: no request of the measurement reaches it.
  A static cache that fails with the default attention is measured with `attn_implementation="eager"`.
- **image/video**: encoders of pictures and of videos, which most architectures share: one graph serves both.
- **control**: `bites` where an ignored padding mask, a blank picture or video, or silence changes the result so much
  that the comparison would notice it."""
#: A difference that the comparison could not miss, relative to the largest logit.
_BITES = 0.05


def cells(row: Row) -> dict[str, Mapping[str, Any]]:
    """Column -> what happened, for every column that was measured."""
    found = {title: row["decoder"][kind] for kind, title in _KINDS} if row.get("decoder") else {}
    return {**found, **{title: row["encoders"][name] for name, title in _ENCODERS if row.get("encoders")}}


def word(cell: Mapping[str, Any]) -> str:
    """A cell in a word: the number of graphs, or what happened instead."""
    state = str(cell["state"])
    return {"ok": "1", "graphs": str(cell["graphs"])}.get(state, _WORDS.get(state, state))


def control(row: Row) -> str:
    return "bites" if row.get("control", 0.0) > _BITES else "weak"


def reasons(row: Row) -> list[str]:
    """One sentence for each different obstacle, with the columns that it stands in and the model's line."""
    by_reason: dict[str, list[str]] = {}
    for title, cell in cells(row).items():
        if cell["state"] in ("ok", "absent"):
            continue
        reason = cell["reason"] or {"wrong": "differs from eager"}.get(cell["state"], "more graphs than one")
        reason = re.sub(r"(differs from eager) by \S+", r"\1", reason)  # the figure is the processor's
        named = cell.get("place") and cell["place"] not in reason
        where = f" ({cell['place']})" if named else ""
        remedy = f" {cell['remedy']}" if cell.get("remedy") else ""
        by_reason.setdefault(f"{reason.rstrip('.')}{where}.{remedy}", []).append(title)
    return [f"{', '.join(titles)}: {text}" for text, titles in by_reason.items()]


def totals(rows: Sequence[Row]) -> list[tuple[str, int, int, list[str]]]:
    """(what, how many hold, how many were measured, names of those that do not)."""
    measured = [(str(row["model_type"]), row, cells(row)) for row in rows if not row.get("obstacle")]
    out = []
    for title in _COLUMNS:
        there = [(name, found[title]) for name, _, found in measured if found[title]["state"] not in _NOT_MEASURED]
        not_one = [f"{name} ({word(cell)})" for name, cell in there if cell["state"] != "ok"]
        out.append((f"{_LONG[title]}: one graph, equal", len(there) - len(not_one), len(there), not_one))
    faults = [name for name, _, found in measured if any(c["state"] in ("wrong", "raises") for c in found.values())]
    out.append(("everything equal to eager", len(measured) - len(faults), len(measured), faults))
    weak = [name for name, row, _ in measured if control(row) == "weak"]
    out.append(("the comparison would notice a fault", len(measured) - len(weak), len(measured), weak))
    return out


def _those_with(rows: Sequence[Row], field: str) -> str:
    names = [str(row["model_type"]) for row in rows if row.get(field)]
    return f"{len(names)}: {', '.join(names) or '-'}."


def table(rows: Sequence[Row]) -> Group:
    """For a terminal: a line each, below it the reasons, and the totals last."""
    out = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), border_style="dim")
    for title in ("architecture", *_COLUMNS, "control"):
        out.add_column(title, no_wrap=True, justify="left" if title in ("architecture", "control") else "center")
    for row in rows:
        found = {} if row.get("obstacle") else cells(row)
        words = [Text(word(c), style=_STYLES.get(c["state"], "dim")) for c in found.values()]
        blank = [Text("?", style="dim")] if not found else []
        out.add_row(Text(clean(row["model_type"])), *(words or blank), *([Text(control(row))] if words else []))
    why = [line for row in rows for line in _in_terminal(row)]
    sums = [Text(f"{what}: {good} of {total}") for what, good, total, _ in totals(rows) if total]
    return Group(out, *([Text("")] if why else []), *why, Text(""), *sums)


def _in_terminal(row: Row) -> Iterator[Text]:
    for reason in [row["obstacle"]] if row.get("obstacle") else reasons(row):
        yield Text.assemble((clean(row["model_type"]), "bold"), "  ", clean(" ".join(reason.split())))


def row_lines(row: Row) -> list[str]:
    """The lines of the page that belong to one architecture."""
    name = row["model_type"]
    if row.get("obstacle"):
        return [f"| `{name}` |{' |' * (len(_COLUMNS) + 1)}", f"- `{name}`: {_escaped(row['obstacle'])}"]
    words = " | ".join(word(cell) for cell in cells(row).values())
    return [f"| `{name}` | {words} | {control(row)} |", *(f"- `{name}`, {_escaped(r)}" for r in reasons(row))]


def lines_about(name: str, text: str) -> list[str]:
    """The lines of a page that belong to one architecture, as they stand there."""
    marks = (f"| `{name}` |", f"- `{name}`,", f"- `{name}`:")
    return [line for line in text.splitlines() if line.startswith(marks)]


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def page(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """The page; every line below the introduction is measured."""
    lines = [row_lines(row) for row in rows]
    sums = totals(rows)
    head = ("architecture", *_COLUMNS, "control")
    return "\n".join(
        [
            "# Architectures",
            "",
            *_INTRODUCTION.format(**versions).splitlines(),
            "",
            f"| {len(rows)} architectures | | |",
            "|---|---|---|",
            *(
                f"| {what} | {good} of {total} | {_escaped(', '.join(rest)) or '-'} |"
                for what, good, total, rest in sums
            ),
            "",
            f"Given videos too, {_those_with(rows, 'videos')}",
            "",
            f"With an image tower of Transformers' in place of timm's, {_those_with(rows, 'stand_in')}",
            "",
            *_LEGEND.splitlines(),
            "",
            f"| {' | '.join(head)} |",
            f"|---|{':-:|' * len(_COLUMNS)}---|",
            *(found[0] for found in lines),
            "",
            "## Reasons",
            "",
            *(line for found in lines for line in found[1:]),
            "",
        ]
    )
