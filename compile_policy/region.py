"""The call path of one compiled component: bind -> key -> entry -> run; compile once; fall back.

A `Region` stands in front of one module instance. It never changes the module: calls reach it through the hook that
``nn.Module.compile`` uses, and whatever cannot be compiled runs the module's own call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from compile_policy import compat
from compile_policy.binder import Binder as Binder
from compile_policy.binder import Bound as Bound
from compile_policy.binder import FormBinder
from compile_policy.binder import SignatureBinder as SignatureBinder
from compile_policy.binder import StepBinder as StepBinder
from compile_policy.call_key import Call, make_call
from compile_policy.effects import ChangesItself
from compile_policy.entries import PassingObstacle
from compile_policy.entry import Entry
from compile_policy.errors import NotCompilable, first_line
from compile_policy.events import emit
from compile_policy.failure import Failure, failure_of
from compile_policy.options import RegionOptions as RegionOptions
from compile_policy.plan import ComponentReport
from compile_policy.proof import Answer
from compile_policy.proved import Misfit, ProvedEntries
from compile_policy.sentinel import TOLERANCE as SENTINEL_TOLERANCE

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class Region(ProvedEntries):
    """One compiled component instance: the way of its calls to its entries, or to eager."""

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
        super().__init__(module, f"{role} {qualname}".strip(), binder, options or RegionOptions())
        self.role = role
        self.qualname = qualname
        self.reason = reason
        self.condemned = self.options.unsupported  # or, later, what the sentinel found
        self.changes_itself: dict[bool, str] = {}  # by training flag
        self._changed: Counter[bool] = Counter()  # calls that did, by training flag
        self.steps = binder if isinstance(binder, StepBinder) else None
        self.forms = binder if isinstance(binder, FormBinder) else None
        self.forced_eager = 0
        self.calls = self.eager_calls = 0
        self.fallback: str | None = None
        self.failures: dict[str, Failure] = {}  # by reason
        self._allowed: tuple[Any, ...] | None = None  # what was ambient when no obstacle was found last

    # -- the path of a call ---------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_dynamo_compiling() or self.forced_eager or self.building.now:
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
            form = None if self.forms is None else self.forms.form(args, kwargs)  # as given: binding fills lazy caches
            call = self.bind(args, kwargs)
            entry, answer = self.proved_entry(args, kwargs, call, form)
            if answer is not None:
                return self._given(answer, Misfit(answer.reason), call)
            if sampled and (answer := self._compare(args, kwargs, entry)) is not None:
                return self._given(answer, self._condemn(answer.reason) if answer.reason else None, call)
            result = self._guarded(entry, call)
        except NotCompilable as reason:
            why = reason
        else:
            if self.steps is not None:
                structure = call.key[3]  # another thread may have found another one since
                self.steps.ran(self.module, kwargs, call, entry, (ambient, structure))
            return result
        return self._eager(why, call, self.module.forward, *args, **kwargs)

    def _given(self, answer: Answer, why: NotCompilable | None, call: Call) -> Any:
        """Hand on what eager answered to a call on which the entry was compared with it."""
        if answer.reason and why is not None:
            return self._eager(why, call, lambda: answer.result)
        self.eager_calls += not answer.known
        return answer.result

    def _compare(self, args: tuple[Any, ...], kwargs: dict[str, Any], entry: Entry) -> Answer | None:
        """A sampled call's own answer, compared with the entry's.

        Raises:
            NotCompilable: the entry is wrong, and the call has no answer yet.
        """
        rows = None if self.forms is None else self.forms.form(args, kwargs)[1]
        try:
            return self.answer(args, kwargs, entry, rows, SENTINEL_TOLERANCE)
        except Misfit as misfit:
            raise self._condemn(misfit.difference) from misfit

    def _condemn(self, difference: str) -> NotCompilable:
        """Turn the component off: one that is wrong once runs eager from then on."""
        self.condemned = f"the compiled graph is wrong: {difference}"
        emit("sentinel", self.name, f"turned off: {difference}", reason=difference, calls=self.calls)
        return NotCompilable(self.condemned, remedy="Report the model and the versions; it runs eager until then.")

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

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        try:
            bound = self.binder.bind(self.module, args, kwargs)
            structure = self._structure(look_again=bound.boundary or self.options.check_every_call)
            grad, inference, autocast, *ambient = compat.modes()
            extra = ((grad[1], inference[1], self.module.training, autocast[1]), structure, tuple(ambient))
            return make_call(
                *(bound.values, bound.label, extra, bound.fillers, bound.sizes, bound.example, bound.frequent),
                finish=bound.finish,
            )
        except NotCompilable:
            raise
        except Exception as error:  # eager says it better where the call is at fault, and runs where the binder is
            raise PassingObstacle(f"the call could not be made canonical: {first_line(error)}") from error

    def _structure(self, *, look_again: bool) -> int:
        """The structure's number, looked at while no other thread captures: that changes the module for a moment."""
        if self.building.now:
            return self.fingerprint.current(look_again=look_again)
        while True:
            captures = self.captures
            if captures % 2 == 0:
                structure = self.fingerprint.current(look_again=look_again)
                if captures == self.captures:
                    return structure
            with self.lock:  # until the capture is over
                look_again = True

    def _eager(self, why: NotCompilable, call: Call | None, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run eager and say why. A verdict is kept only when eager runs: else the mistake is in the call."""
        self.eager_calls += 1
        result = run(*args, **kwargs)
        if isinstance(why, ChangesItself):  # its key would be another one at every call
            self._changed[self.module.training] += 1
            if why.always or self._changed[self.module.training] > 1:
                self.changes_itself[self.module.training] = why.reason
        elif call is not None and not isinstance(why, PassingObstacle):
            self.refuse(call, why)
        if self.fallback != why.reason:
            self.fallback = why.reason
            found = self.failures.get(why.reason) or failure_of(why)
            if found.error and not isinstance(why, PassingObstacle):
                self.failures[why.reason] = found
            data = {"reason": why.reason, "remedy": why.remedy or found.remedy, **found.data()}
            emit("fallback", self.name, f"runs eager: {why.reason}", **data)
        return result

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
            blocks=self.blocks(),
        )


def region_of(module: torch.nn.Module) -> Region | None:
    """The region in front of ``module``, if any."""
    call = compat.compiled_call_impl(module)
    return call if isinstance(call, Region) else None
