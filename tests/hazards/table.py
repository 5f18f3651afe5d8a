"""The table of hazards in ``docs/safety.md``: made, written, and checked.

``python -m hazards --write`` (with ``tests`` on the path, or ``make safety-table``) runs the matrix and writes between
the markers; ``--check`` runs it and fails where the written table says otherwise. ``--keep FOLDER`` keeps the runs of
the ways that are not ours, and takes them up again as long as nothing that they depend on has changed.
"""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import transformers

from . import (
    adapters,
    arguments,
    attributes,
    caches,
    generation,
    hooks,
    mid_sequence,
    modes,
    parameters,
    patches,
    registries,
    sizes,
    threads,
)
from .case import ARCHITECTURES, Hazard
from .drive import Run, drive
from .judge import Verdict, bites, verdict
from .ways import DROPPED, EAGER, OURS, STOCK, WAYS, Way

BEGIN, END = "<!-- hazards:begin -->", "<!-- hazards:end -->"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "safety.md"
KINDS = {
    "Arguments": arguments,
    "Sizes": sizes,
    "Caches": caches,
    "Hooks": hooks,
    "Attributes and configuration": attributes,
    "Classes, functions, globals": patches,
    "Weights and buffers": parameters,
    "Adapters": adapters,
    "Modes": modes,
    "Registries": registries,
    "Threads and processes": threads,
    "Generation": generation,
    "Between two tokens": mid_sequence,
}
NOTES = {
    "Between two tokens": """\
Ours with `check_structure="call"`. By default the structure is looked at as a whole where a sequence starts: of these
changes a decode step then sees those of hooks, parameters, sub-modules and modes, and the others count from the next
sequence on.""",
}
HAZARDS: list[Hazard] = [h for module in KINDS.values() for h in module.HAZARDS]
COLUMNS: tuple[Way, ...] = (STOCK, DROPPED, OURS)
Runs = dict[tuple[str, str], dict[str, Run]]  # by architecture and way, then by hazard


def run_all(hazards: Sequence[Hazard] = HAZARDS, ways: Iterable[Way] = COLUMNS, keep: Path | None = None) -> Runs:
    """Run hazards eager and in ``ways`` on every architecture."""
    return {
        (architecture, way.name): _kept(architecture, way, hazards, keep)
        for architecture in ARCHITECTURES
        for way in (EAGER, *ways)
    }


def _kept(architecture: str, way: Way, hazards: Sequence[Hazard], keep: Path | None) -> dict[str, Run]:
    """`drive` per kind of hazard, read from ``keep`` where it was done before."""
    found: dict[str, Run] = {}
    for kind, module in KINDS.items():
        mine = [h for h in module.HAZARDS if h in hazards]
        if keep is None or way is OURS or len(mine) < len(module.HAZARDS):
            found |= drive(architecture, way, mine)
            continue
        file = keep / f"{architecture}-{way.name}-{kind.split()[0]}-{_digest(Path(str(module.__file__)))}.pickle"
        if not file.exists():
            keep.mkdir(parents=True, exist_ok=True)
            file.write_bytes(pickle.dumps(drive(architecture, way, mine)))
        found |= pickle.loads(file.read_bytes())
    return found


def _digest(definitions: Path) -> str:
    """Of what a way that is not ours depends on."""
    here = definitions.parent
    files = [definitions, here / "case.py", here / "drive.py", here / "ways.py"]
    said = f"{torch.__version__} {transformers.__version__}".encode()
    return hashlib.sha256(said + b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


def verdicts(hazard: Hazard, way: Way, runs: Runs) -> dict[str, Verdict]:
    """What became of a hazard in one way, by architecture."""
    places = [a for a in ARCHITECTURES if hazard.name in runs[a, EAGER.name]]
    return {
        a: verdict(runs[a, way.name][hazard.name], runs[a, EAGER.name][hazard.name], hazard.rounding) for a in places
    }


def biting(hazard: Hazard, runs: Runs) -> list[str]:
    """Architectures on which the change changes eager's result."""
    return [a for a in ARCHITECTURES if hazard.name in runs[a, EAGER.name] and bites(runs[a, EAGER.name][hazard.name])]


def lines(runs: Runs) -> list[str]:
    """The generated part of the page."""
    out = [*_summary(runs), ""]
    for kind, module in KINDS.items():
        notes = [NOTES[kind], ""] if kind in NOTES else []
        out += [
            f"### {kind}",
            "",
            *notes,
            "| hazard | " + " | ".join(way.title for way in COLUMNS) + " |",
            "|---|---|---|---|",
        ]
        out += [_row(hazard, runs) for hazard in module.HAZARDS]
        out.append("")
    return out


def _summary(runs: Runs) -> list[str]:
    models = f"{', '.join(f'`{a}`' for a in ARCHITECTURES)}"
    out = [
        f"{len(HAZARDS)} hazards on {models} (torch {torch.__version__.split('+')[0]}, Transformers "
        f"{transformers.__version__}, CPU; graphs run as captured). Counts are architectures.",
        "",
        "| | " + " | ".join(way.title for way in COLUMNS) + " |",
        "|---|---|---|---|",
    ]
    counts = {way: Counter(v.kind for h in HAZARDS for v in verdicts(h, way, runs).values()) for way in COLUMNS}
    for kind, title in (
        ("ok", "equal to eager"),
        ("raises", "raises where eager does not"),
        ("wrong", "silently wrong"),
    ):
        out.append(f"| {title} | " + " | ".join(str(counts[way][kind]) for way in COLUMNS) + " |")
    return out


def _row(hazard: Hazard, runs: Runs) -> str:
    found = len(verdicts(hazard, OURS, runs))
    bite = len(biting(hazard, runs))
    control = f"*nothing can go wrong: {hazard.harmless}*" if not bite else f"control {bite}/{found}"
    cells = [_cell(verdicts(hazard, way, runs), ours=way is OURS) for way in COLUMNS]
    return f"| **{hazard.name}**: {hazard.says} ({control}) | " + " | ".join(cells) + " |"


def _cell(found: dict[str, Verdict], *, ours: bool) -> str:
    """``ok 2/3 (new graph), **wrong 1/3**``."""
    parts = []
    for kind, title in (("ok", "ok"), ("raises", "raises"), ("wrong", "**silently wrong**")):
        some = [v for v in found.values() if v.kind == kind]
        if some:
            hows = ", ".join(dict.fromkeys(_how(v, ours=ours) for v in some))
            parts.append(f"{title} {len(some)}/{len(found)}{f' ({hows})' if hows else ''}")
    return "; ".join(parts).replace("|", "\\|")


def _how(v: Verdict, *, ours: bool) -> str:
    """In a few words that are the same on every run."""
    if v.kind == "ok":
        if v.how.startswith("raises"):
            return "the same error"
        return v.how.split(":")[0] if ours else ""
    said = v.how.split(":")[0] if v.kind == "raises" else ("eager raises" if v.how.startswith("eager") else "")
    before = "also without the change" if v.before else ""
    return ", ".join(filter(None, (said, before)))


def reasons(runs: Runs) -> list[str]:
    """Why ours ran eager, and what its events said, for people who look closer."""
    out = []
    for hazard in HAZARDS:
        for a in ARCHITECTURES:
            run = runs[a, OURS.name].get(hazard.name)
            if run is not None:
                out += [f"{hazard.name} [{a}] eager: {run.reason}"] if run.reason else []
                out += [f"{hazard.name} [{a}] told: {told}" for told in run.told]
    return out


def written() -> list[str]:
    """The generated part as it stands on the page."""
    text = PAGE.read_text()
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip().splitlines()


def write(made: Sequence[str]) -> None:
    """Put the generated part between the markers; a page without them gets them at its end."""
    text = PAGE.read_text() if PAGE.exists() else "# Safety\n"
    if BEGIN not in text:
        text += f"\n## Hazards\n\n{BEGIN}\n{END}\n"
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(made).strip() + f"\n{after}")


__all__ = ["HAZARDS", "WAYS", "biting", "lines", "reasons", "run_all", "verdicts", "write", "written"]
