"""Command line of the hazard suite; see `table`."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from pathlib import Path

import torch

from . import table
from .case import ARCHITECTURES
from .drive import drive
from .judge import bites, verdict
from .ways import EAGER, OURS, WAYS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hazards", description=__doc__)
    parser.add_argument("--write", action="store_true", help="run the matrix and write the table")
    parser.add_argument("--check", action="store_true", help="run the matrix and compare with the written table")
    parser.add_argument("--keep", type=Path, help="folder for the runs of ways that are not ours")
    parser.add_argument(
        "--rotate", metavar="NAMES", help="JSON list of hazards, each run in our way on one architecture"
    )
    parser.add_argument("--only", help="print the verdicts of hazards whose name contains this")
    parser.add_argument("--ways", default=",".join(w.name for w in table.COLUMNS), help="for --only")
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES), help="for --only")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.rotate:
        print(json.dumps(rotated(json.loads(asked.rotate))))
    elif asked.only is not None:
        show(asked.only, asked.ways.split(","), asked.architectures.split(","))
    else:
        made = table.lines(runs := table.run_all(keep=asked.keep))
        print("\n".join(table.reasons(runs)))
        if asked.write:
            table.write(made)
        if asked.check:
            differences = list(difflib.unified_diff(table.written(), made, "written", "made", lineterm="", n=0))
            print("\n".join(differences))
            return 1 if differences else 0
    return 0


def rotated(names: list[str]) -> dict[str, dict[str, object]]:
    """Hazards in our way, each on one architecture; neighbours on different ones."""
    out: dict[str, dict[str, object]] = {}
    for architecture in ARCHITECTURES:
        mine = [h for i, h in enumerate(table.HAZARDS) if h.name in names and _place(h, i) == architecture]
        eager, ours = drive(architecture, EAGER, mine), drive(architecture, OURS, mine)
        for h in mine:
            run = ours[h.name]
            found = verdict(run, eager[h.name], h.rounding)
            out[h.name] = {
                "architecture": architecture,
                "kind": found.kind,
                "how": found.how,
                "told": run.told,
                "graphs": run.graphs,
                "bites": bites(eager[h.name]),
                "first": eager[h.name].first.error,
            }
    return out


def _place(hazard: table.Hazard, index: int) -> str:
    places = hazard.only or ARCHITECTURES
    return places[index % len(places)]


def show(part: str, ways: list[str], architectures: list[str]) -> None:
    hazards = [h for h in table.HAZARDS if part in h.name]
    for architecture in architectures:
        eager = drive(architecture, EAGER, hazards)
        for way in ways:
            runs = drive(architecture, WAYS[way], hazards)
            for h in hazards:
                if h.name in runs:
                    found = verdict(runs[h.name], eager[h.name], h.rounding)
                    told = "; ".join(runs[h.name].told)
                    print(f"{h.name} | {architecture} | {way} | {found.kind} | {found.how} | {told}")


if __name__ == "__main__":
    sys.exit(main())
