"""Entries of one region in a store: looked up before a compile, written after it.

Which code an entry was made from is known to the process that traced it. So an entry is found in two steps: an *index*,
under all factors that need no trace, lists the files and globals that mattered; with what they hold just now they are
the rest of the entry's own key. Variants of the code lie beside each other, and a miss names the file that differs.

Nothing here can make a call fail: what cannot be read is a miss, what cannot be written is said once and left.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from compile_policy.artifacts import JSON, LOCK_SECONDS, Artifact, ArtifactKey, Miss, Store
from compile_policy.call_key import Call
from compile_policy.entry import Entry
from compile_policy.errors import first_line
from compile_policy.events import emit
from compile_policy.saving.factors import entry_factors, label_factors, variants
from compile_policy.saving.form import Unsaveable, from_files, to_files
from compile_policy.saving.index import INDEX, Factors, Index, index_key
from compile_policy.saving.replicas import OF_RANKS, is_replica
from compile_policy.saving.sources import SourceChanged, TracedCode, watched_at, watched_places
from compile_policy.saving.stable import Stable, Unstable, digest, ignored_names
from compile_policy.shapes import Labels
from compile_policy.shortage import shortage

#: The environment: code that reads it may differ in every process.
_OUTSIDE = frozenset({"environ", "getenv"})
#: An index is read and written in milliseconds; who holds it longer is not waited for.
_INDEX_SECONDS = 5.0
#: So many factors are named by a miss.
_NAMED = 4


class Shelf:
    """One region's entries in a store.

    Args:
        options: how entries are lowered; part of every key.
        binder: what makes the region's calls canonical.
        name: the component, for events.
        wait: seconds to wait for another process that compiles the same entry; afterwards it is compiled here too.
    """

    def __init__(
        self,
        store: Store,
        module: torch.nn.Module,
        options: Mapping[str, Any],
        binder: object,
        name: str,
        *,
        wait: float = LOCK_SECONDS,
    ) -> None:
        self.store = store
        self.wait = wait
        self.module = module
        self.options = options
        self.binder = binder
        self.name = name
        self._keys: dict[int, tuple[Factors, str]] = {}  # by id of the entry, which lives as long as its region
        self._minded: dict[str, set[str]] = {}  # where the store cannot be written
        self._said: set[str] = set()
        self.alone = False  # the other ranks did not come once

    def shared(self) -> bool:
        """Whether other ranks have the same component, and may be asked."""
        return not self.alone and is_replica(self.module)

    def place(self, call: Call) -> Place | None:
        """Where entries for ``call`` are; ``None`` when they cannot be told from others."""
        try:
            factors = entry_factors(self.module, call, self.options, self.binder)
            found = [(labels, {**factors, **label_factors(call, labels)}) for labels in variants(call)]
        except Unstable as reason:
            self.leave(f"{reason}, so it cannot be recognised in another process")
            return None
        return Place(self, call, found)

    def leave(self, reason: str) -> None:
        """Say once that something is not saved."""
        if reason not in self._said:
            self._said.add(reason)
            emit("unsaved", self.name, f"not saved: {reason}", reason=reason)

    def proved(self, entry: Entry, form: Hashable) -> bool:
        """Whether this form of call was compared with eager when the artifact was in use before."""
        factors, key = self._keys.get(id(entry), ({}, ""))
        index = self.index(factors) if key else None
        return index is not None and _form(form) in index.proved.get(key, ())

    def note_proof(self, entry: Entry, form: Hashable) -> None:
        """Remember beside the artifact that a form of call was compared with eager."""
        if id(entry) in self._keys:
            factors, key = self._keys[id(entry)]
            self.update_index(factors, lambda index: index.proved.setdefault(key, set()).add(_form(form)))

    def note_minded(self, entry: Entry, relations: Sequence[str]) -> None:
        """Remember, here and beside the artifact, relations between sizes that an entry does not hold without."""
        if id(entry) in self._keys:
            factors, key = self._keys[id(entry)]
            self._minded.setdefault(key, set()).update(relations)
            self.update_index(factors, lambda index: index.minded.setdefault(key, set()).update(relations))

    def minded(self, index: Index, key: ArtifactKey) -> set[str]:
        """The relations that were noted for an artifact."""
        return index.minded.get(key.digest, set()) | self._minded.get(key.digest, set())

    def keep(self, entry: Entry, factors: Factors, key: ArtifactKey) -> None:
        """Remember which artifact an entry is."""
        self._keys[id(entry)] = (factors, key.digest)

    def index(self, factors: Factors) -> Index | None:
        key = index_key(factors)
        found = self.store.load_settled(key)
        return None if isinstance(found, Miss) else Index.decode(found.files[INDEX])

    def artifacts_of(self, entry: Entry) -> list[tuple[ArtifactKey, Artifact]]:
        """What another store needs to have this entry; nothing when it isn't stored."""
        factors, digest = self._keys.get(id(entry), ({}, ""))
        index = self.index(factors) if digest else None
        if index is None:
            return []
        keys = [index_key(factors), index.key(factors)]
        found = [(key, self.store.load(key)) for key in keys]
        return [(k, a) for k, a in found if isinstance(a, Artifact)] if keys[1].digest == digest else []

    def take(self, factors: Factors, files: Mapping[str, bytes], meta: Mapping[str, JSON]) -> None:
        """Store what another rank has; an index adds to ours."""
        if meta["kind"] != "index":
            self.store.save(ArtifactKey(factors), files, meta)
            return
        self.update_index(factors, lambda index: index.add(Index.decode(files[INDEX])))

    def update_index(self, factors: Factors, change: Callable[[Index], object]) -> None:
        """Change an index under its lock."""
        with self.index_lock(factors):
            index = self.index(factors) or Index()
            change(index)
            self.write_index(factors, index)

    def index_lock(self, factors: Factors) -> AbstractContextManager[bool]:
        """Held while an index is read, changed and written again, so that no line of another process is lost."""
        return self.store.lock(index_key(factors), _INDEX_SECONDS, component=self.name)

    def write_index(self, factors: Factors, index: Index) -> bool:
        """Put an index in the place of the old one, which readers find until then."""
        meta: dict[str, JSON] = {"component": self.name, "kind": "index"}
        return self.store.save(index_key(factors), {INDEX: index.encode()}, meta, replace=True)


class Place:
    """The artifacts that one call may use: for all its dims free, or with sizes 0 and 1 as constants.

    Attributes:
        lacking: what this process lacks to load one that is good; empty when nothing does.
    """

    def __init__(self, shelf: Shelf, call: Call, found: Sequence[tuple[Sequence[Labels], Factors]]) -> None:
        self.shelf = shelf
        self.call = call
        self.variants = found
        self.lock_key = ArtifactKey({**index_key(found[0][1]).factors, "kind": "lock"})
        self._missed = False
        self._unusable: set[str] = set()
        self.lacking = ""

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time looks and, on a miss, compiles; the others find its artifact then."""
        with self.shelf.store.lock(self.lock_key, self.shelf.wait, component=self.shelf.name):
            yield

    def load(self) -> Entry | None:
        """An entry that fits the call; why there is none is told as an event."""
        reasons: list[str] = []
        for _, factors in self.variants:
            started = time.perf_counter()
            index = self.shelf.index(factors)
            if index is None:
                reasons.append(self._nearest(index_key(factors)))
                continue
            key = index.key(factors)
            found = self.shelf.store.load(key)
            if isinstance(found, Miss):
                reasons.append(self._nearest(key) if found.reason == "absent" else found.detail)
                continue
            try:
                entry = from_files(found.files, self.shelf.module, self.call)
            except Exception as error:  # its bytes are good: what is wrong is here, or with what they were made for
                self._unusable.add(key.digest)  # an entry that can be made here takes its place
                self.lacking = shortage(error)
                reasons.append(self.lacking or _why_unusable(error))
                continue
            if entry is None or not self._holds(entry, self.shelf.minded(index, key)):
                reasons.append("what is stored holds for other sizes")
                continue
            entry.graph.watched = watched_at(index.places)
            self.shelf.keep(entry, factors, key)
            seconds = time.perf_counter() - started
            emit("loaded", self.shelf.name, f"loaded in {seconds:.1f} s", seconds=seconds, key=key.digest)
            return entry
        if not self._missed:
            emit("miss", self.shelf.name, f"not in the store: {reasons[0]}", reason=reasons[0])
        self._missed = True
        return None

    def _holds(self, entry: Entry, minded: set[str]) -> bool:
        """Whether a loaded entry is one for this call when it minds these of the relations that it passed over."""
        accepts = entry.graph.accepts
        entry.graph.accepts = accepts.minding([r for r in accepts.passed_over if r in minded]) if minded else accepts
        return entry.graph.accepts(self.call.leaves)

    def _nearest(self, key: ArtifactKey) -> str:
        """What differs from the artifact that comes nearest."""
        found = [difference.factor for difference in self.shelf.store.why_miss(key.factors)]
        if not found or {"component", "kind"} & set(found):
            return "nothing is stored for this component"
        named = [_in_words(factor) for factor in found]
        return f"{', '.join(named[:_NAMED])}{f' and {len(named) - _NAMED} more' if len(named) > _NAMED else ''} changed"

    def save(self, entry: Entry, labels: Sequence[Labels]) -> None:
        """Write a new entry that was traced under ``labels``; a reason not to is said."""
        shelf = self.shelf
        factors = next((factors for known, factors in self.variants if list(known) == list(labels)), None)
        assert factors is not None, "an entry is traced under one of the labels of its place"
        try:
            files = to_files(entry, shelf.module)
            code = _code(entry, replica=is_replica(shelf.module))
        except (Unsaveable, SourceChanged, ValueError) as reason:
            shelf.leave(str(reason))
            return
        places = code.places() | watched_places(entry.graph.watched, map(type, shelf.module.modules()))
        read = set(self.call.constants()) - entry.unread
        meta: dict[str, JSON] = {"component": shelf.name, "kind": "entry", "seconds": round(entry.seconds, 1)}
        with shelf.index_lock(factors):
            index = shelf.index(factors) or Index()
            index.add(Index(code.modules(), places, read=read))
            key = index.key(factors)
            replace = key.digest in self._unusable
            saved = shelf.store.save(key, files, meta, replace=replace) and shelf.write_index(factors, index)
        if saved:
            shelf.keep(entry, factors, key)
            emit("saved", shelf.name, "saved for the next process", key=key.digest)


def _code(entry: Entry, *, replica: bool = False) -> TracedCode:
    """What of the model's code the entry was made from."""
    traced = TracedCode(entry.graph.traced)
    read = sorted(traced.names() & (ignored_names() | _OUTSIDE | (OF_RANKS if replica else frozenset())))
    if read:
        raise Unsaveable(f"its code names {read[0]}, which is no part of what an artifact is found by")
    return traced


def _why_unusable(error: Exception) -> str:
    return str(error) if isinstance(error, Unsaveable) else f"it cannot be loaded here, {first_line(error)}"


def _form(form: Hashable) -> str:
    return digest(Stable(lenient=True)(form))


def _in_words(factor: str) -> str:
    if factor.startswith("code.text."):
        return f"the source of {factor.removeprefix('code.text.')}"
    return factor.removeprefix("code.global.").replace(":", ".")
