"""The entries of one component: found by the key of a call, loaded from disk, or compiled once.

One capture at a time in the whole process; a verdict that a call cannot be compiled is kept beside the entries.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch

from compile_policy import compat
from compile_policy.binder import Binder
from compile_policy.call_key import Call, make_call
from compile_policy.caller import users_place, warn_user
from compile_policy.compat_compiler import limit_compilers
from compile_policy.entry import Entry, ExampleUnfit, build_entry
from compile_policy.errors import BudgetExceeded, InternalError, NotCompilable, PolicyWarning, first_line
from compile_policy.events import emit
from compile_policy.example import examples
from compile_policy.failure import Failure, explanation_of, failure_of, of_this_package
from compile_policy.fingerprint import Fingerprint
from compile_policy.options import RegionOptions
from compile_policy.saving import Place, Shelf, entry_between_ranks
from compile_policy.shapes import Labels, pattern
from compile_policy.shortage import shortage
from compile_policy.verdicts import Shortage, Verdicts
from compile_policy.walk import hooked_below

# Dynamo is not safe to enter from two threads; one capture at a time in the whole process.
_compile_lock = threading.RLock()
compat.renew_after_fork(_compile_lock)
_REMEDIES = {"InvalidCxxCompiler": "Install a C++ compiler such as g++, or name one in CXX."}
T = TypeVar("T")
#: What to do about a shortage.
TRIED_AGAIN = "Mend that; the component is tried again in a while, or when the policy is applied again."
_OFFLOADED = "weights of it are moved in by somebody else for each call (offloaded)"


class PassingObstacle(NotCompilable):
    """Stands in the way of this call only: nothing is concluded for the next."""


class _Building(threading.local):
    """Whether the calling thread is building or proving an entry."""

    now = False


class Entries:
    """What one component has compiled, and how another entry comes about.

    Attributes:
        entries: by key of the call; several where the sizes decide.
        refused: what cannot be compiled, for good or for now.
        captures: odd while a capture goes on, which changes the module for a moment.
    """

    def __init__(self, module: torch.nn.Module, name: str, binder: Binder, options: RegionOptions) -> None:
        self.module = module
        self.name = name
        self.binder = binder
        self.options = options
        self.entries: dict[tuple[Any, ...], list[Entry]] = {}
        self.unread: list[frozenset[str]] = []  # by which arguments the keys of entries are shorter
        self.refused = Verdicts()
        self.refused_unread: list[frozenset[str]] = []  # the same of the keys in there
        self.fingerprint = Fingerprint(module)
        self.lock = _compile_lock
        self.building = _Building()
        self.captures = 0
        self.graphs = self.loaded = 0
        self.compile_seconds = 0.0
        self.place = users_place()
        self._took = 0.0  # seconds of the last attempt to compile
        self._remarks: set[str] = set()
        self._shelf: Shelf | None = None

    def find(self, call: Call) -> Entry | None:
        """The entry that serves a call, if there is one."""
        for unread in self.unread:
            for entry in self.entries.get(call.key_without(unread), ()):
                if entry.unread == unread and entry.graph.accepts(call.leaves):
                    return entry
        return None

    def _alike(self, call: Call) -> Iterator[Entry]:
        """Entries for calls like this one, whatever their sizes."""
        for unread in self.unread:
            found = self.entries.get(call.key_without(unread), ())
            yield from (entry for entry in found if entry.unread == unread)

    def look_up(self, call: Call) -> Entry:
        """The entry for a call: found, loaded or compiled.

        Raises:
            NotCompilable: there is none, and why; a mistake of this package is a reason too.
            BudgetExceeded: with ``on_budget="error"``.
        """
        try:
            return self.find(call) or self.obtain(call)
        except (NotCompilable, PolicyWarning, BudgetExceeded):
            raise
        except Exception as error:
            raise InternalError("an entry was looked for", error) from error

    def obtain(self, call: Call) -> Entry:
        """Load or compile the entry for a call that has none.

        Raises:
            NotCompilable: there is none, and why.
            BudgetExceeded: with ``on_budget="error"``.
        """
        with self.lock:
            entry = self.find(call)  # another thread may have been here first
            if entry is not None:
                return entry
            if any(p.is_meta for p in self.module.parameters()):
                self.forget()
                raise PassingObstacle(_OFFLOADED, remedy="Keep the weights in memory to have the component compiled.")
            for unread in (frozenset[str](), *self.refused_unread):
                if self.refused.check(_kind(call, unread)):
                    compat.forget_failed_probes()
            if any(leaf.is_meta for leaf in call.leaves):
                raise NotCompilable(
                    "the call's tensors have no memory", remedy="Call it with tensors of a real device."
                )
            hooked = hooked_below(self.module)
            if hooked:  # it may note something, of which a graph would do nothing and a trial run too much
                raise NotCompilable(f"{hooked} has a hook", remedy="Remove the hook to have the component compiled.")
            place = self._place(call)
            if place is not None and place.shelf.shared() and not self.options.load_only:
                entry = self._with_ranks(call, place)
                if entry is not None:
                    return entry
            try:
                with place.locked() if place is not None else nullcontext():
                    return self._load(call, place) or self._make(call, place)
            finally:
                call.forget_objects()

    def forget(self) -> None:
        """Let go of all entries, and of the weights that they are bound to."""
        self.entries.clear()
        self._shelf = None
        self.fingerprint.forget()

    def _with_ranks(self, call: Call, place: Place) -> Entry | None:
        """The entry that one of the ranks has or makes; ``None`` where this one has to go on by itself."""
        found = entry_between_ranks(place, lambda: self._load(call, place), lambda: self._make(call, place))
        if found.refused:
            raise NotCompilable(found.refused)
        return found.entry

    def _load(self, call: Call, place: Place | None) -> Entry | None:
        """The entry that another process left in the store, if any."""
        entry = None if place is None else self._of_store("an entry was loaded", place.load)
        if place is not None and entry is None and place.lacking:  # compiling would fail for it too, minutes later
            raise Shortage(f"what is stored cannot be loaded, {place.lacking}", remedy=TRIED_AGAIN)
        if entry is not None:
            self.loaded += 1
            self.fingerprint.watch(call.key[3], entry.graph.watched)
            self._add(call, entry)
            if self.options.dump is not None:
                self.options.dump(self, entry)
        return entry

    def _make(self, call: Call, place: Place | None) -> Entry:
        if self.options.load_only:
            raise PassingObstacle("the store has no entry for this call, and nothing is to be compiled")
        self._check_budget()
        self._announce(call)
        why: NotCompilable | None = None
        unfit: Entry | None = None
        for example, labels in self._examples(call):
            if unfit is not None:
                self._announce_another(unfit, call)
            try:
                entry = self._build(call, example, labels)
            except ExampleUnfit as reason:
                why = reason
                continue
            if place is not None:
                self._of_store("an entry was saved", partial(place.save, entry, labels))
            if entry.graph.accepts(call.leaves):
                return entry
            unfit = entry  # kept for the sizes it holds for, but never run for this call
            failing = "; ".join(entry.graph.accepts.failing(call.leaves)[:3])
            why = NotCompilable(f"the graph does not hold for these sizes: {failing}")
        assert why is not None
        raise why

    @property
    def shelf(self) -> Shelf | None:
        """The region's entries on disk; ``None`` where nothing is kept there."""
        store = self.options.store
        if store is not None and (self._shelf is None or self._shelf.store is not store):
            self._shelf = Shelf(
                store, self.module, self.options.lowered(), self.binder, self.name, wait=self.options.cache_wait
            )
        return self._shelf if store is not None else None

    def _examples(self, call: Call) -> list[tuple[list[torch.Tensor], Sequence[Labels]]]:
        """Examples that have not been tried for calls like this one."""
        try:
            if call.example is not None:
                return [(make_call(call.example(), call.label).leaves, call.labels)]
            general, given = examples(call)
        except NotCompilable:
            raise
        except Exception as error:
            raise NotCompilable(f"no example of the call could be made: {error}") from error
        tried = any(pattern(e.call.labels) == pattern(call.labels) for e in self._alike(call))
        return [given] if tried else [general, given]

    def _build(self, call: Call, example: list[torch.Tensor], labels: Sequence[Labels]) -> Entry:
        started = time.perf_counter()
        self.building.now = True
        self.captures += 1
        if self.options.backend == "inductor":
            limit_compilers(self.options.compiler_timeout)
        try:
            with self.options.recording(), self.binder.tracing(self.module):
                entry = build_entry(self.module, call, example, labels, self.options.lowering(), self._count_capture)
            self.fingerprint.watch(call.key[3], entry.graph.watched)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            seconds, found = time.perf_counter() - started, _failure(compat.original_error(error))
            reason = getattr(error, "reason", "") or found.cause
            emit("compile_failed", self.name, reason, reason=reason, seconds=seconds, **found.data())
            if isinstance(error, NotCompilable):
                raise
            self._fault(error)
        finally:
            self.captures += 1
            self.building.now = False
            self._took = time.perf_counter() - started
            self.compile_seconds += self._took
        entry.seconds = time.perf_counter() - started
        self._add(call, entry)
        for unread in (frozenset[str](), *self.refused_unread):
            self.refused.forget(_kind(call, unread))
        said = {"seconds": entry.seconds, "entry": entry.number, "road": entry.graph.road}
        said |= {"blocks": blocks} if (blocks := self.blocks()) else {}
        said |= {"depth": entry.graph.depth} if entry.graph.depth else {}
        emit("compile_end", self.name, f"compiled in {entry.seconds:.1f} s", **said)
        self._dump(entry)
        return entry

    def _add(self, call: Call, entry: Entry) -> None:
        entry.number = self.entry_count()
        self.entries.setdefault(call.key_without(entry.unread), []).append(entry)
        if entry.unread not in self.unread:
            self.unread.append(entry.unread)

    def _dump(self, entry: Entry) -> None:
        if self.options.dump is not None:
            self._of_store("a graph was dumped", partial(self.options.dump, self, entry))

    def _count_capture(self) -> None:
        self.graphs += 1

    def entry_count(self) -> int:
        return sum(len(found) for found in self.entries.values())

    def _check_budget(self) -> None:
        count = self.entry_count()
        if count < self.options.max_entries:
            return
        message = f"needs more than max_entries={self.options.max_entries} graphs"
        if self.options.on_budget == "error":
            raise BudgetExceeded(f"{self.name} {message}")
        emit("budget", self.name, message, entries=count)
        if self.options.on_budget == "eager":
            raise NotCompilable(message, remedy="Raise max_entries, or see which argument differs with `explain`.")

    def _announce(self, call: Call) -> None:
        emit("compile_start", self.name, "compiling", paths=list(call.paths))
        known = [e for found in self.entries.values() for e in found]
        if known:
            self._announce_another(known[-1], call)

    def _announce_another(self, known: Entry, call: Call) -> None:
        difference = self.difference(known, call)
        emit("new_entry", self.name, f"another graph is needed: {difference}", difference=difference)

    def difference(self, entry: Entry, call: Call) -> str:
        """What made another graph necessary, in words."""
        (modes, structure, ambient), (modes_now, structure_now, ambient_now) = entry.call.key[2:], call.key[2:]
        if structure != structure_now:
            return self.fingerprint.difference(structure, structure_now)
        named = zip(("grad mode", "inference mode", "training flag", "autocast"), modes, modes_now, strict=True)
        for name, was, now in [*named, *((n, x, y) for (n, x), (_, y) in zip(ambient, ambient_now, strict=True))]:
            if was != now:
                return f"{name} is {now}, was {was}"
        return entry.difference(call)

    def _fault(self, error: BaseException) -> NoReturn:
        """A capture or lowering that failed, with the original as cause."""
        cause = compat.original_error(error)
        lacking = shortage(error)
        if lacking:
            raise Shortage(f"compiling failed, {lacking}", remedy=TRIED_AGAIN) from cause
        if of_this_package(cause):
            raise InternalError("the component was compiled", cause)
        explained = explanation_of(cause, self.module)
        if explained is not None:
            raise NotCompilable(explained[0], remedy=explained[1]) from cause
        found = _failure(cause)
        reason = f"compiling failed with {first_line(cause)}"
        if found.cause not in reason:  # what Dynamo says was read
            reason = f"compiling failed{f' at {found.place}' if found.place else ''}: {found.cause}"
        raise NotCompilable(reason, remedy=_REMEDIES.get(type(cause).__name__, found.remedy)) from cause

    def refuse(self, call: Call, why: NotCompilable) -> None:
        """Calls like this one cannot be compiled, whatever it has in arguments that were not read."""
        unread = frozenset[str]() if why.read is None else call.unread(why.read)
        if unread and unread not in self.refused_unread:
            self.refused_unread.append(unread)
        self.refused.add(_kind(call, unread), why, self._took)

    def remark(self, why: InternalError) -> None:
        """Say once of each mistake of this package that did not keep a call from its entry what it was."""
        if why.reason not in self._remarks:
            self._remarks.add(why.reason)
            emit("skipped", self.name, why.reason, error=type(why.__cause__).__name__)
            warn_user(f"{self.name}: {why.reason}. {why.remedy}", otherwise=self.place)

    def _place(self, call: Call) -> Place | None:
        """Where the entries for a call are on disk; ``None`` where none are kept."""
        shelf = self.shelf
        return None if shelf is None else self._of_store("the store was asked", partial(shelf.place, call))

    def _of_store(self, doing: str, ask: Callable[[], T | None]) -> T | None:
        """What the store answers; nothing where asking it fails, which never stops a call."""
        try:
            return ask()
        except (NotCompilable, PolicyWarning):
            raise
        except Exception as error:
            self.remark(InternalError(doing, error))
            return None

    def blocks(self) -> str | None:
        """How the graph made last was divided, where it was or was to be."""
        entries = [e for found in self.entries.values() for e in found]
        blocks = entries[-1].graph.blocks if entries else None
        return str(blocks) if blocks is not None and (blocks.instances or blocks.blocks_only) else None


def _failure(cause: BaseException) -> Failure:
    """An exception read as the cause of a fault: it is not to be looked through for one of its own."""
    if isinstance(cause, NotCompilable):
        return failure_of(cause)
    fault = NotCompilable("")
    fault.__cause__ = cause
    return failure_of(fault)


def _kind(call: Call, unread: frozenset[str] = frozenset()) -> Hashable:
    """What a verdict is about: the key, without objects, and which sizes of the call are equal to which."""
    return call.key_without(unread | call.objects()), pattern(call.labels)
