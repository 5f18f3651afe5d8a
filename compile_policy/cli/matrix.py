"""``compile-policy matrix``: what the policy does with every architecture, measured now and not written by hand."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from compile_policy.cli.matrix_sheet import ARCHITECTURES, WORKLOADS, Sheet
from compile_policy.cli.session import Session
from compile_policy.cli.terminal import Terminal
from compile_policy.errors import InputError

Row = dict[str, Any]
_TYPES = "Multimodal or causal language models, by type, or workloads, by name; those of the page when left out."
Types = Annotated[list[str] | None, typer.Argument(metavar="[TYPES]...", help=_TYPES)]
Out = Annotated[Path | None, typer.Option("--out", help="Write the page here, such as docs/models.md.")]
Workloads = Annotated[bool, typer.Option("--workloads", help="Measure uses of a model instead of architectures.")]
Check = Annotated[Path | None, typer.Option("--check", help="Fail where this page differs from what is measured.")]
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="Rows measured at once.")]
Timeout = Annotated[float, typer.Option("--timeout", min=1, help="Seconds for one row.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Here = Annotated[bool, typer.Option("--here", hidden=True, help="Measure in this process.")]
Store = Annotated[Path | None, typer.Option("--store", hidden=True, help="Where workloads keep compiled code.")]


def matrix(
    context: typer.Context,
    types: Types = None,
    workloads: Workloads = False,
    out: Out = None,
    check: Check = None,
    jobs: Jobs = 2,
    timeout: Timeout = 300.0,
    as_json: AsJson = False,
    here: Here = False,
    store: Store = None,
) -> int:
    """Build architectures tiny, compile them under the policy, and say what holds: graphs, equality, reasons.

    With --workloads the rows are uses of a model instead: training, adapters, caches, decoding, threads, processes.

    Rows that are done are kept beside --out until all are, so that a run that was stopped goes on where it was.
    """
    session: Session = context.obj
    sheet = WORKLOADS if workloads else ARCHITECTURES
    wanted = _wanted(session, sheet, types)
    if check is not None and not check.is_file():  # said now, not after the measurement
        raise InputError(f"no page {check}.", remedy=f"Make it: compile-policy matrix --out {check}")
    if out is not None and not out.parent.is_dir():
        raise InputError(f"no folder {out.parent} for {out.name}.", remedy="Make it first.")
    if here:
        measure = _module(session, sheet).measure
        options = {"store": store} if store is not None else {}
        rows = [measure(name, **options).to_dict() for name in wanted]
    else:
        kept = _Kept(sheet, out)
        known = {name: row for name, row in kept.rows().items() if name in wanted}
        for row in _measured(session.terminal, sheet, [n for n in wanted if n not in known], jobs, timeout):
            kept.add(row)
            known[row[sheet.key]] = row
        rows = [known[name] for name in wanted]
    if out is not None:
        out.write_text(sheet.page(rows, versions()), encoding="utf-8")
        kept.done()
    if as_json:
        print(json.dumps({"versions": versions(), "rows": rows}))
    elif check is None:
        session.terminal.out.print(sheet.table(rows))
    return 0 if check is None else _checked(session.terminal, sheet, check, rows, whole=not types)


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}


def _module(session: Session, sheet: Sheet) -> Any:
    return importlib.import_module(f"{session.backend().__name__}.{sheet.module}")


def _wanted(session: Session, sheet: Sheet, types: list[str] | None) -> list[str]:
    """Those of the table; by name any that can be built."""
    module = _module(session, sheet)
    if sheet is WORKLOADS:
        return _wanted_workloads(module.names(), types)
    if not types:
        return list(module.matrix_types())
    known = module.known_model_types()
    for name in types:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.5))
            remedy = (
                f"Did you mean {near}?"
                if near
                else "Names are types of multimodal and causal language models, such as qwen2_5_vl."
            )
            raise InputError(f"No architecture {name!r}.", remedy=remedy)
    return sorted(set(types))


def _wanted_workloads(known: list[str], names: list[str] | None) -> list[str]:
    """All of them, or those that are named, in the order of the table."""
    for name in names or ():
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.5)) or "one of docs/workloads.md"
            raise InputError(f"No workload {name!r}.", remedy=f"Did you mean {near}?")
    return [name for name in known if not names or name in names]


def _measured(terminal: Terminal, sheet: Sheet, types: Sequence[str], jobs: int, timeout: float) -> Iterator[Row]:
    """A process for each row: one that crashes, or never ends, costs its own row only."""
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    clock = Progress(*columns, TimeElapsedColumn(), console=terminal.err, disable=not terminal.animated)
    with TemporaryDirectory() as store, ThreadPoolExecutor(jobs) as pool, clock:
        task = clock.add_task("", total=len(types))
        try:
            for future in as_completed([pool.submit(_measure_apart, sheet, name, timeout, store) for name in types]):
                row = future.result()
                clock.update(task, advance=1, description=row[sheet.key])
                if not terminal.animated:
                    terminal.note(f"measured {row[sheet.key]}")
                yield row
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _measure_apart(sheet: Sheet, name: str, timeout: float, store: str) -> Row:
    command = [sys.executable, "-m", "compile_policy.cli", "matrix", *sheet.flags, "--here", "--json"]
    command += ["--store", store] if sheet is WORKLOADS else []
    command += ["--", name]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return sheet.failed(name, f"took longer than {timeout:.0f} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return sheet.failed(name, f"the measurement failed: {last[:300]}")
    row: Row = json.loads(done.stdout.strip().splitlines()[-1])["rows"][0]
    return row


class _Kept:
    """Rows of a run that is not done yet, one JSON object a line; those of other versions do not count."""

    def __init__(self, sheet: Sheet, out: Path | None) -> None:
        self.sheet = sheet
        self.path = None if out is None else out.with_name(f".{out.name}.rows")

    def rows(self) -> dict[str, Row]:
        if self.path is None or not self.path.exists():
            return {}
        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        return {line["row"][self.sheet.key]: line["row"] for line in lines if line["versions"] == versions()}

    def add(self, row: Row) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"versions": versions(), "row": row}) + "\n")

    def done(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _checked(terminal: Terminal, sheet: Sheet, path: Path, rows: Sequence[Row], whole: bool) -> int:
    """Compare the rows with what a page says about the same ones; 1 when a line is no longer true.

    With all rows (``whole``) the rest of the page counts too: versions, totals, rows that are gone.
    """
    text = path.read_text(encoding="utf-8")
    stale = 0
    for row in rows:
        stated, measured = sheet.lines_about(row[sheet.key], text), sheet.row_lines(row)
        for line in [line for line in stated if line not in measured]:
            terminal.note(f"{path} says   {line}", style="red")
        for line in [line for line in measured if line not in stated]:
            terminal.note(f"measured is {line}", style="red")
        stale += stated != measured
    if whole and not stale and text != sheet.page(rows, versions()):
        terminal.note(f"{path} has other versions, totals or {sheet.noun} than were measured", style="red")
        return 1
    if stale:
        terminal.note(f"{path} is not true for {stale} of {len(rows)} {sheet.noun}", style="red")
    else:
        terminal.note(f"{path} is true for {len(rows)} {sheet.noun}", style="green")
    return 1 if stale else 0
