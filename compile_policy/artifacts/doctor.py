"""What is wrong with a cache, and what to do about it. Looks, and changes nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from compile_policy.artifacts.folders import LAYOUT, StoredArtifact
from compile_policy.artifacts.manifest import MANIFEST, SIGNATURE, Miss, is_digest, name_on_disk
from compile_policy.artifacts.places import check_folder
from compile_policy.artifacts.store import Store

_TIDY = "compile-policy cache gc"
_TOP = {LAYOUT, "tmp", "locks", "quarantine"}


@dataclass(frozen=True)
class Finding:
    """One thing that was noticed.

    Attributes:
        kind: a ``problem`` should be repaired; a ``note`` is good to know.
        what: one sentence.
        remedy: a command or a sentence.
        digest: of the artifact that it is about, or nothing.
    """

    kind: Literal["problem", "note"]
    what: str
    remedy: str
    digest: str = ""


@dataclass(frozen=True)
class Examination:
    """All findings, and how many artifacts verified."""

    findings: tuple[Finding, ...]
    good: int
    damaged: int
    size: int

    @property
    def healthy(self) -> bool:
        return all(finding.kind != "problem" for finding in self.findings)


def examine(store: Store, uid: int, *, shared: bool = False) -> Examination:
    """Verify every artifact, and look at everything else below the root.

    Args:
        uid: whose cache it should be.
        shared: it is open to others on purpose, and signed with a key file; then permissions are nobody's concern.

    Raises:
        OSError: the directory cannot be read.
    """
    findings: list[Finding] = []
    if not shared:
        findings += _place(store.root, uid)
    stored = store.folders.artifacts(manifests=False)
    damaged = 0
    for entry in stored:
        found = list(_artifact(store, entry))
        damaged += any(finding.kind == "problem" for finding in found)
        findings += found
    findings += _strays(store.root)
    findings += _leftovers(store)
    size = sum(entry.size for entry in stored)
    if size > store.limit_bytes:
        findings.append(Finding("note", "the artifacts are larger than the limit", _TIDY))
    return Examination(tuple(findings), len(stored) - damaged, damaged, size)


def _place(root: Path, uid: int) -> Iterator[Finding]:
    unsafe = check_folder(root, uid)
    if unsafe is not None:
        yield Finding("problem", unsafe.problem, unsafe.remedy)
    open_to_others = [path for path in _walk(root) if _is_open(path)]
    if open_to_others:
        first, count = open_to_others[0], len(open_to_others)
        what = f"{first} can be written by others" + (f", and so can {count - 1} more" if count > 1 else "")
        yield Finding("problem", what, f"chmod -R go-w {root}")


def _walk(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        yield from (Path(path) / name for name in (*folders, *files))


def _is_open(path: Path) -> bool:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    return not stat.S_ISLNK(mode) and bool(mode & 0o022)


def _artifact(store: Store, entry: StoredArtifact) -> Iterator[Finding]:
    found = store.check(entry.digest)
    if isinstance(found, Miss):
        remedy = f"{_TIDY}; it will be made again."
        if found.reason == "mac":
            remedy = "Give the key that it was signed with, or let the next run replace it."
        elif found.reason == "unreadable":
            remedy = f"Look at the permissions and links in {entry.path}."
        yield Finding("problem", f"{entry.digest[:12]}: {found.detail}", remedy, entry.digest)
        return
    named = {MANIFEST, SIGNATURE, *map(name_on_disk, found[0].files)}
    extra = sorted(path.name for path in entry.path.iterdir() if path.name not in named)
    if extra:
        what = f"{entry.digest[:12]} holds {', '.join(extra)}, which it does not name; never loaded"
        yield Finding("note", what, "Remove what you did not put there.", entry.digest)


def _strays(root: Path) -> Iterator[Finding]:
    """Names that no store has made."""
    layout = root / LAYOUT
    strays = [path for path in root.iterdir() if path.name not in _TOP]
    for shard in layout.iterdir() if layout.is_dir() else ():
        inside = list(shard.iterdir()) if shard.is_dir() and not shard.is_symlink() else []
        good = [path for path in inside if is_digest(path.name) and path.name.startswith(shard.name) and path.is_dir()]
        strays += [shard] if not inside and not shard.is_dir() else [path for path in inside if path not in good]
    for path in strays:
        yield Finding("note", f"{path} is not of the cache; never loaded", "Remove it if you did not put it there.")


def _leftovers(store: Store) -> Iterator[Finding]:
    quarantined, temporary = count(store.folders.quarantined), count(store.folders.temporary)
    if quarantined:
        what = f"{quarantined} artifacts were set aside in {store.folders.quarantined}; never loaded"
        yield Finding("note", what, f"Look at them, then {_TIDY}")
    if temporary:
        yield Finding("note", f"{temporary} artifacts are being written, or were left half written", _TIDY)


def count(folder: Path) -> int:
    """Number of names in a folder that may not be there."""
    return len(list(folder.iterdir())) if folder.is_dir() else 0
