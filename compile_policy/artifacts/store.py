"""The store of artifacts: load what is verified, save all or nothing, and no disk fault ends a run."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from compile_policy import events
from compile_policy.artifacts import locks
from compile_policy.artifacts.disk import Disk
from compile_policy.artifacts.folders import Folders, StoredArtifact
from compile_policy.artifacts.key import JSON, ArtifactKey, Difference, differences, plain, weight
from compile_policy.artifacts.manifest import (
    MANIFEST,
    MANIFEST_BYTES,
    SIGNATURE,
    Damaged,
    Manifest,
    Miss,
    name_on_disk,
)
from compile_policy.artifacts.reading import Artifact, read_artifact, sign
from compile_policy.caller import warn_user

LIMIT_BYTES = 10 << 30
LOCK_SECONDS = 600.0
_SETTLE_SECONDS = 1.0
#: A shorter wait is not worth a word; a longer one is said again after so many seconds.
_SAY_AFTER, _SAY_AGAIN = 0.5, 30.0

_LOOKS = 3  # an artifact that is removed or replaced while it is read looks like one with a missing file

# What is wrong with the artifact itself; the other reasons may be about us (another secret, no permission).
DAMAGED = ("manifest", "missing", "size", "hash", "key")


class Store:
    """Artifacts below ``root``, which `open_store` has checked. Thread-safe, and safe between processes.

    Args:
        root: an absolute directory; see `compile_policy.artifacts.folders` for what is in it.
        secret: signs what is saved; then only what is signed with it is loaded. Without one, only what isn't signed.
        limit_bytes: beyond this the least recently used artifacts go; those that this store has loaded or saved stay.
        disk: the seam through which tests make a disk fail.
    """

    def __init__(
        self, root: Path, *, secret: bytes | None = None, limit_bytes: int = LIMIT_BYTES, disk: Disk | None = None
    ) -> None:
        self.root = root
        self.limit_bytes = limit_bytes
        self.secret = secret
        self.folders = Folders(root, disk or Disk())
        self._disk = self.folders.disk
        self._in_use: set[str] = set()
        self._warned = False
        self._mutex = threading.Lock()

    # -- reading ------------------------------------------------------------------------------------------------------

    def load(self, key: ArtifactKey) -> Artifact | Miss:
        """The verified artifact of a key, or why there is none. A damaged one is moved to ``quarantine/``.

        Never raises for what is in the cache. The bytes that are returned are those that were verified.
        """
        found = self.check(key.digest)
        if isinstance(found, Miss):
            if found.reason in DAMAGED:
                events.emit("skipped", "", f"a stored artifact is not used, {found.detail}; it will be made again")
                if isinstance(self.check(key.digest), Miss):  # nobody has put a good one there meanwhile
                    self._set_aside(key.digest, found.reason)
            return found
        self._in_use.add(key.digest)
        with contextlib.suppress(OSError):  # a directory that we may only read
            self._disk.touch(self.folders.of(key.digest))
        return found[1]

    def load_settled(self, key: ArtifactKey) -> Artifact | Miss:
        """As `load`, for an artifact that others may be replacing: one that is absent is looked for again under its
        lock, since not every file system can replace a folder in one step."""
        found = self.load(key)
        if isinstance(found, Artifact) or found.reason != "absent":
            return found
        lock = self._acquire(key.digest, _SETTLE_SECONDS)
        if lock is None:
            return found
        try:
            return self.load(key)
        finally:
            lock.release()

    def check(self, digest: str) -> tuple[Manifest, Artifact] | Miss:
        """Read and verify one artifact, changing nothing."""
        for _ in range(_LOOKS):
            try:
                return read_artifact(self.folders.of(digest), digest, self.secret)
            except Damaged as damaged:
                miss = damaged.miss
            except FileNotFoundError:
                return Miss("absent", "there is no artifact of this key")
            except OSError as error:
                return Miss("unreadable", f"the artifact cannot be read: {error.strerror or error}")
            except MemoryError:
                return Miss("unreadable", "the artifact does not fit into memory")
            if miss.reason != "missing":
                break
        return miss

    def why_miss(self, factors: Mapping[str, JSON], *, others: bool = False) -> list[Difference]:
        """(factor, stored value, wanted value) against the stored artifact that differs least from ``factors``.

        Empty when there is one that fits, or none at all. Factors with mappings inside are named by a dotted path.

        Args:
            others: leave out the one that fits: what tells a stored artifact from its nearest neighbour?
        """
        wanted = plain(factors)
        assert isinstance(wanted, dict)
        own = ArtifactKey(wanted).digest if others else ""
        candidates = [
            (differences(entry.manifest.key.factors, wanted), -entry.used)
            for entry in self.folders.artifacts()
            if isinstance(entry.manifest, Manifest) and entry.digest != own
        ]
        ranked = [(sum(map(weight, found)), unused, found) for found, unused in candidates]
        return min(ranked, key=lambda candidate: candidate[:2], default=(0, 0.0, []))[2]

    # -- writing ------------------------------------------------------------------------------------------------------

    def save(
        self, key: ArtifactKey, files: Mapping[str, bytes], meta: Mapping[str, JSON], *, replace: bool = False
    ) -> bool:
        """Keep an artifact: afterwards it is there whole, or not at all. One that is there already and good stays.

        Args:
            files: name -> content; a name may have folders in it (``blocks/0.pt2``).
            meta: whatever the caller wants back beside the files.
            replace: put it in the place of a good one too. Readers find the old one or the new one, never none; who
                reads first and then replaces holds the key's `lock`.

        Returns:
            Whether it is kept. When it isn't, a `PolicyWarning` (the first time) and an event have said why.

        Raises:
            ValueError: a name leads out of the artifact.
            TypeError: ``meta`` is no JSON.
        """
        manifest = Manifest.describe(key, files, meta)
        text = manifest.encode()
        if manifest.size + len(text) > self.limit_bytes or len(text) > MANIFEST_BYTES:
            self._skip(f"an artifact of {manifest.size} bytes is larger than the limit", "Raise the limit.")
            return False
        try:
            self._write(key.digest, files, text, replace)
        except OSError as error:
            self._skip(
                f"{self.root} cannot be written: {error.strerror or error}",
                "Free space, or choose another directory with cache_dir.",
            )
            return False
        self._in_use.add(key.digest)
        self.trim()
        return True

    def discard(self, key: ArtifactKey, reason: str) -> None:
        """Move an artifact aside that was verified and could still not be used, so that a new one takes its place.

        Args:
            reason: one word for the name of its folder in ``quarantine/``, such as ``load``.
        """
        self._in_use.discard(key.digest)
        self._set_aside(key.digest, reason)

    @contextlib.contextmanager
    def lock(self, key: ArtifactKey, timeout: float = LOCK_SECONDS, *, component: str = "") -> Iterator[bool]:
        """Hold the key for making its artifact; the block runs in any case.

        A wait is told as events: for whom, and since when.

        Args:
            component: what the artifact is of, for these events.

        Yields:
            True: nobody else makes it meanwhile (load again before making: someone may just have done so).
            False: somebody has held it for ``timeout`` seconds, or this directory knows no locks. Make it privately.

        The operating system lets go of a lock when its holder dies.
        """
        lock = self._acquire(key.digest, timeout, _Wait(component))
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    def _acquire(self, digest: str, timeout: float, wait: _Wait | None = None) -> locks.FileLock | None:
        path = self.folders.lock_of(digest)
        try:
            self.folders.make(path.parent)
            lock = locks.acquire(path, timeout, wait)
        except OSError:  # a read-only directory, or a file system without locks
            return None
        if lock is None and wait is not None:
            wait.given_up(timeout)
        return lock

    def trim(self, limit_bytes: int | None = None) -> list[StoredArtifact]:
        """Remove what writers that died left behind, and the least recently used artifacts beyond the limit.

        Returns:
            The artifacts that went. Those in use, by this store or by whoever holds their lock, stay.
        """
        limit = self.limit_bytes if limit_bytes is None else limit_bytes
        removed: list[StoredArtifact] = []
        try:
            self.folders.sweep()
            stored = self.folders.artifacts(manifests=False)
            total = sum(entry.size for entry in stored)
            total += self._beside(limit - total)
            for entry in sorted(stored, key=lambda entry: entry.used):
                if total <= limit:
                    break
                if entry.digest not in self._in_use and self.remove(entry.digest):
                    total -= entry.size
                    removed.append(entry)
        except OSError as error:
            self._skip(f"{self.root} cannot be tidied: {error.strerror or error}", "Run compile-policy cache doctor.")
        return removed

    def _beside(self, room: int) -> int:
        """Bytes of what is no artifact: it counts too, and what was set aside goes first where there is no ``room``."""
        beside = self.folders.beside()
        if beside > max(room, 0) and self.folders.empty_quarantine():
            beside = self.folders.beside()
        return beside

    def remove(self, digest: str) -> bool:
        """Remove one artifact, unless another process holds its lock.

        Raises:
            OSError: it cannot be removed.
        """
        lock = self._acquire(digest, 0)
        if lock is None:
            return False
        try:
            return self.folders.remove(self.folders.of(digest))
        finally:
            lock.release()

    def _write(self, digest: str, files: Mapping[str, bytes], text: bytes, replace: bool) -> None:
        with self.folders.staging() as folder:
            for name, data in files.items():
                self._disk.write(folder / name_on_disk(name), data)
            self._disk.write(folder / MANIFEST, text)
            if self.secret is not None:
                self._disk.write(folder / SIGNATURE, sign(self.secret, text, "artifact"))
            self._disk.sync_folder(folder)
            target = self.folders.of(digest)
            if self.folders.publish(folder, target):
                return
            if replace or isinstance(self.check(digest), Miss):
                self.folders.replace(folder, target)

    def _set_aside(self, digest: str, reason: str) -> None:
        with contextlib.suppress(OSError):  # a directory that we may only read; the artifact is refused every time
            self.folders.quarantine(self.folders.of(digest), f"{digest[:16]}.{reason}.{secrets.token_hex(4)}")

    def _skip(self, problem: str, remedy: str) -> None:
        """One event each time, one warning in all."""
        events.emit("skipped", "", f"compiled code is not kept on disk: {problem}")
        with self._mutex:
            first, self._warned = not self._warned, True
        if first:
            warn_user(f"compiled code is not kept on disk: {problem}. {remedy}")


class _Wait:
    """Tells, as events, that a process waits for the lock of another."""

    def __init__(self, component: str) -> None:
        self._component = component
        self._holder: locks.Holder | None = None
        self._said = 0.0

    def __call__(self, holder: locks.Holder, waited: float) -> None:
        """Say it once for each holder, and again after a while."""
        same = self._holder is not None and holder[:2] == self._holder[:2]
        if waited < _SAY_AFTER or (same and waited < self._said + _SAY_AGAIN):
            return
        self._holder, self._said = holder, waited
        clock = time.strftime("%H:%M:%S", time.localtime(holder.since))
        busy = max(0.0, time.time() - holder.since)
        said = f"waits for {holder}, which has been making the same artifact since {clock} ({busy:.0f} s)"
        data = {"pid": holder.pid, "host": holder.host, "since": holder.since, "seconds": round(waited, 3)}
        events.emit("waiting", self._component, said, **data)

    def given_up(self, timeout: float) -> None:
        if timeout > 0:
            who = self._holder or "another process"
            said = f"{who} has been making the same artifact for {timeout:g} s; not waiting longer"
            events.emit("note", self._component, said)
