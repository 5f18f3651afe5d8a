"""The call path of one compiled component: bind -> key -> entry -> run; compile once; fall back.

A `Region` stands in front of one module instance. It never changes the module: calls reach it through the hook that
``nn.Module.compile`` uses, and whatever cannot be compiled runs the module's own call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from compile_policy import compat
from compile_policy.binder import Binder as Binder
from compile_policy.binder import Bound as Bound
from compile_policy.binder import FormBinder, Step, StepFailed
from compile_policy.binder import SignatureBinder as SignatureBinder
from compile_policy.binder import StepBinder as StepBinder
from compile_policy.call_key import Call, make_call
from compile_policy.caller import warn_user
from compile_policy.effects import ChangesItself
from compile_policy.entries import PassingObstacle
from compile_policy.entry import Entry
from compile_policy.errors import CompileFault, InternalError, NotCompilable, PolicyWarning, first_line
from compile_policy.events import emit
from compile_policy.failure import Failure, failure_of, of_this_package
from compile_policy.fallbacks import Fallbacks, in_words
from compile_policy.options import RegionOptions as RegionOptions
from compile_policy.plan import ComponentReport, State
from compile_policy.proof import Answer
from compile_policy.proved import NO_MEMORY, Misfit, ProvedEntries
from compile_policy.sentinel import TOLERANCE as SENTINEL_TOLERANCE
from compile_policy.verdicts import Remembered

WRONG = "the compiled graph is wrong"
SENTINEL_REMEDY = "Report the model and the versions; it runs eager until the policy is applied again."
#: What to do about a fallback for which nothing better is known.
ORDINARY_REMEDY = "Its results are eager's; report the model and this call if it should be compiled."

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
        decorated: bool = False,
    ) -> None:
        super().__init__(module, f"{role} {qualname}".strip(), binder, options or RegionOptions())
        self.role = role
        self.qualname = qualname
        self.reason = reason
        self.decorated = decorated  # by the user's `support_torch_compile`, not by a plan
        self.condemned = self.options.unsupported  # or, later, what the sentinel found
        self.changes_itself: dict[bool, str] = {}  # by training flag
        self._changed: Counter[bool] = Counter()  # calls that did, by training flag
        self.steps = binder if isinstance(binder, StepBinder) else None
        self.forms = binder if isinstance(binder, FormBinder) else None
        self.forced_eager = 0
        self.calls = self.eager_calls = 0
        self.fallback: str | None = None
        self.fallbacks = Fallbacks()
        self.remedy = ""  # of the last fallback
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
                remedy = SENTINEL_REMEDY if self.condemned.startswith(WRONG) else compat.remedy_of(obstacle)
                why = NotCompilable(obstacle, remedy=remedy)
                return self._eager(why, None, compat.plain_call, self.module, *args, **kwargs)
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
            step = self._step(kwargs, ambient)
            if step is not None:
                try:
                    return step.run()
                except StepFailed:
                    pass
        call: Call | None = None
        try:
            form = self._form(args, kwargs)  # as given: binding fills lazy caches
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
                self._ran(self.steps, kwargs, call, entry, ambient)
            return result
        return self._eager(why, call, self.module.forward, *args, **kwargs)

    # Whatever goes wrong in the steps of a call is a reason to run it eager, and no exception of the caller's call.

    def _step(self, kwargs: dict[str, Any], ambient: tuple[Any, ...]) -> Step | None:
        assert self.steps is not None
        try:
            return self.steps.step(kwargs, (ambient, self.fingerprint.number))
        except Exception as error:
            self.remark(InternalError("a decode step was recognised", error))
            return None

    def _form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Hashable, torch.Tensor | None] | None:
        try:
            return None if self.forms is None else self.forms.form(args, kwargs)
        except (NotCompilable, PolicyWarning):
            raise
        except Exception as error:
            raise _unfit("the form of the call was looked at", error) from error

    def _ran(
        self, steps: StepBinder, kwargs: dict[str, Any], call: Call, entry: Entry, ambient: tuple[Any, ...]
    ) -> None:
        structure = call.key[3]  # another thread may have found another one since
        try:
            steps.ran(self.module, kwargs, call, entry, (ambient, structure))
        except Exception as error:
            self.remark(InternalError("a decode step was remembered", error))

    def _given(self, answer: Answer, why: NotCompilable | None, call: Call) -> Any:
        """Hand on what eager answered to a call on which the entry was compared with it."""
        if answer.reason and why is not None:
            return self._eager(why, call, lambda: answer.result)
        if not answer.known:
            return self._eager(PassingObstacle(NO_MEMORY), call, lambda: answer.result)
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
        self.condemned = f"{WRONG}: {difference}"
        emit("sentinel", self.name, f"turned off: {difference}", reason=difference, calls=self.calls)
        return NotCompilable(self.condemned, remedy=SENTINEL_REMEDY)

    def _guarded(self, entry: Entry, call: Call) -> Any:
        """Run an entry; an error that leaves the arguments as they were is told as eager would tell it."""
        if entry.written and (obstacle := entry.obstacle(call)):
            raise PassingObstacle(obstacle)
        try:
            return entry.run(call)
        except Exception as error:
            if entry.written or call.mutable:
                error.add_note(
                    f"raised by the compiled graph of {self.name}, which may have written into its arguments"
                )
                raise
            raise PassingObstacle(f"the compiled graph failed with {first_line(error)}") from error

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
        except (NotCompilable, PolicyWarning):
            raise
        except Exception as error:  # eager says it better where the call is at fault, and runs where the binder is
            raise _unfit("the call was made canonical", error) from error

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
        """Run eager and say why. A verdict is kept only when eager runs: else the mistake is in the call.

        Raises:
            CompileFault: with ``on_fault="error"``, once eager has run; what eager raises is passed on as it is.
        """
        self.eager_calls += 1
        result = run(*args, **kwargs)
        if isinstance(why, ChangesItself):  # its key would be another one at every call
            self._changed[self.module.training] += 1
            if why.always or self._changed[self.module.training] > 1:
                self.changes_itself[self.module.training] = why.reason
        elif call is not None and not isinstance(why, (PassingObstacle, Remembered)):
            self.refuse(call, why)
        self._tell(why)
        return result

    def _tell(self, why: NotCompilable) -> None:
        """Count a fallback; say of the first for each reason what is the matter and what would change it.

        Raises:
            CompileFault: with ``on_fault="error"``, for every one.
            PolicyWarning: where the user's filters make it an error.
        """
        try:
            found = self.failures.get(why.reason) or failure_of(why)
        except Exception:  # of a library that makes odd exceptions; the reason itself is known
            found = Failure(cause=why.reason)
        if found.error and not isinstance(why, PassingObstacle):
            self.failures[why.reason] = found
        first = self.fallbacks.add(why.reason, why.about)
        self.fallback, self.remedy = why.reason, why.remedy or found.remedy or ORDINARY_REMEDY
        if first:
            data = {"reason": why.reason, "remedy": self.remedy, **found.data()}
            emit("fallback", self.name, f"runs eager: {why.reason}", **data)
        if self.options.on_fault == "error":
            raise CompileFault(f"{self.name}: {why.reason}. {self.remedy}") from (why.__cause__ or why)
        if first:
            warn_user(in_words(self.name, why.reason, self.remedy), otherwise=self.place)

    # -- for others -----------------------------------------------------------------------------------------------

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Run the component eager inside the block."""
        self.forced_eager += 1
        try:
            yield
        finally:
            self.forced_eager -= 1

    def forget(self) -> None:
        super().forget()
        if isinstance(self.binder, StepBinder):
            self.binder.forget_steps()

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
            state=self.state(),
            fallbacks=self.fallbacks.counts(),
            retries=self.refused.retries,
            remedy=self.remedy,
        )

    def state(self) -> State:
        """What the component does in effect, whatever the plan says."""
        if len(self.fallbacks):
            return "fell back"
        return "compiled" if self.entries and self.calls > self.eager_calls else "idle"


def _unfit(doing: str, error: Exception) -> NotCompilable:
    """Why a call has no canonical form; nothing is concluded for the next, since the mistake may be the caller's."""
    if of_this_package(error):
        return InternalError(doing, error)
    return PassingObstacle(f"it failed while {doing}: {first_line(error)}")


def region_of(module: torch.nn.Module) -> Region | None:
    """The region in front of ``module``, if any."""
    call = compat.compiled_call_impl(module)
    return call if isinstance(call, Region) else None
