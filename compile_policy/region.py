"""The call path of one compiled component: bind -> key -> entry -> run; compile once; fall back.

A `Region` stands in front of one module instance. It never changes the module: calls reach it through the hook that
``nn.Module.compile`` uses, and whatever cannot be compiled runs the module's own call.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, NoReturn

import torch

from compile_policy import compat
from compile_policy.binder import Binder as Binder
from compile_policy.binder import Bound as Bound
from compile_policy.binder import FormBinder
from compile_policy.binder import SignatureBinder as SignatureBinder
from compile_policy.binder import StepBinder as StepBinder
from compile_policy.call_key import Call, make_call
from compile_policy.entry import TOLERANCE, Entry, ExampleUnfit, build_entry
from compile_policy.errors import BudgetExceeded, CompileFault, NotCompilable, first_line
from compile_policy.events import emit
from compile_policy.example import examples
from compile_policy.failure import Failure, failure_of
from compile_policy.fingerprint import Fingerprint
from compile_policy.options import RegionOptions as RegionOptions
from compile_policy.plan import ComponentReport
from compile_policy.proof import misfit
from compile_policy.reference import ChangesItself
from compile_policy.saving import Place, Shelf, entry_between_ranks
from compile_policy.sentinel import TOLERANCE as SENTINEL_TOLERANCE
from compile_policy.shapes import Labels, pattern
from compile_policy.walk import hooked_below

# Dynamo is not safe to enter from two threads; one capture at a time in the whole process.
_compile_lock = threading.RLock()
compat.renew_after_fork(_compile_lock)
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_REMEDIES = {"InvalidCxxCompiler": "Install a C++ compiler such as g++, or name one in CXX."}
Verdict = tuple[tuple[Any, ...], tuple[Any, ...]]


class PassingObstacle(NotCompilable):
    """Stands in the way of this call only: nothing is concluded for the next."""


class _Building(threading.local):
    """Whether the calling thread is building or proving an entry."""

    now = False


class Region:
    """One compiled component instance: its entries, its lock and its counters."""

    #: What a call does instead while a profiler of torch is on; given by `compile_policy.trace`.
    when_profiled: ClassVar[Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] | None] = None

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        role: str,
        qualname: str = "",
        binder: Binder,
        options: RegionOptions | None = None,
        reason: str = "",
    ) -> None:
        self.module = module
        self.role = role
        self.qualname = qualname
        self.binder = binder
        self.options = options or RegionOptions()
        self.reason = reason
        self.entries: dict[tuple[Any, ...], list[Entry]] = {}
        self.refused: dict[Verdict, str] = {}
        self.condemned = ""  # by the sentinel
        self.changes_itself: dict[bool, str] = {}  # by training flag
        self.fingerprint = Fingerprint(module)
        self.steps = binder if isinstance(binder, StepBinder) else None
        self.forms = binder if isinstance(binder, FormBinder) else None
        self.proved: dict[tuple[int, Hashable], str] = {}  # by entry and form: what speaks against it
        self.lock = _compile_lock
        self.forced_eager = 0
        self._building = _Building()
        self._captures = 0  # odd while one is going on
        self._allowed: tuple[Any, ...] | None = None  # what was ambient when no obstacle was found last
        self.graphs = self.calls = self.eager_calls = self.loaded = 0
        self._shelf: Shelf | None = None
        self.compile_seconds = 0.0
        self.fallback: str | None = None
        self.failures: dict[str, Failure] = {}  # by reason

    @property
    def name(self) -> str:
        return f"{self.role} {self.qualname}".strip()

    # -- the path of a call ---------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_dynamo_compiling() or self.forced_eager or self._building.now:
            return compat.plain_call(self.module, *args, **kwargs)
        if compat.profiling() and (profiled := type(self).when_profiled) is not None:
            return profiled(self, args, kwargs)
        self.calls += 1
        ambient = compat.ambient(self.module)
        if ambient != self._allowed or self.condemned or self.changes_itself:
            obstacle = self._obstacle()
            if obstacle:
                return self._eager(NotCompilable(obstacle), None, compat.plain_call, self.module, *args, **kwargs)
            self._allowed = ambient
        if compat.has_hooks(self.module):  # which may change what is ambient
            return compat.call_with_hooks(self.module, self._run, args, kwargs)
        return self._run(args, kwargs, ambient)

    def _obstacle(self) -> str:
        """What forbids any compiled call just now, in words; empty when nothing does."""
        return self.condemned or compat.eager_only(self.module) or self.changes_itself.get(self.module.training, "")

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], ambient: tuple[Any, ...] | None = None) -> Any:
        ambient = ambient or compat.ambient(self.module)
        sampled = self.options.sentinel is not None and self.options.sentinel.due()
        if self.steps is not None and not (args or sampled or self.options.check_every_call):
            step = self.steps.step(kwargs, (ambient, self.fingerprint.number))
            if step is not None:
                return step.run()
        call: Call | None = None
        try:
            call = self._bind(args, kwargs)
            entry = self._find(call) or self._compile(call)
            if self.forms is not None:
                self._prove(args, kwargs, entry)
            if sampled:
                self._compare(args, kwargs, entry)
            result = self._guarded(entry, call)
        except NotCompilable as reason:
            why = reason
        else:
            if self.steps is not None:
                structure = call.key[3]  # another thread may have found another one since
                self.steps.ran(self.module, kwargs, call, entry, (ambient, structure))
            return result
        return self._eager(why, call, self.module.forward, *args, **kwargs)

    def _prove(self, args: tuple[Any, ...], kwargs: dict[str, Any], entry: Entry) -> None:
        """Refuse a form of call for which the graph is not what the component's own forward is; looked at once."""
        assert self.forms is not None
        form, rows = self.forms.form(args, kwargs)
        place = (entry.number, form)
        if place not in self.proved and self.shelf is not None and self.shelf.proved(entry, form):
            self.proved[place] = ""
        if place not in self.proved:
            self.proved[place] = self._misfit(args, kwargs, entry, rows, TOLERANCE)
            if self.shelf is not None and not self.proved[place]:
                self.shelf.note_proof(entry, form)
        if self.proved[place]:
            raise PassingObstacle(f"the graph does not fit calls of this form: {self.proved[place]}")

    def _compare(self, args: tuple[Any, ...], kwargs: dict[str, Any], entry: Entry) -> None:
        """Compare a sampled call with eager; a component that is wrong once runs eager from then on."""
        rows = None if self.forms is None else self.forms.form(args, kwargs)[1]
        reason = self._misfit(args, kwargs, entry, rows, SENTINEL_TOLERANCE)
        if reason:
            self.condemned = f"the compiled graph is wrong: {reason}"
            emit("sentinel", self.name, f"turned off: {reason}", reason=reason, calls=self.calls)
            raise NotCompilable(self.condemned, remedy="Report the model and the versions; it runs eager until then.")

    def _misfit(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        entry: Entry,
        rows: torch.Tensor | None,
        tolerance: Mapping[torch.dtype, float],
    ) -> str:
        self._building.now = True
        try:
            return misfit(self.module, args, kwargs, lambda a, k: entry.run(self._bind(a, k)), rows, tolerance)
        finally:
            self._building.now = False

    @staticmethod
    def _guarded(entry: Entry, call: Call) -> Any:
        """Run an entry; an error that leaves the arguments as they were is told as eager would tell it."""
        if entry.written and (obstacle := entry.obstacle(call)):
            raise PassingObstacle(obstacle)
        try:
            return entry.run(call)
        except Exception as error:
            if entry.written or call.mutable:
                raise
            raise PassingObstacle(f"the compiled graph failed with {type(error).__name__}: {error}") from error

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        try:
            bound = self.binder.bind(self.module, args, kwargs)
        except NotCompilable:
            raise
        except Exception as error:  # eager says it better where the call is at fault, and runs where the binder is
            raise PassingObstacle(f"the call could not be made canonical: {first_line(error)}") from error
        structure = self._structure(look_again=bound.boundary or self.options.check_every_call)
        grad, inference, autocast, *ambient = compat.modes()
        extra = ((grad[1], inference[1], self.module.training, autocast[1]), structure, tuple(ambient))
        return make_call(bound.values, bound.label, extra, bound.fillers, bound.sizes, bound.example, bound.frequent)

    def _structure(self, *, look_again: bool) -> int:
        """The structure's number, looked at while no other thread captures: that changes the module for a moment."""
        if self._building.now:
            return self.fingerprint.current(look_again=look_again)
        while True:
            captures = self._captures
            if captures % 2 == 0:
                structure = self.fingerprint.current(look_again=look_again)
                if captures == self._captures:
                    return structure
            with self.lock:  # until the capture is over
                look_again = True

    def _find(self, call: Call) -> Entry | None:
        for entry in self.entries.get(call.key, ()):
            if entry.graph.accepts(call.leaves):
                return entry
        return None

    def _eager(self, why: NotCompilable, call: Call | None, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run eager and say why. A verdict is kept only when eager runs: else the mistake is in the call."""
        self.eager_calls += 1
        result = run(*args, **kwargs)
        if isinstance(why, ChangesItself):  # its key would be another one at every call
            self.changes_itself[self.module.training] = why.reason
        elif call is not None and not isinstance(why, PassingObstacle):
            self.refused.setdefault(_verdict(call), why.reason)
        if self.fallback != why.reason:
            self.fallback = why.reason
            found = self.failures.get(why.reason) or failure_of(why)
            if found.error and not isinstance(why, PassingObstacle):
                self.failures[why.reason] = found
            data = {"reason": why.reason, "remedy": why.remedy or found.remedy, **found.data()}
            emit("fallback", self.name, f"runs eager: {why.reason}", **data)
        return result

    # -- compiling ------------------------------------------------------------------------------------------------

    def _compile(self, call: Call) -> Entry:
        with self.lock:
            entry = self._find(call)  # another thread may have been here first
            if entry is not None:
                return entry
            if _verdict(call) in self.refused:
                raise NotCompilable(self.refused[_verdict(call)])
            hooked = hooked_below(self.module)
            if hooked:  # it may note something, of which a graph would do nothing and a trial run too much
                raise NotCompilable(f"{hooked} has a hook", remedy="Remove the hook to have the component compiled.")
            place = self.shelf.place(call) if self.shelf is not None else None
            if place is not None and place.shelf.shared() and not self.options.load_only:
                entry = self._with_ranks(call, place)
                if entry is not None:
                    return entry
            with place.locked() if place is not None else nullcontext():
                return self._load(call, place) or self._make(call, place)

    def _with_ranks(self, call: Call, place: Place) -> Entry | None:
        """The entry that one of the ranks has or makes; ``None`` where this one has to go on by itself."""
        found = entry_between_ranks(place, lambda: self._load(call, place), lambda: self._make(call, place))
        if found.refused and found.raised == CompileFault.__name__:
            raise CompileFault(f"{self.name}: {found.refused}")
        if found.refused:
            raise NotCompilable(found.refused)
        return found.entry

    def _load(self, call: Call, place: Place | None) -> Entry | None:
        """The entry that another process left in the store, if any."""
        entry = place.load() if place is not None else None
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
        for example, labels in self._examples(call):
            try:
                entry = self._build(call, example, labels)
            except ExampleUnfit as reason:
                why = reason
                continue
            if place is not None:
                place.save(entry, labels)
            if entry.graph.accepts(call.leaves):
                return entry
            # Kept for the sizes it holds for, but never run for this call.
            failing = "; ".join(entry.graph.accepts.failing(call.leaves)[:3])
            why = NotCompilable(f"the graph does not hold for these sizes: {failing}")
        assert why is not None
        raise why

    @property
    def shelf(self) -> Shelf | None:
        """The region's entries on disk; ``None`` where nothing is kept there."""
        store = self.options.store
        if store is not None and (self._shelf is None or self._shelf.store is not store):
            self._shelf = Shelf(store, self.module, self.options.lowered(), self.binder, self.name)
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
        tried = any(pattern(e.call.labels) == pattern(call.labels) for e in self.entries.get(call.key, ()))
        return [given] if tried else [general, given]

    def _build(self, call: Call, example: list[torch.Tensor], labels: Sequence[Labels]) -> Entry:
        started = time.perf_counter()
        self._building.now = True
        self._captures += 1
        try:
            with self.options.recording(), self.binder.tracing(self.module):
                entry = build_entry(self.module, call, example, labels, self.options.lowering(), self._count_capture)
            self.fingerprint.watch(call.key[3], entry.graph.watched)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            seconds, found = time.perf_counter() - started, failure_of(compat.original_error(error))
            reason = getattr(error, "reason", "") or found.cause
            emit("compile_failed", self.name, reason, reason=reason, seconds=seconds, **found.data())
            if isinstance(error, NotCompilable):
                raise
            self._fault(error)
        finally:
            self._captures += 1
            self._building.now = False
            self.compile_seconds += time.perf_counter() - started
        entry.seconds = time.perf_counter() - started
        self._add(call, entry)
        said = {"seconds": entry.seconds, "entry": entry.number, "road": entry.graph.road}
        said |= {"blocks": blocks} if (blocks := self._blocks()) else {}
        emit("compile_end", self.name, f"compiled in {entry.seconds:.1f} s", **said)
        if self.options.dump is not None:
            self.options.dump(self, entry)
        return entry

    def _add(self, call: Call, entry: Entry) -> None:
        entry.number = self.entry_count()
        self.entries.setdefault(call.key, []).append(entry)

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
            difference = self.difference(known[-1], call)
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
        """A capture or lowering that failed: eager, or ``on_fault="error"`` raises with the original as cause."""
        cause = compat.original_error(error)
        reason = f"compiling failed with {first_line(cause)}"
        if self.options.on_fault == "error":
            raise CompileFault(f"{self.name}: {reason}") from cause
        raise NotCompilable(reason, remedy=_REMEDIES.get(type(cause).__name__, "")) from cause

    # -- for others -----------------------------------------------------------------------------------------------

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Run the component eager inside the block."""
        self.forced_eager += 1
        try:
            yield
        finally:
            self.forced_eager -= 1

    def attach(self) -> None:
        compat.set_compiled_call_impl(self.module, self)
        self.fingerprint.attach()
        emit("attached", self.name, "calls go through the policy")

    def detach(self) -> None:
        if compat.compiled_call_impl(self.module) is self:
            compat.set_compiled_call_impl(self.module, None)
            self.fingerprint.detach()
            emit("removed", self.name, "calls go to the module again")

    def report(self) -> ComponentReport:
        return ComponentReport(
            role=self.role,
            qualname=self.qualname,
            cls=type(self.module).__name__,
            decision="compile",
            reason=self.reason,
            graphs=self.graphs,
            calls=self.calls,
            eager_calls=self.eager_calls,
            compile_seconds=round(self.compile_seconds, 3),
            fallback=self.fallback,
            loaded=self.loaded,
            blocks=self._blocks(),
        )

    def _blocks(self) -> str | None:
        """How the graph made last was divided, where it was."""
        entries = [e for found in self.entries.values() for e in found]
        blocks = entries[-1].graph.blocks if entries else None
        return str(blocks) if blocks is not None and blocks.instances else None


def _verdict(call: Call) -> Verdict:
    """What a verdict is about: the key, and which sizes of the call are equal to which."""
    return call.key, pattern(call.labels)


def region_of(module: torch.nn.Module) -> Region | None:
    """The region in front of ``module``, if any."""
    call = compat.compiled_call_impl(module)
    return call if isinstance(call, Region) else None
