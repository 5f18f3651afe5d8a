"""Reading a dump folder, which may come from somewhere else: nothing outside of it is opened."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compile_policy.errors import InputError
from compile_policy.graphs.folder import INDEX, SCHEMA
from compile_policy.graphs.runs import CALLS, EVENTS, PLAN, RUNS

_LARGEST = 512 * 1024 * 1024
#: What stands for the first of several files that an entry has.
ALIASES = {
    "kernels": ("output_code", "aot_kernels"),
    "lowered": ("post_grad_graph", "aot_inference_graph", "aot_forward_graph"),
    "wrapper": ("aot_wrapper", "output_code"),
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

    @property
    def packages(self) -> list[str]:
        """What stands before the kinds of lowered files of each graph that was lowered: nothing where it is one."""
        found = dict.fromkeys(kind.rpartition("/")[0] for kind in self.files if kind.startswith("package-"))
        return [f"{name}/" for name in sorted(found, key=lambda n: (len(n), n))] or [""]

    def has(self, kind: str) -> bool:
        """Whether `read` finds a file of this kind or alias."""
        return bool(self._names(kind))

    def _names(self, kind: str) -> list[str]:
        """The files that a kind means; an alias, in all packages."""
        if kind in self.files:
            return [self.files[kind]]
        package, _, alias = kind.rpartition("/")
        prefixes = [f"{package}/"] if package else self.packages
        kinds = (next((p + k for k in ALIASES.get(alias, (alias,)) if p + k in self.files), "") for p in prefixes)
        return [self.files[found] for found in kinds if found]

    def read(self, kind: str) -> str:
        """The text of one of the entry's files, by its kind or an alias.

        Raises:
            InputError: the entry has no such file.
        """
        names = self._names(kind)
        if not names:
            known = ", ".join(self.files) or "nothing"
            notes = "; ".join(map(str, self.record.get("notes", [])))
            raise InputError(f"{self.id} has no {kind}, it has {known}." + (f" Notes: {notes}." if notes else ""))
        texts = [_read(self.root, self.root / self.id / name) for name in names]
        if len(names) == 1:
            return texts[0]
        mark = "//" if names[0].endswith(".cpp") else "#"
        return "\n".join(f"{mark} {name}\n{text}" for name, text in zip(names, texts, strict=True))

    def ops(self) -> list[dict[str, Any]]:
        """The captured operations: name, op, dtype, shape, inputs, module, source."""
        return self._list("ops")

    def inputs(self) -> list[dict[str, Any]]:
        """The inputs of the captured graph: name, kind, is, dtype, shape; none in dumps that do not have them."""
        return self._list("inputs") if "inputs" in self.files else []

    def guards(self) -> list[dict[str, Any]]:
        """What Dynamo would have checked at every call."""
        if "guards" not in self.files:
            return []
        found = self._json("guards").get("guards", [])
        return [guard for guard in found if isinstance(guard, dict)]

    def sources(self) -> dict[str, dict[int, str]]:
        """File -> line -> text of the model, round the lines that operations are from."""
        found = self._json("sources") if "sources" in self.files else {}
        return {file: {int(n): str(text) for n, text in lines.items()} for file, lines in found.items()}

    def symbols(self) -> dict[str, dict[str, Any]]:
        """Symbol of a size -> its label and its size in the example."""
        found = self.record.get("symbols", {})
        return {name: known for name, known in found.items() if isinstance(known, dict)}

    def _list(self, kind: str) -> list[dict[str, Any]]:
        found = _parsed(self.read(kind), f"{self.id}/{self.files[kind]}")
        if not isinstance(found, list):
            raise InputError(f"{self.id}/{self.files[kind]} is no list.")
        return [row for row in found if isinstance(row, dict)]

    def _json(self, kind: str) -> dict[str, Any]:
        found = _parsed(self.read(kind), f"{self.id}/{self.files[kind]}")
        if not isinstance(found, dict):
            raise InputError(f"{self.id}/{self.files[kind]} is no object.")
        return found


@dataclass(frozen=True)
class Run:
    """One process that wrote entries: its plans, its events, its calls."""

    root: Path
    name: str

    def plans(self) -> list[dict[str, Any]]:
        """The plan of each model, as `Plan.to_dict` has it."""
        return self._lines(PLAN)

    def events(self) -> list[dict[str, Any]]:
        """Its events, in order."""
        return self._lines(EVENTS)

    def calls(self) -> list[dict[str, Any]]:
        """The calls of its entries: entry, component, time of the end, seconds."""
        return self._lines(CALLS)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.root / RUNS / self.name / name
        return json_lines(_read(self.root, path)) if path.is_file() else []


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

    def runs(self) -> list[Run]:
        """The runs that wrote here, oldest first."""
        folder = self.root / RUNS
        return [Run(self.root, path.name) for path in sorted(folder.iterdir())] if folder.is_dir() else []

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


def json_lines(text: str) -> list[dict[str, Any]]:
    """One object a line; what is none is left out, such as the half line of a process that was ended."""
    found = []
    for line in text.splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [row for row in found if isinstance(row, dict)]


def _read(root: Path, path: Path) -> str:
    if not path.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{path} is outside of the dump {root}.")
    return read_text(path)


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        InputError: it cannot be read, or is too large.
    """
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
