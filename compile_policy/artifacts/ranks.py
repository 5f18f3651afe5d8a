"""Several processes that run one model decide together whether an artifact is found, and one makes it for all.

What they tell each other goes through the key-value store of the default process group. No collective is open while
somebody compiles, so that a slow rank meets the timeout given here (an hour) and not that of the group.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch.distributed as dist

from compile_policy import compat
from compile_policy.artifacts.key import JSON, ArtifactKey
from compile_policy.artifacts.manifest import Damaged, Manifest
from compile_policy.artifacts.reading import Artifact, verified
from compile_policy.artifacts.store import LOCK_SECONDS, Store

WAIT_SECONDS = 3600.0
_LOOK_SECONDS = 0.02
_CHUNK_BYTES = 4 << 20  # the store of torchrun takes 8 MiB at once
_LENGTH_BYTES = 8

Made = tuple[Mapping[str, bytes], Mapping[str, JSON]]

_rounds: dict[str, Iterator[int]] = defaultdict(itertools.count)


class RankTimeout(RuntimeError):
    """A rank has not answered in time, or has gone."""


class Held(Protocol):
    """What one rank has of the thing that is decided about, and how it makes it.

    Attributes:
        artifact: what the others may have; ``None`` while there is nothing.
        error: why this rank failed.
    """

    key: ArtifactKey
    artifact: Artifact | None
    error: Exception | None

    def load(self) -> None:
        """Set ``artifact`` where this rank's own store has it."""

    def make(self, *, locked: bool) -> None:
        """Set ``artifact`` or ``error``; ``locked`` asks for the lock of this rank's store."""

    def keep(self, files: Mapping[str, bytes], meta: Mapping[str, JSON]) -> None:
        """Take what another rank has sent."""


@dataclass(frozen=True)
class Outcome:
    """What all ranks have agreed on.

    Attributes:
        how: ``hit`` (every rank has it, from its own store or from another rank), ``made``, or ``failed`` on all ranks.
        artifact: the artifact; ``None`` when it failed.
        reason: which rank failed, and why.
        error: the exception, on the rank that raised it.
    """

    how: Literal["hit", "made", "failed"]
    artifact: Artifact | None = None
    reason: str = ""
    error: Exception | None = None

    @property
    def raised(self) -> str:
        """Name of the exception's type on the rank that failed; empty when none did."""
        return self.reason.split(": ")[1] if self.reason.count(": ") else ""


class Ranks:
    """The processes of the default group; without a group, this process alone.

    Every rank makes one with the same name and calls the same methods in the same order.

    Args:
        name: what is decided about, such as the component.
        timeout: seconds to wait for the slowest rank.
    """

    def __init__(self, name: str, *, timeout: float = WAIT_SECONDS) -> None:
        grouped = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if grouped else 0
        self.size: int = dist.get_world_size() if grouped else 1
        self._store: Any = compat.default_store() if self.size > 1 else None
        self._prefix = f"compile_policy/{name}/{next(_rounds[name]) if grouped else 0}"
        self._timeout = timeout
        self._round = 0

    def gather(self, value: JSON, within: float | None = None) -> list[Any]:
        """Everybody's value, by rank.

        Args:
            within: seconds to wait for all of them, instead of ``timeout`` for each.

        Raises:
            RankTimeout: a rank is missing after this time, or the connection to it is lost.
        """
        if self.size == 1:
            return [value]
        prefix, self._round = f"{self._prefix}/{self._round}", self._round + 1
        self._set(f"{prefix}/{self.rank}", json.dumps(value).encode())
        end = None if within is None else time.monotonic() + within
        return [json.loads(self._get(f"{prefix}/{rank}", end)) for rank in range(self.size)]

    def agree(self, good: bool, reason: str = "") -> str | None:
        """``None`` when all ranks are good, otherwise the reason of the first that isn't."""
        verdicts = self.gather([good, reason])
        bad = (f"rank {rank}: {why}" for rank, (fine, why) in enumerate(verdicts) if not fine)
        return next(bad, None)

    def abandon(self, reason: str) -> None:
        """Answer the next `agree` with no and don't wait for it: this process is about to leave."""
        if self.size > 1:
            self._set(f"{self._prefix}/{self._round}/{self.rank}", json.dumps([False, reason]).encode())

    def send(self, data: bytes | None, sender: int) -> bytes:
        """The sender's bytes, on every rank that asks for them."""
        if self.rank == sender:
            assert data is not None
            chunks = [data[at : at + _CHUNK_BYTES] for at in range(0, len(data), _CHUNK_BYTES)]
            for number, chunk in enumerate(chunks):
                self._set(f"{self._prefix}/from{sender}/{number}", chunk)
            self._set(f"{self._prefix}/from{sender}", str(len(chunks)).encode())
            return data
        count = int(self._get(f"{self._prefix}/from{sender}"))
        return b"".join(self._get(f"{self._prefix}/from{sender}/{number}") for number in range(count))

    def forget(self, sender: int, size: int) -> None:
        """Free what was sent, once everybody has it."""
        if self.rank == sender:
            for number in range(-(-size // _CHUNK_BYTES)):
                self._store.delete_key(f"{self._prefix}/from{sender}/{number}")

    def _set(self, name: str, data: bytes) -> None:
        try:
            self._store.set(name, data)
        except RuntimeError as error:  # torch's errors of a lost connection
            raise RankTimeout(f"the other ranks cannot be reached: {error}") from error

    def _get(self, name: str, end: float | None = None) -> bytes:
        """Looks again and again, so that Ctrl-C is heard while others compile."""
        started = time.monotonic()
        deadline = started + self._timeout if end is None else end
        try:
            while not self._store.check([name]):
                if time.monotonic() > deadline:
                    raise RankTimeout(f"no answer from another rank within {max(deadline - started, 0):.3g} s")
                time.sleep(_LOOK_SECONDS)
            return bytes(self._store.get(name))
        except dist.DistError as error:
            raise RankTimeout(f"the other ranks cannot be reached: {error}") from error


def obtain(
    store: Store | None,
    key: ArtifactKey,
    make: Callable[[], Made],
    *,
    ranks: Ranks,
    together: bool = False,
    lock_timeout: float = LOCK_SECONDS,
) -> Outcome:
    """The artifact of ``key`` on every rank, or on none.

    A hit anywhere is a hit everywhere: ranks that miss get the bytes from one that has them. On a miss the lowest rank
    of each key makes and saves it while the others wait. What ``make`` raises makes the outcome ``failed`` on all.

    Args:
        store: this rank's; ranks may share a directory or have their own, and ``None`` is a rank without one.
        make: returns files and meta. Called on one rank of each key, under its lock; it may not communicate.
        together: ``make`` does communicate: then a hit is one only when all ranks have it, and otherwise all make.

    Raises:
        RankTimeout: another rank did not come, or is gone.
    """
    return settle(_Local(store, key, make, lock_timeout), ranks, together=together)


def settle(local: Held, ranks: Ranks, *, together: bool = False, patience: float | None = None) -> Outcome:
    """As `obtain`, for whatever ``local`` knows how to load, make and keep.

    Args:
        patience: seconds in which all ranks have to come. A rank that gives up is not waited for by those that come
            later: for them the outcome is ``failed``.

    Raises:
        RankTimeout: another rank did not come, or is gone.
    """
    try:
        return _settle(local, ranks, together, patience)
    except (KeyboardInterrupt, SystemExit) as error:
        ranks.abandon(type(error).__name__)
        raise


def _settle(local: Held, ranks: Ranks, together: bool, patience: float | None) -> Outcome:
    local.load()
    key = local.key
    try:
        states = ranks.gather([key.digest, local.artifact is not None], patience)
    except RankTimeout:
        with contextlib.suppress(RankTimeout):
            ranks.abandon("RankTimeout: it waited and went on alone")
        raise
    if all(hit for _, hit in states):
        return _end("hit", local, ranks)
    if together:
        local.make(locked=False)
        return _end("made", local, ranks)
    maker, has = _source(states, key.digest)
    if not has and maker == ranks.rank:
        local.make(locked=True)
    how: Literal["hit", "made"] = "hit" if all(_source(states, digest)[1] for digest, _ in states) else "made"
    if (reason := ranks.agree(local.error is None, _said(local.error))) is not None:
        return Outcome("failed", reason=reason, error=local.error)
    if local.artifact is None:
        local.load()
    _share(local, ranks, maker)
    return _end(how, local, ranks)


class _Local:
    """What this rank has and does."""

    def __init__(self, store: Store | None, key: ArtifactKey, make: Callable[[], Made], lock_timeout: float) -> None:
        self.store, self.key, self._make, self._lock_timeout = store, key, make, lock_timeout
        self.artifact: Artifact | None = None
        self.error: Exception | None = None

    def load(self) -> None:
        found = self.store.load(self.key) if self.store is not None else None
        self.artifact = found if isinstance(found, Artifact) else None

    def make(self, *, locked: bool) -> None:
        try:
            if self.store is None or not locked:
                self._make_now()
                return
            with self.store.lock(self.key, self._lock_timeout):
                self.load()  # another job may have made it meanwhile
                if self.artifact is None:
                    self._make_now()
        except Exception as error:
            self.error = error

    def _make_now(self) -> None:
        files, meta = self._make()
        self.keep(files, meta)

    def keep(self, files: Mapping[str, bytes], meta: Mapping[str, JSON]) -> None:
        self.artifact = Artifact(dict(files), dict(meta))
        if self.store is not None:
            self.store.save(self.key, files, meta)


def _source(states: Sequence[Any], digest: str) -> tuple[int, bool]:
    """(rank, whether it has it) of the rank that gives the artifact of a key: the lowest that has it, or the lowest."""
    ours = [(rank, hit) for rank, (theirs, hit) in enumerate(states) if theirs == digest]
    return next(((rank, hit) for rank, hit in ours if hit), ours[0])


def _share(local: Held, ranks: Ranks, source: int) -> None:
    """Send the bytes to those whose own store hasn't got them."""
    lacking = {asked for asked in ranks.gather(None if local.artifact is not None else source) if asked is not None}
    sent = b""
    try:
        if ranks.rank in lacking:
            assert local.artifact is not None
            sent = ranks.send(_pack(local.key, local.artifact), ranks.rank)
        elif local.artifact is None:
            artifact = _unpack(local.key, ranks.send(None, source))
            local.keep(artifact.files, artifact.meta)
    except Damaged as error:
        local.error = error
    ranks.gather(None)
    ranks.forget(ranks.rank, len(sent))


def _end(how: Literal["hit", "made"], local: Held, ranks: Ranks) -> Outcome:
    """One last round: nobody goes on with an artifact that another rank has not got."""
    reason = ranks.agree(local.error is None and local.artifact is not None, _said(local.error))
    if reason is not None:
        return Outcome("failed", reason=reason, error=local.error)
    return Outcome(how, artifact=local.artifact)


def _said(error: Exception | None) -> str:
    if error is None:
        return ""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"


def _pack(key: ArtifactKey, artifact: Artifact) -> bytes:
    manifest = Manifest.describe(key, artifact.files, artifact.meta)
    text = manifest.encode()
    parts = [len(text).to_bytes(_LENGTH_BYTES, "big"), text, *(artifact.files[name] for name in sorted(manifest.files))]
    return b"".join(parts)


def _unpack(key: ArtifactKey, data: bytes) -> Artifact:
    at = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "big")
    manifest = Manifest.decode(data[_LENGTH_BYTES:at])
    if manifest.key != key:
        raise Damaged("key", "another rank sent the artifact of another key")
    files: dict[str, bytes] = {}
    for name in sorted(manifest.files):
        record = manifest.files[name]
        files[name] = verified(name, data[at : at + record.size], record)
        at += record.size
    return Artifact(files, manifest.meta)
