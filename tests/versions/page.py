"""docs/versions.md, made from what the contract found in each environment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .pairs import PAIRS, PINNED, Pair

Row = Mapping[str, Any]
NOT_RUN = "not run"
_INTRODUCTION = """\
# Versions

What holds with each pair of versions: measured by `make test-versions`, never written by hand. The floors are
Python 3.11, torch 2.11 and Transformers 5.17; an older one is refused with the command that installs a tested one. A
newer one than tested is told of once, has to pass a self-test, and is compiled then.

Each environment has the package, its dependencies and these versions. There the contract
(`tests/versions/contract.py`) runs the embedded model through Inductor in two processes on one cache directory, tiny
architectures with random weights (two sizes, dynamic and static cache, equal to eager within 1e-3; graphs run as
captured), a recorder (a hook and a buffer), a forward that cannot be compiled, and the self-tests. For a pair that the
contract has not been run on there is a note below of what was tried instead.
"""
_LEGEND = """\
- **embedded model**: graphs of its decoder, and what the second process does: `loaded, 0 frames` compiles and traces
  nothing.
- **architectures**: how many are equal to eager with every call compiled, of those that were run. Graphs of a decoder
  that are not the pin's stand below.
- **writes seen by**: `versions`: an attribute write raises the version of a dict. `contents`: it does not (Python
  3.13.0), and values are compared instead.
"""


def page(results: Mapping[str, Row]) -> str:
    """The page for the rows by `Pair.name`."""
    return "\n".join([_INTRODUCTION, *_table(results), "", _LEGEND, *_reasons(results)]).rstrip() + "\n"


def problems(pair: Pair, results: Mapping[str, Row]) -> list[str]:
    """What does not hold for a pair, in words; a difference from the pin's graph counts is one."""
    row = results.get(pair.name)
    if row is None:
        return [f"{NOT_RUN} yet"]
    if NOT_RUN in row:
        return [f"{NOT_RUN}: {row[NOT_RUN]}"]
    found = [f"self-test, {name}: {said}" for name, passed, said in row["self-test"] if not passed]
    for part in ("recorder", "fault"):
        if not row[part].get("equal"):
            found.append(f"{part}: {_said(row[part])}")
    found += _of_two_starts(row["embedded"])
    pinned = results.get(PINNED.name, {}).get("architectures", {})
    for name, cell in row["architectures"].items():
        found += _of_architecture(name, cell, pinned.get(name, {}))
    return found


def _of_two_starts(cell: Row) -> list[str]:
    if "raises" in cell:
        return [f"embedded model: {cell['raises']}"]
    first, second = cell["first"], cell["second"]
    found = []
    if not (first["equal"] and second["equal"]):
        found.append("embedded model: differs from eager")
    if first["eager_calls"] or second["eager_calls"]:
        found.append(f"embedded model: calls run eager, {first['fallback'] or second['fallback']}")
    if second["frames"] or not second["loaded"]:
        found.append(f"embedded model: the second start traces {second['frames']} frames")
    return found


def _of_architecture(name: str, cell: Row, pinned: Row) -> list[str]:
    if "raises" in cell:
        return [f"{name}: {cell['raises']}"]
    found = []
    if not cell["equal"]:
        found.append(f"{name}: differs from eager by {cell['error']:.1e}")
    if cell["eager_calls"]:
        found.append(f"{name}: {cell['eager_calls']} calls run eager, {cell['fallback']}")
    if pinned.get("graphs", cell["graphs"]) != cell["graphs"]:
        found.append(f"{name}: graphs {_counts(cell['graphs'])}, with the pin {_counts(pinned['graphs'])}")
    return found


def _counts(graphs: Mapping[str, int]) -> str:
    return ", ".join(f"{role} {count}" for role, count in graphs.items())


def _said(cell: Row) -> str:
    return str(cell.get("raises") or "differs from eager")


def _table(results: Mapping[str, Row]) -> Iterator[str]:
    yield "| Python | torch | Transformers | embedded model | architectures | writes seen by | holds |"
    yield "|---|---|---|---|---|---|---|"
    for pair in PAIRS:
        row = results.get(pair.name, {})
        wrong = problems(pair, results)
        holds = "**no**, see below" if wrong else "yes"
        if not row or NOT_RUN in row:
            yield f"| {pair.python} | {pair.torch} | {pair.transformers} | - | - | - | {NOT_RUN}, see below |"
            continue
        versions = f"| {row['python']} | {row['torch']} | {row['transformers']} "
        yield f"{versions}| {_embedded(row['embedded'])} | {_whole(row)} | {row['changes seen by']} | {holds} |"


def _embedded(cell: Row) -> str:
    if "raises" in cell:
        return "raises"
    first, second = cell["first"], cell["second"]
    return f"{first['graphs']} graph; then loaded, {second['frames']} frames"


def _whole(row: Row) -> str:
    cells: Sequence[Row] = list(row["architectures"].values())
    good = [c for c in cells if c.get("equal") and not c.get("eager_calls")]
    return f"{len(good)} of {len(cells)}"


def _reasons(results: Mapping[str, Row]) -> Iterator[str]:
    wrong = [(pair, problems(pair, results)) for pair in PAIRS]
    if any(said for _, said in wrong):
        yield "## What does not hold, and why\n"
    for pair, said in wrong:
        for one in said:
            yield f"- Python {pair.python}, torch {pair.torch}, Transformers {pair.transformers} ({pair.why}): {one}"
