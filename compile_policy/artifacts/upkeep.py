"""Making room: what `gc` and `clear` do."""

from __future__ import annotations

from dataclasses import dataclass

from compile_policy.artifacts.manifest import Miss
from compile_policy.artifacts.store import DAMAGED, Store


@dataclass(frozen=True)
class Removed:
    """How much went.

    Attributes:
        artifacts: removed to stay below the limit, or all of them.
        size: of these, in bytes.
        damaged: artifacts that did not verify.
        leftovers: folders of writers that are gone.
        quarantined: artifacts set aside earlier.
        busy: artifacts that somebody holds the lock of, and that stay.
    """

    artifacts: int = 0
    size: int = 0
    damaged: int = 0
    leftovers: int = 0
    quarantined: int = 0
    busy: int = 0


def collect(store: Store, limit_bytes: int | None = None) -> Removed:
    """Remove damaged artifacts, leftovers, what was set aside, and the least recently used beyond the limit.

    Raises:
        OSError: something cannot be removed.
    """
    damaged = 0
    for entry in store.folders.artifacts(manifests=False):
        found = store.check(entry.digest)
        if isinstance(found, Miss) and found.reason in DAMAGED:
            damaged += store.remove(entry.digest)
    leftovers, quarantined = _empty(store)
    gone = store.trim(limit_bytes)
    return Removed(len(gone), sum(entry.size for entry in gone), damaged, leftovers, quarantined)


def clear(store: Store) -> Removed:
    """Remove everything but what somebody is making.

    Raises:
        OSError: something cannot be removed.
    """
    stored = store.folders.artifacts(manifests=False)
    gone = [entry for entry in stored if store.remove(entry.digest)]
    leftovers, quarantined = _empty(store)
    size = sum(entry.size for entry in gone)
    return Removed(len(gone), size, 0, leftovers, quarantined, busy=len(stored) - len(gone))


def _empty(store: Store) -> tuple[int, int]:
    return store.folders.sweep(older_than=0), store.folders.empty_quarantine()
