"""One region's entries between ranks: one compiles, the others get the artifacts into their own store and load them.

The agreement is named by what the entry is found by, so ranks may come to their components in any order; a rank that
no other joins within a short time goes on alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from compile_policy.artifacts import JSON, Artifact
from compile_policy.artifacts.ranks import Ranks, RankTimeout, settle
from compile_policy.entry import Entry
from compile_policy.events import emit
from compile_policy.saving.shelf import Place

#: So long a rank waits for the others to come to the same component. Once in vain, and the component is compiled alone.
PATIENCE_SECONDS = 5.0
#: So long it waits for one that compiles.
WAIT_SECONDS = 600.0
#: What a compile raises that would be raised on every rank.
_OF_ALL = ("NotCompilable", "CompileFault")


class NotShared(Exception):
    """An entry that was made cannot be given to others."""


@dataclass(frozen=True)
class Found:
    """What became of it.

    Attributes:
        entry: ``None``: this rank has to see for itself, unless ``refused``.
        refused: why another rank could not compile it.
        raised: name of the exception's type there.
    """

    entry: Entry | None = None
    refused: str = ""
    raised: str = ""


def entry_between_ranks(place: Place, load: Callable[[], Entry | None], make: Callable[[], Entry]) -> Found:
    """The entry of a call that other ranks make too.

    Args:
        load: looks into this rank's store.
        make: compiles and saves; called on one rank, under the lock of its store.

    Raises:
        Exception: what ``make`` raised on this rank.
    """
    shelf = place.shelf
    local = _Shared(place, load, make)
    ranks = Ranks(local.key.digest, timeout=WAIT_SECONDS)
    try:
        outcome = settle(local, ranks, patience=PATIENCE_SECONDS)
    except RankTimeout as error:
        shelf.alone = True
        emit("skipped", shelf.name, f"goes on without the other ranks: {error}")
        return Found(local.entry)
    if outcome.error is not None and not isinstance(outcome.error, NotShared):
        raise outcome.error
    entry = local.entry or load()
    if entry is None and outcome.how == "failed" and outcome.raised in _OF_ALL:
        return Found(refused=outcome.reason, raised=outcome.raised)
    return Found(entry)


class _Shared:
    """A `Held`: the artifacts of one entry as one."""

    def __init__(self, place: Place, load: Callable[[], Entry | None], make: Callable[[], Entry]) -> None:
        self.place, self.key = place, place.lock_key
        self._load, self._make = load, make
        self.entry: Entry | None = None
        self.artifact: Artifact | None = None
        self.error: Exception | None = None

    def load(self) -> None:
        self.entry = self.entry or self._load()
        if self.entry is not None:
            self.artifact = _packed(self.place, self.entry)

    def make(self, *, locked: bool) -> None:
        assert locked, "what is shared doesn't communicate"
        try:
            with self.place.locked():
                self.entry = self._load() or self._make()  # another job may have made it meanwhile
            self.artifact = _packed(self.place, self.entry)
            if self.artifact is None:
                self.error = NotShared("it is not saved")
        except Exception as error:
            self.error = error

    def keep(self, files: Mapping[str, bytes], meta: Mapping[str, JSON]) -> None:
        self.artifact = Artifact(dict(files), dict(meta))
        for number, text in enumerate(json.loads(str(meta["artifacts"]))):
            inside = {name.partition("/")[2]: data for name, data in files.items() if name.startswith(f"{number}/")}
            self.place.shelf.take(text["factors"], inside, text["meta"])


def _packed(place: Place, entry: Entry) -> Artifact | None:
    """The index and the code of an entry, with what each is found by."""
    files: dict[str, bytes] = {}
    said = []
    for number, (key, artifact) in enumerate(place.shelf.artifacts_of(entry)):
        files |= {f"{number}/{name}": data for name, data in artifact.files.items()}
        said.append({"factors": dict(key.factors), "meta": dict(artifact.meta)})
    return Artifact(files, {"artifacts": json.dumps(said)}) if said else None
