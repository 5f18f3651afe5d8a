"""What lies where below the root of a store.

v1/<first two of digest>/<digest>/   one artifact: manifest.json, manifest.mac when signed, its files
tmp/<random>/                        being written; the writer holds a lock on the folder
locks/<digest>                       held while an artifact is made
quarantine/<digest>.<reason>.<...>/  damaged artifacts, for whoever wants to know; never loaded
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compile_policy.artifacts.disk import Disk, open_folder
from compile_policy.artifacts.manifest import Damaged, Manifest, Miss
from compile_policy.artifacts.reading import read_text

LAYOUT = "v1"
QUARANTINED = 16  # the newest are kept
_DIGEST = re.compile(r"[0-9a-f]{64}")
_YOUNG_SECONDS = 60.0  # a writer may be between making its folder and locking it
_SKEW_SECONDS = 300.0  # by which clocks of machines that share a directory may differ
_ABANDONED_SECONDS = 86_400.0  # where folders cannot be locked


@dataclass(frozen=True)
class StoredArtifact:
    """One artifact as it lies there. ``used`` is in seconds since the epoch; ``manifest`` is not verified."""

    digest: str
    path: Path
    size: int
    used: float
    signed: bool
    manifest: Manifest | Miss | None


class Folders:
    """Paths below a root, and the moves between them."""

    def __init__(self, root: Path, disk: Disk) -> None:
        self.root = root
        self.disk = disk
        self.temporary = root / "tmp"
        self.quarantined = root / "quarantine"

    def of(self, digest: str) -> Path:
        return self.root / LAYOUT / digest[:2] / digest

    def lock_of(self, digest: str) -> Path:
        return self.root / "locks" / digest

    def make(self, path: Path) -> None:
        """Make a folder below the root, those between, and the root."""
        if not path.is_dir():
            for folder in (*reversed(path.relative_to(self.root).parents), path.relative_to(self.root)):
                self.disk.make_folder(self.root / folder)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A locked folder for writing; what is still in it at the end goes."""
        folder = self.temporary / secrets.token_hex(8)
        self.make(folder)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
        finally:
            os.close(descriptor)
            if folder.exists():
                with contextlib.suppress(OSError):
                    self.disk.remove(folder)

    def publish(self, folder: Path, target: Path) -> bool:
        """Rename a written folder to its place; False when something is there already."""
        self.make(target.parent)
        try:
            self.disk.rename(folder, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                return False
            raise
        self.disk.sync_folder(target.parent)
        return True

    def replace(self, folder: Path, target: Path) -> None:
        """Put a written folder in the place of one that is there, in one step where the system can.

        Where it cannot, ``target`` is missing for a moment: readers look again under the lock of its key. Afterwards
        the old one is at ``folder``, or gone.
        """
        if self.disk.exchange(folder, target):
            return
        aside = self.temporary / secrets.token_hex(8)
        self.disk.rename(target, aside)
        self.disk.rename(folder, target)
        self.disk.remove(aside)

    def quarantine(self, path: Path, name: str) -> None:
        """Move something aside under another name, and let the oldest there go."""
        self.make(self.quarantined)
        with contextlib.suppress(FileNotFoundError):
            self.disk.rename(path, self.quarantined / name)
        aside = sorted(self.quarantined.iterdir(), key=_changed, reverse=True)
        for old in aside[QUARANTINED:]:
            self.disk.remove(old)

    def remove(self, path: Path) -> bool:
        """Remove a folder so that it is there whole until it is gone."""
        self.make(self.temporary)
        aside = self.temporary / secrets.token_hex(8)
        try:
            self.disk.rename(path, aside)
        except FileNotFoundError:
            return False
        self.disk.remove(aside)
        return True

    def sweep(self, *, older_than: float = _YOUNG_SECONDS) -> int:
        """Remove what writers that are gone left in ``tmp/``; returns how many folders."""
        gone = 0
        for path in _children(self.temporary):
            if _abandoned(path, older_than):
                self.disk.remove(path)
                gone += 1
        return gone

    def beside(self) -> int:
        """Bytes in what is being written, was left half written, or was set aside."""
        return sum(_bytes_below(folder) for folder in (self.temporary, self.quarantined))

    def empty_quarantine(self) -> int:
        """Remove what was set aside; returns how many folders."""
        aside = _children(self.quarantined)
        for path in aside:
            self.disk.remove(path)
        return len(aside)

    def artifacts(self, *, manifests: bool = True) -> list[StoredArtifact]:
        """All artifacts; manifests are read on request, and are not verified."""
        shards = (shard for shard in _children(self.root / LAYOUT) if len(shard.name) == 2)
        found = (path for shard in shards for path in _children(shard) if _DIGEST.fullmatch(path.name))
        return [entry for path in found if (entry := _look(path, manifests)) is not None]


def _children(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _bytes_below(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # gone meanwhile
                total += os.lstat(os.path.join(path, name)).st_size
    return total


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_ctime
    except OSError:
        return 0.0


def _look(path: Path, manifests: bool) -> StoredArtifact | None:
    try:
        used = _used(path.lstat())
        sizes = {name.name: name.lstat().st_size for name in path.iterdir()}
    except OSError:  # gone meanwhile, or no folder
        return None
    manifest = _manifest(path) if manifests else None
    return StoredArtifact(path.name, path, sum(sizes.values()), used, "manifest.mac" in sizes, manifest)


def _used(status: os.stat_result) -> float:
    """When an artifact was used last. A time in the future is none: then it counts as used when it was made."""
    now = time.time()
    return status.st_mtime if status.st_mtime <= now + _SKEW_SECONDS else min(status.st_ctime, now)


def _manifest(path: Path) -> Manifest | Miss:
    try:
        folder = open_folder(path)
        try:
            return Manifest.decode(read_text(folder))
        finally:
            os.close(folder)
    except Damaged as damaged:
        return damaged.miss
    except OSError as error:
        return Miss("unreadable", f"the manifest cannot be read: {error.strerror or error}")


def _abandoned(path: Path, older_than: float) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    age = abs(time.time() - os.fstat(descriptor).st_ctime)  # the clock may have been set back
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return age > _ABANDONED_SECONDS
    finally:
        os.close(descriptor)
    return age >= older_than
