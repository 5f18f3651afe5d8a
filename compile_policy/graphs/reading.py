"""Reading a dump folder, which may come from somewhere else: nothing outside of it is opened."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compile_policy.errors import InputError
from compile_policy.graphs.folder import INDEX, SCHEMA

_LARGEST = 512 * 1024 * 1024
#: What stands for the first of several files that an entry has.
ALIASES = {
    "kernels": ("output_code", "aot_kernels"),
    "lowered": ("post_grad_graph", "aot_inference_graph", "aot_forward_graph"),
}


@dataclass(frozen=True)
class DumpedEntry:
    """One entry of a dump.

    Attributes:
        root: the dump's folder.
        record: what the index says about the entry.
    """

    root: Path
    record: dict[str, Any]

    @property
    def id(self) -> str:
        return str(self.record["id"])

    @property
    def component(self) -> str:
        """Role and path, as a region is called."""
        component = self.record.get("component", {})
        return f"{component.get('role', '')} {component.get('qualname', '')}".strip()

    @property
    def files(self) -> dict[str, str]:
        return {str(kind): str(name) for kind, name in self.record.get("files", {}).items()}

    def read(self, kind: str) -> str:
        """The text of one of the entry's files, by its kind or an alias.

        Raises:
            InputError: the entry has no such file.
        """
        name = next((self.files[k] for k in (kind, *ALIASES.get(kind, ())) if k in self.files), None)
        if name is None:
            known = ", ".join(self.files) or "nothing"
            notes = "; ".join(map(str, self.record.get("notes", [])))
            raise InputError(f"{self.id} has no {kind}, it has {known}." + (f" Notes: {notes}." if notes else ""))
        return _read(self.root, self.root / self.id / name)

    def ops(self) -> list[dict[str, Any]]:
        """The captured operations: name, op, shape, module, source."""
        found = _parsed(self.read("ops"), f"{self.id}/{self.files['ops']}")
        if not isinstance(found, list):
            raise InputError(f"{self.id}/{self.files['ops']} is no list of operations.")
        return [op for op in found if isinstance(op, dict)]


@dataclass(frozen=True)
class Dump:
    """A dump folder's entries, oldest first."""

    root: Path
    entries: tuple[DumpedEntry, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, root: Path) -> Dump:
        """Read the index.

        Raises:
            InputError: there is none, or it is not one of ours.
        """
        if not root.is_dir():
            raise InputError(f"no folder {root}.", remedy="Write a dump with `compile-policy generate --dump-graphs`.")
        if not (root / INDEX).is_file():
            remedy = "Write a dump with `compile-policy generate --dump-graphs`."
            raise InputError(f"{root} is no dump, it has no {INDEX}.", remedy=remedy)
        index = _parsed(_read(root, root / INDEX), INDEX)
        if not isinstance(index, dict) or index.get("schema") != SCHEMA or not isinstance(index.get("entries"), list):
            raise InputError(f"{root / INDEX} is no index of schema {SCHEMA}.")
        records = [r for r in index["entries"] if isinstance(r, dict) and isinstance(r.get("id"), str)]
        return cls(root, tuple(DumpedEntry(root, r) for r in records), tuple(map(str, index.get("notes", []))))

    @classmethod
    def locate(cls, path: Path) -> tuple[Dump, str]:
        """A dump and the rest of a path that goes on below it: ``DIR/COMPONENT/ENTRY``.

        Raises:
            InputError: no folder on the path is a dump.
        """
        rest: list[str] = []
        folder = path
        while not (folder / INDEX).is_file() and len(rest) < 2 and folder.name:
            rest.insert(0, folder.name)
            folder = folder.parent
        if not (folder / INDEX).is_file():
            return cls.open(path), ""  # raises, and names the path that was given
        return cls.open(folder), "/".join(rest)

    def entry(self, name: str = "") -> DumpedEntry:
        """By id, by component, or by the beginning of either; the newest where several fit in one component.

        Raises:
            InputError: none fits, or several components do.
        """
        wanted = name.strip("/")
        exact = [e for e in self.entries if wanted in (e.id, e.component)]
        found = exact or [e for e in self.entries if e.id.startswith(wanted) or e.component.startswith(wanted)]
        known = ", ".join(e.id for e in found or self.entries) or "none"
        if not found:
            raise InputError(f"no entry {name!r} in {self.root}.", remedy=f"There are: {known}")
        if len({e.id.rpartition("/")[0] for e in found}) > 1:
            raise InputError(
                f"{name!r} fits several entries.", remedy=f"Choose one of: {', '.join(e.id for e in found)}"
            )
        return found[-1]


def _read(root: Path, path: Path) -> str:
    if not path.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{path} is outside of the dump {root}.")
    try:
        if path.stat().st_size > _LARGEST:
            raise InputError(f"{path} is larger than {_LARGEST:,} bytes.")
        return path.read_text("utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{name} is no JSON: {error}.") from None
