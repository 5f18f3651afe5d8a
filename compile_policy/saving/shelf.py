"""Entries of one region in a store: looked up before a compile, written after it.

Nothing here can make a call fail: what cannot be read is a miss, what cannot be written is said once and left.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from compile_policy.artifacts import JSON, ArtifactKey, Miss, Store
from compile_policy.call_key import Call
from compile_policy.entry import Entry
from compile_policy.events import emit
from compile_policy.saving import sources
from compile_policy.saving.factors import entry_factors, label_factors, variants
from compile_policy.saving.form import Unsaveable, code_of, from_files, to_files
from compile_policy.saving.sources import SourceChanged, TracedCode
from compile_policy.saving.stable import Stable, Unstable, digest, ignored_names
from compile_policy.shapes import Labels

#: So many factors are named by a miss.
_NAMED = 4


@dataclass
class Kept:
    """An entry's artifact: its key, the code it was made from, and the forms of call that were proved."""

    key: ArtifactKey
    code: Mapping[str, Any]
    forms: set[str] = field(default_factory=set)


class Shelf:
    """One region's entries in a store.

    Args:
        options: how entries are lowered; part of every key.
        binder: what makes the region's calls canonical.
        name: the component, for events.
    """

    def __init__(
        self, store: Store, module: torch.nn.Module, options: Mapping[str, Any], binder: object, name: str
    ) -> None:
        self.store = store
        self.module = module
        self.options = options
        self.binder = binder
        self.name = name
        self._kept: dict[int, Kept] = {}  # by id of the entry, which lives as long as its region
        self._said: set[str] = set()

    def place(self, call: Call) -> Place | None:
        """Where entries for ``call`` are; ``None`` when they cannot be told from others."""
        try:
            factors = entry_factors(self.module, call, self.options, self.binder)
            keys = [(labels, ArtifactKey({**factors, **label_factors(call, labels)})) for labels in variants(call)]
        except Unstable as reason:
            self.leave(f"{reason}, so it cannot be recognised in another process")
            return None
        return Place(self, call, keys)

    def leave(self, reason: str) -> None:
        """Say once that something is not saved."""
        if reason not in self._said:
            self._said.add(reason)
            emit("unsaved", self.name, f"not saved: {reason}", reason=reason)

    def proved(self, entry: Entry, form: Hashable) -> bool:
        """Whether this form of call was compared with eager when the artifact was in use before."""
        kept = self._kept.get(id(entry))
        return kept is not None and _form(form) in kept.forms

    def note_proof(self, entry: Entry, form: Hashable) -> None:
        """Remember with the artifact that a form of call was compared with eager."""
        kept = self._kept.get(id(entry))
        if kept is not None and _form(form) not in kept.forms:
            kept.forms.add(_form(form))
            with contextlib.suppress(OSError):  # it is there to be added to, not to be relied on
                self.store.remove(kept.key.digest)
                self.write(entry, kept)

    def keep(self, entry: Entry, kept: Kept) -> None:
        self._kept[id(entry)] = kept

    def write(self, entry: Entry, kept: Kept) -> bool:
        """Write or overwrite an artifact; a reason not to is said."""
        try:
            files = to_files(entry, self.module, kept.code)
        except (Unsaveable, ValueError) as reason:
            self.leave(str(reason))
            return False
        meta: dict[str, JSON] = {
            "component": self.name,
            "seconds": round(entry.seconds, 1),
            "forms": list(sorted(kept.forms)),
        }
        return self.store.save(kept.key, files, meta)


class Place:
    """The artifacts that one call may use: for all its dims free, or with sizes 0 and 1 as constants."""

    def __init__(self, shelf: Shelf, call: Call, keys: Sequence[tuple[Sequence[Labels], ArtifactKey]]) -> None:
        self.shelf = shelf
        self.call = call
        self.keys = keys

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time looks and, on a miss, compiles; the others find its artifact then."""
        with self.shelf.store.lock(self.keys[0][1]):
            yield

    def load(self) -> Entry | None:
        """An entry that fits the call; why there is none is told as an event."""
        reasons: list[str] = []
        for _, key in self.keys:
            started = time.perf_counter()
            found = self.shelf.store.load(key)
            if isinstance(found, Miss):
                reasons.append(self._absent(key) if found.reason == "absent" else found.detail)
                continue
            try:
                entry = self._fitting(key, found.files, found.meta)
            except Exception as error:
                known = isinstance(error, (Unsaveable, SourceChanged))
                reasons.append(str(error) if known else f"{type(error).__name__}: {error}")
                self.shelf.store.discard(key, "changed" if known else "load")  # the new one takes its place
                continue
            if entry is not None:
                seconds = time.perf_counter() - started
                emit("loaded", self.shelf.name, f"loaded in {seconds:.1f} s", seconds=seconds, key=key.digest)
                return entry
            reasons.append("what is stored holds for other sizes")
        emit("miss", self.shelf.name, f"not in the store: {reasons[0]}", reason=reasons[0], key=self.keys[0][1].digest)
        return None

    def _absent(self, key: ArtifactKey) -> str:
        """What differs from the artifact that comes nearest."""
        found = self.shelf.store.why_miss(key.factors)
        if not found or any(difference.factor == "component" for difference in found):
            return "nothing is stored for this component"
        names = [difference.factor for difference in found]
        return f"{', '.join(names[:_NAMED])}{f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''} changed"

    def _fitting(self, key: ArtifactKey, files: Mapping[str, bytes], meta: Mapping[str, Any]) -> Entry | None:
        code = code_of(files)
        sources.check(code["texts"], code["globals"])
        entry = from_files(files, self.shelf.module, self.call)
        if entry is not None:
            self.shelf.keep(entry, Kept(key, code, set(meta.get("forms", ()))))
        return entry

    def save(self, entry: Entry, labels: Sequence[Labels]) -> None:
        """Write a new entry that was traced under ``labels``."""
        key = next((key for known, key in self.keys if list(known) == list(labels)), None)
        assert key is not None, "an entry is traced under one of the labels of its place"
        try:
            if entry.graph.program is None:
                raise Unsaveable(_run_time(entry.graph.why_jit))
            code = _code(entry)
        except (Unsaveable, SourceChanged) as reason:
            self.shelf.leave(str(reason))
            return
        kept = Kept(key, code)
        if self.shelf.write(entry, kept):
            self.shelf.keep(entry, kept)
            emit("saved", self.shelf.name, "saved for the next process", key=key.digest)


def _code(entry: Entry) -> dict[str, Any]:
    """What of the model's code the entry was made from."""
    traced = TracedCode(entry.graph.traced)
    read = sorted(traced.names() & ignored_names())
    if read:
        raise Unsaveable(f"its code reads {read[0]}, which does not count as part of a model")
    return {"texts": traced.texts(), "globals": traced.globals()}


def _form(form: Hashable) -> str:
    return digest(Stable(lenient=True)(form))


def _run_time(why: str) -> str:
    return f"it is lowered at run time{f', {why}' if why else ''}"
