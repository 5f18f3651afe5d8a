"""The table of workloads in the terminal and as a page in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from compile_policy.cli.terminal import clean

Row = Mapping[str, Any]
#: How many times its tolerance the control of a workload has to be off.
BITES = 10
_COLUMNS = ("equal", "graphs", "eager calls", "stock: equal", "graphs")
_WORDS = {"equal": "yes", "wrong": "**no**", "eager raises": "n/a", "missing": "-"}
_STYLES = {"equal": "green", "wrong": "bold red", "raises": "bold red"}
_NOT_MEASURED = ("eager raises", "missing")
_INTRODUCTION = """\
What the policy does in each use of a model: measured, never written by hand.

Measured with torch {torch} and Transformers {transformers} by `compile-policy matrix --workloads --out
docs/workloads.md`. `compile-policy matrix --workloads --check docs/workloads.md [NAMES...]` fails where a line is no
longer true.

Each workload is a small function in `compile_policy_transformers.workloads`. It builds a tiny model with random
weights (a Llama, where no other is named), compiles it as a user would, and works with batches or prompts of several
sizes. It runs eager, then under the policy in its default configuration through Inductor, then with stock
`model.compile(dynamic=True)`, from the same seeds. Compared are losses, all gradients of each step, the trained
weights at the end, logits of each step and tokens."""
_LEGEND = """\
- **equal**: the error of a tensor is max |got - eager| / max |eager|, where a tensor much smaller than the others of
  its kind (gradients, say) counts as a thousandth of the largest. Every tensor has to be within 0.001; within 0.05
  where products are rounded to bfloat16 or float16, and 0.01 with weights of eight bits. Tokens, shapes, dtypes and
  the number of results have to be the same.
- **graphs**: graphs of all compiled components, compiled or loaded from the store. Training and evaluation are one
  each. **eager calls**: calls of compiled components that ran eager; the reason is below the table.
- **raises**: where eager does not. **n/a**: eager itself raises. **-**: a package is not installed.
- **stock**: `model.compile(dynamic=True)` in the same place; its graphs are those of Dynamo, with graph breaks and
  recompilations.
- **control**: a mistake that is made on purpose in an eager run. It has to change the results by ten times the
  tolerance at least; `weak` says that it does not."""


def _result(row: Row, way: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] | None = row.get(way)
    return found or {"state": "missing", "graphs": 0, "eager_calls": 0, "reason": ""}


def cells(row: Row) -> list[str]:
    """The cells of a row behind its name, in words."""
    ours, stock = _result(row, "policy"), _result(row, "stock")
    mine = [_word(ours), *_numbers(ours, "graphs", "eager_calls")]
    bites = row["control"] > BITES * row["tolerance"]
    control = row["mistake"] if bites else f"weak: {row['mistake']}"
    return [*mine, _word(stock), *_numbers(stock, "graphs"), control]


def _word(result: Mapping[str, Any]) -> str:
    state = str(result["state"])
    return _WORDS.get(state, state)


def _numbers(result: Mapping[str, Any], *names: str) -> list[str]:
    known = result["state"] in ("equal", "wrong")
    return [str(result[name]) if known else "-" for name in names]


def reasons(row: Row) -> list[str]:
    """Why calls ran eager, why it raises, or what the second graph is for."""
    if row.get("obstacle"):
        return [str(row["obstacle"])]
    reason = str(_result(row, "policy")["reason"])
    return [reason] if reason else []


def totals(rows: Sequence[Row]) -> list[tuple[str, int, int, list[str]]]:
    """(what, how many hold, how many were measured, names of those that do not)."""
    there = [row for row in rows if not row.get("obstacle") and _result(row, "policy")["state"] not in _NOT_MEASURED]
    beside = [row for row in there if _result(row, "stock")["state"] not in _NOT_MEASURED]
    return [
        _total("equal to eager", there, "policy", lambda result: result["state"] == "equal"),
        _total("equal, without an eager call", there, "policy", _compiled),
        _total("stock: equal to eager", beside, "stock", lambda result: result["state"] == "equal"),
    ]


def _compiled(result: Mapping[str, Any]) -> bool:
    return bool(result["state"] == "equal" and result["graphs"] and not result["eager_calls"])


def _total(what: str, rows: Sequence[Row], way: str, holds: Any) -> tuple[str, int, int, list[str]]:
    rest = [str(row["workload"]) for row in rows if not holds(_result(row, way))]
    return what, len(rows) - len(rest), len(rows), rest


def table(rows: Sequence[Row]) -> Group:
    """For a terminal: a line each, below it the reasons, and the totals last."""
    out = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), border_style="dim")
    for title in ("workload", *_COLUMNS, "control"):
        out.add_column(title, justify="left" if title in ("workload", "control") else "center")
    for row in rows:
        words = ["?"] if row.get("obstacle") else [word.strip("*") for word in cells(row)]
        style = "dim" if row.get("obstacle") else _STYLES.get(str(_result(row, "policy")["state"]), "dim")
        out.add_row(Text(clean(row["workload"])), Text(words[0], style=style), *(Text(clean(w)) for w in words[1:]))
    why = [line for row in rows for line in _in_terminal(row)]
    sums = [Text(f"{what}: {good} of {total}") for what, good, total, _ in totals(rows) if total]
    return Group(out, *([Text("")] if why else []), *why, Text(""), *sums)


def _in_terminal(row: Row) -> Iterator[Text]:
    for reason in reasons(row):
        yield Text.assemble((clean(row["workload"]), "bold"), "  ", clean(" ".join(reason.split())))


def row_lines(row: Row) -> list[str]:
    """The lines of the page that belong to one workload."""
    name = row["workload"]
    why = [f"- **{name}**: {_escaped(reason)}" for reason in reasons(row)]
    if row.get("obstacle"):
        return [f"| **{name}** |{' |' * (len(_COLUMNS) + 1)}", *why]
    return [f"| **{name}**: {_escaped(row['what'])} | {' | '.join(map(_escaped, cells(row)))} |", *why]


def lines_about(name: str, text: str) -> list[str]:
    """The lines of a page that belong to one workload, as they stand there."""
    marks = (f"| **{name}** |", f"| **{name}**:", f"- **{name}**:")
    return [line for line in text.splitlines() if line.startswith(marks)]


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def page(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """The page; every line below the introduction is measured."""
    out = ["# Workloads", "", *_INTRODUCTION.format(**versions).splitlines(), ""]
    out += [f"| {len(rows)} workloads | | but |", "|---|---|---|"]
    for what, good, total, rest in totals(rows):
        out.append(f"| {what} | {good} of {total} | {_escaped(', '.join(rest)) or '-'} |")
    out += ["", *_LEGEND.splitlines(), ""]
    for section in dict.fromkeys(str(row.get("section", "Not measured")) for row in rows):
        lines = [row_lines(row) for row in rows if row.get("section", "Not measured") == section]
        why = [line for found in lines for line in found[1:]]
        out += [f"## {section}", "", f"| workload | {' | '.join(_COLUMNS)} | control |"]
        out += [f"|---|{':-:|' * len(_COLUMNS)}---|", *(found[0] for found in lines), ""]
        out += [*why, ""] if why else []
    return "\n".join(out)
