"""The call path of one compiled component: bind -> key -> entry -> run; compile once; fall back.

A `Region` stands in front of one module instance. It never changes the module: calls reach it through the hook that
``nn.Module.compile`` uses, and whatever cannot be compiled runs the module's own call.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch

from compile_policy import compat
from compile_policy.call_key import Call, make_call
from compile_policy.config import CompilationConfig
from compile_policy.entry import Entry, build_entry
from compile_policy.errors import BudgetExceeded, CompileFault, NotCompilable
from compile_policy.events import emit
from compile_policy.example import Filler, examples
from compile_policy.fingerprint import Fingerprint
from compile_policy.lowering import Lowering, lower_with
from compile_policy.plan import ComponentReport
from compile_policy.shapes import ArgDims, Labels, infer_dynamic_arg_dims, labels_for

# Dynamo is not safe to enter from two threads; one capture at a time in the whole process.
_compile_lock = threading.RLock()


@dataclass(frozen=True)
class RegionOptions:
    """What the configuration says about a region."""

    backend: str = "inductor"
    max_entries: int = 8
    on_budget: str = "warn"
    on_fault: str = "eager"
    autotune: bool = False
    dump: Callable[[Region, Entry], None] | None = None

    @classmethod
    def from_config(
        cls, config: CompilationConfig, dump: Callable[[Region, Entry], None] | None = None
    ) -> RegionOptions:
        return cls(config.backend, config.max_entries, config.on_budget, config.on_fault, config.mode == 3, dump)

    def lowering(self) -> Lowering:
        return lower_with(self.backend, autotune=self.autotune)


@dataclass(frozen=True)
class Bound:
    """A call's arguments by name, made canonical.

    Attributes:
        values: name -> argument, in a fixed order.
        label: labels of a tensor argument, from its path.
        fillers: path -> how to fill the example, where random values would not do.
        sizes: label -> size in the example, where a size of its own would not do.
        example: makes the whole example call, where its tensors have to fit together; used instead of fillers.
        boundary: whether this call starts a sequence, so that the structure is looked at again.
    """

    values: Mapping[str, Any]
    label: Callable[[str, torch.Tensor], Labels]
    fillers: Mapping[str, Filler] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    example: Callable[[], Mapping[str, Any]] | None = None
    boundary: bool = True


class Binder(Protocol):
    """Makes a component's call canonical. A backend has one per kind of component."""

    def bind(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """Raises NotCompilable when this call has to run eager."""

    def tracing(self, module: torch.nn.Module) -> Any:
        """A context manager in which the component is traced."""


class SignatureBinder:
    """Binds by the signature of ``forward``; dynamic dims as declared or inferred."""

    def __init__(self, dims: ArgDims) -> None:
        self.dims = dims

    @classmethod
    def inferred(cls, module_cls: type) -> SignatureBinder:
        return cls(infer_dynamic_arg_dims(module_cls))

    def bind(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        try:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise NotCompilable(f"the call does not fit the signature: {error}") from None
        values: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                values.update(value)
            elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
                raise NotCompilable(f"forward takes {name} by position only; pass it by name to have it compiled")
            else:
                values[name] = value
        return Bound(values, self._label)

    def _label(self, path: str, tensor: torch.Tensor) -> Labels:
        name = path.split("[")[0].split(".")[0]
        dims = self.dims.get(name)
        return labels_for(tensor, dims, path) if dims else (None,) * tensor.dim()

    @contextmanager
    def tracing(self, module: torch.nn.Module) -> Iterator[None]:
        yield


class Region:
    """One compiled component instance: its entries, its lock and its counters."""

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
        self.refused: dict[tuple[Any, ...], str] = {}
        self.fingerprint = Fingerprint(module)
        self.lock = _compile_lock
        self.forced_eager = 0
        self.graphs = self.calls = self.eager_calls = 0
        self.compile_seconds = 0.0
        self.fallback: str | None = None

    @property
    def name(self) -> str:
        return f"{self.role} {self.qualname}".strip()

    # -- the path of a call ---------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return compat.plain_call(self.module, *args, **kwargs)
        if self.forced_eager:
            return compat.plain_call(self.module, *args, **kwargs)
        self.calls += 1
        try:
            call = self._bind(args, kwargs)
            entry = self._find(call) or self._compile(call)
        except NotCompilable as why:
            return self._eager(why, args, kwargs)
        return entry.run(call)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        bound = self.binder.bind(self.module, args, kwargs)
        structure = self.fingerprint.current(look_again=bound.boundary)
        modes = (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            self.module.training,
            compat.autocast_state(),
        )
        return make_call(bound.values, bound.label, (modes, structure), bound.fillers, bound.sizes, bound.example)

    def _find(self, call: Call) -> Entry | None:
        for entry in self.entries.get(call.key, ()):
            if entry.graph.accepts(call.leaves):
                return entry
        return None

    def _eager(self, why: NotCompilable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.eager_calls += 1
        if self.fallback != why.reason:
            self.fallback = why.reason
            emit("fallback", self.name, f"runs eager: {why.reason}", reason=why.reason, remedy=why.remedy)
        return compat.plain_call(self.module, *args, **kwargs)

    # -- compiling ------------------------------------------------------------------------------------------------

    def _compile(self, call: Call) -> Entry:
        with self.lock:
            entry = self._find(call)  # another thread may have been here first
            if entry is not None:
                return entry
            if call.key in self.refused:
                raise NotCompilable(self.refused[call.key])
            self._check_budget()
            self._announce(call)
            for example, labels in self._examples(call):
                entry = self._build(call, example, labels)
                if entry.graph.accepts(call.leaves):
                    return entry
            # Kept for the sizes it holds for, but never run for this call, and not tried again.
            reason = (
                f"the graph does not hold for these sizes: {'; '.join(entry.graph.accepts.failing(call.leaves)[:3])}"
            )
            self.refused[call.key] = reason
            raise NotCompilable(reason)

    def _examples(self, call: Call) -> Iterator[tuple[list[torch.Tensor], Sequence[Labels]]]:
        if call.example is None:
            return examples(call)
        made = make_call(call.example(), call.label)
        return iter([(made.leaves, call.labels)])

    def _build(self, call: Call, example: list[torch.Tensor], labels: Sequence[Labels]) -> Entry:
        started = time.perf_counter()
        try:
            with self.pause(), self.binder.tracing(self.module):
                entry = build_entry(self.module, call, example, labels, self.options.lowering(), self._count_capture)
        except NotCompilable as why:
            self.refused[call.key] = why.reason
            raise
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self._fault(call, error)
        finally:
            self.compile_seconds += time.perf_counter() - started
        entry.seconds = time.perf_counter() - started
        self.entries.setdefault(call.key, []).append(entry)
        emit("compile_end", self.name, f"compiled in {entry.seconds:.1f} s", seconds=entry.seconds)
        if self.options.dump is not None:
            self.options.dump(self, entry)
        return entry

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
            difference = self._difference(known[-1], call)
            emit("new_entry", self.name, f"another graph is needed: {difference}", difference=difference)

    def _difference(self, entry: Entry, call: Call) -> str:
        """What made another graph necessary, in words."""
        (modes, structure), (modes_now, structure_now) = entry.call.key[2:], call.key[2:]
        if structure != structure_now:
            return f"{self.fingerprint.difference(structure, structure_now)} changed"
        if modes != modes_now:
            return f"(grad, inference, training, autocast) are {modes_now}, were {modes}"
        return entry.difference(call)

    def _fault(self, call: Call, error: BaseException) -> NoReturn:
        """Remember that this key cannot be compiled; ``on_fault="error"`` raises the original."""
        cause = compat.original_error(error)
        first_line = (str(cause).strip().splitlines() or [""])[0]
        reason = f"compiling failed with {type(cause).__name__}: {first_line[:300]}"
        self.refused[call.key] = reason
        if self.options.on_fault == "error":
            raise CompileFault(f"{self.name}: {reason}") from error
        raise NotCompilable(reason) from error

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
        emit("attached", self.name, "calls go through the policy")

    def detach(self) -> None:
        if compat.compiled_call_impl(self.module) is self:
            compat.set_compiled_call_impl(self.module, None)
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
        )


def region_of(module: torch.nn.Module) -> Region | None:
    """The region in front of ``module``, if any."""
    call = compat.compiled_call_impl(module)
    return call if isinstance(call, Region) else None
