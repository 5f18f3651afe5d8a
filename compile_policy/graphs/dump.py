"""`GraphDump`: writes every compiled entry into a folder that people can open and read.

A dump watches and never takes part: whatever goes wrong with it is one event, and the run goes on.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compile_policy.entry import Entry
from compile_policy.events import emit
from compile_policy.graphs.bytecode import decompile, disassemble
from compile_policy.graphs.calls import CallLog
from compile_policy.graphs.captured import captured_text
from compile_policy.graphs.folder import DumpFolder, EntryFolder
from compile_policy.graphs.inputs import input_names, input_rows, symbols_of
from compile_policy.graphs.packages import texts_of
from compile_policy.graphs.record import conditions_text, entry_record
from compile_policy.graphs.recording import Recording, record
from compile_policy.graphs.runs import log_events, run_name
from compile_policy.graphs.source import Op, ops_of, surroundings
from compile_policy.graphs.values import values_of
from compile_policy.region import Region

MAX_BYTES = 256 * 1024 * 1024


class GraphDump:
    """Dumps compiled entries into ``directory``; give it to a region as ``RegionOptions.dump``.

    Args:
        directory: made when missing, for its owner alone. May be shared by components and processes.
        max_bytes: the most that all entries in ``directory`` may take; what is beyond is left out and noted.
        depyf_seconds: how long decompiling one entry's bytecode may take.
        origins: note which operations went into which kernel. Inductor keeps results with and without origins apart,
            so what a cache holds from runs without a dump is lowered once more.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_bytes: int = MAX_BYTES,
        depyf_seconds: float = 20.0,
        origins: bool = True,
    ) -> None:
        self.directory = Path(directory)
        self.depyf_seconds = depyf_seconds
        self.origins = origins
        self._folder = DumpFolder(self.directory, max_bytes)
        self._max_bytes = max_bytes
        self._recorded = threading.local()
        self._failures: set[str] = set()
        self._calls = CallLog(self.directory)
        log_events(self.directory, self)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Round a compile: see what only that moment shows, for the call of the dump that follows in this thread."""
        with record(self._max_bytes, self.origins, lambda error: self._failed("recording", error)) as recording:
            self._recorded.last = recording
            yield

    def __call__(self, region: Region, entry: Entry) -> None:
        """Write one entry. Never raises."""
        recording = getattr(self._recorded, "last", None) or Recording()
        self._recorded.last = None
        try:
            self._write(region, entry, recording)
        except Exception as error:
            self._failed(region.name, error)

    def _failed(self, component: str, error: Exception) -> None:
        """Say it once; a full disk would say it for every entry."""
        message = f"{type(error).__name__}: {error}"
        if type(error).__name__ not in self._failures:
            self._failures.add(type(error).__name__)
            emit("skipped", component, f"no dump in {self.directory}: {message}", error=message)

    def _write(self, region: Region, entry: Entry, recording: Recording) -> None:
        folder = self._folder.new_entry(region.name)
        try:
            values = values_of(entry.graph.readable)
            ops = ops_of(entry.graph.sources, values)
            names = input_names(region, entry)
            rows = input_rows(names, entry, values)
            symbols = symbols_of(rows, entry, recording.example)
            details = {**entry_record(region, entry, recording.example, ops), "symbols": symbols}
            self._write_captured(folder, region, entry, ops, names, symbols)
            folder.write("ops", "ops.json", _rows(op.to_dict() for op in ops))
            folder.write("inputs", "inputs.json", _rows(rows))
            folder.write("sources", "sources.json", json.dumps(surroundings(entry.graph.sources), indent=1))
            folder.write("conditions", "conditions.txt", conditions_text(entry))
            folder.write("guards", "guards.json", _guards(entry))
            if not recording.packages:
                recording.packages = texts_of(entry.graph.program, self._max_bytes)
            self._write_lowered(folder, recording)
            self._write_bytecode(folder, recording)
            self._folder.publish(folder, self._described(folder, details))
            self._calls.watch(entry, folder.id, region.name)
        except BaseException:
            folder.discard()
            raise

    def _write_captured(
        self,
        folder: EntryFolder,
        region: Region,
        entry: Entry,
        ops: list[Op],
        names: list[str],
        symbols: dict[str, dict[str, Any]],
    ) -> None:
        title = (
            f"{region.name} ({type(region.module).__name__}), {folder.id.rpartition('/')[2]}: "
            f"{len(ops)} operations, compiled in {entry.seconds:.1f} s with {region.options.backend}",
            "The graph as it was captured, before anything was optimised; beside each operation the line it is from.",
        )
        labels = {symbol: str(known["label"]) for symbol, known in symbols.items() if known["label"]}
        folder.write("captured", "captured.py", captured_text(title, entry.graph.readable, names, ops, labels))

    def _write_lowered(self, folder: EntryFolder, recording: Recording) -> None:
        for name, lowered in recording.lowered().items():
            folder.write(name.rpartition(".")[0], f"lowered/{name}", lowered)
        folder.notes += recording.notes

    def _write_bytecode(self, folder: EntryFolder, recording: Recording) -> None:
        if not recording.bytecode:
            said = "the compile was not recorded, or the entry came ready from a store"
            folder.notes.append(f"bytecode and lowered graphs were not seen: {said}")
            return
        code = recording.bytecode[-1]  # the last one is what runs, an earlier one was tried and given up
        try:
            folder.write("bytecode", "bytecode.py", decompile(code, self.depyf_seconds))
        except RuntimeError as why:
            folder.notes.append(f"bytecode is not decompiled: {why}")
            folder.write("bytecode", "bytecode.txt", disassemble(code))

    def _described(self, folder: EntryFolder, details: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": folder.id,
            "run": run_name(),
            "written": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds"),
            **details,
            "files": folder.files,
            "bytes": folder.bytes,
            "notes": folder.notes,
        }


def _rows(rows: Iterable[dict[str, Any]]) -> str:
    """A list with one row a line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def _guards(entry: Entry) -> str:
    guards = entry.graph.guards
    counts = Counter(guard.kind for guard in guards).most_common()
    rows = _rows(asdict(guard) for guard in guards)
    return f'{{"counts": {json.dumps(dict(counts))},\n"guards": {rows.rstrip()}}}\n'
