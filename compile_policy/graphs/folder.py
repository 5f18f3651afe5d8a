"""The folder of a dump: private files, names that stay inside, a size limit, and an index that is never half written.

Several processes may write into one folder: an entry belongs to whoever made its folder, and the index is built anew
from the entries that are complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compile_policy.graphs.text import clean, file_name

SCHEMA = 1
INDEX = "index.json"
RECORD = "entry.json"
_LOCK_SECONDS = 10.0


class EntryFolder:
    """The files of one entry; what would exceed the limit is left out and noted."""

    def __init__(self, path: Path, root: Path, room: int) -> None:
        self.path = path
        self.id = path.relative_to(root).as_posix()
        self.room = room
        self.bytes = 0
        self.files: dict[str, str] = {}
        self.notes: list[str] = []

    def write(self, kind: str, name: str, text: str) -> None:
        """Write one text under ``name``, which is a name of ours, and list it under ``kind``."""
        data = clean(text).encode("utf-8", "replace")
        if self.bytes + len(data) > self.room:
            self.notes.append(f"{name} is left out: its {len(data):,} bytes exceed the size limit of the dump")
            return
        target = self.path / name
        for parent in reversed(target.relative_to(self.path).parents[:-1]):
            (self.path / parent).mkdir(mode=0o700, exist_ok=True)
        _write_private(target, data)
        self.bytes += len(data)
        self.files[kind] = name

    def discard(self) -> None:
        """Remove what has been written, as far as that is possible."""
        shutil.rmtree(self.path, ignore_errors=True)


class DumpFolder:
    """A folder that dumps are written into."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root = root
        self.max_bytes = max_bytes

    def new_entry(self, component: str) -> EntryFolder:
        """A new folder for an entry of ``component``; its number is the first that is free.

        Raises:
            OSError: the folder cannot be made.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        parent = self.root / file_name(component)
        parent.mkdir(mode=0o700, exist_ok=True)
        if parent.is_symlink():
            raise OSError(f"{parent} is a link; a dump stays inside its folder")
        used = sum(record.get("bytes", 0) for record in self._records())
        number = 0
        while True:
            with suppress(FileExistsError):
                path = parent / f"entry-{number}"
                path.mkdir(mode=0o700)
                return EntryFolder(path, self.root, self.max_bytes - used)
            number += 1

    def publish(self, entry: EntryFolder, record: dict[str, Any]) -> None:
        """Complete an entry and list it in the index."""
        _write_private(entry.path / RECORD, _json(record))
        with ExitStack() as stack:
            # A file system without locks: the index may miss an entry for a moment, until the next one is written.
            with suppress(OSError, NotImplementedError, Timeout):
                stack.enter_context(FileLock(self.root / ".index.lock", timeout=_LOCK_SECONDS, mode=0o600))
            self._write_index()

    def _records(self) -> Iterator[dict[str, Any]]:
        """Complete entries, oldest first."""
        records = []
        for path in self.root.glob(f"*/*/{RECORD}"):
            with suppress(OSError, ValueError):
                record = json.loads(path.read_text("utf-8"))
                if isinstance(record, dict):
                    records.append(record)
        return iter(sorted(records, key=lambda record: (str(record.get("written")), str(record.get("id")))))

    def _write_index(self) -> None:
        records = list(self._records())
        notes = [f"{record.get('id')}: {note}" for record in records for note in record.get("notes", [])]
        index = {"schema": SCHEMA, "made_by": "compile-policy", "notes": notes, "entries": records}
        handle, name = tempfile.mkstemp(dir=self.root, prefix=".index-")  # mkstemp makes it 0600
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(_json(index))
            os.replace(name, self.root / INDEX)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise


def _json(value: Any) -> bytes:
    """Only ASCII, so that no control character of a name comes out as itself."""
    return (json.dumps(value, indent=1, default=str) + "\n").encode("ascii")


def _write_private(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
    with os.fdopen(handle, "wb") as stream:
        stream.write(data)
