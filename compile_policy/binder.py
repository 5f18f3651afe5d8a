"""How a call of a component becomes named arguments with labels; a backend has a `Binder` per kind of component."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from compile_policy.annotations import written
from compile_policy.caller import warn_user
from compile_policy.errors import DecorationError, NotCompilable
from compile_policy.example import Filler
from compile_policy.shapes import ArgDims, Labels, forward_of, infer_dynamic_arg_dims, labels_for


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
        frequent: label -> size in most calls, where one is worth code of its own.
        finish: makes the component's result of that of the graph, where it is more.
    """

    values: Mapping[str, Any]
    label: Callable[[str, torch.Tensor], Labels]
    fillers: Mapping[str, Filler] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    example: Callable[[], Mapping[str, Any]] | None = None
    boundary: bool = True
    frequent: Mapping[str, int] = field(default_factory=dict)
    finish: Callable[[Any], Any] | None = None


class Binder(Protocol):
    """Makes a component's call canonical. A backend has one per kind of component."""

    def bind(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """Raises NotCompilable when this call has to run eager."""

    def tracing(self, module: torch.nn.Module) -> Any:
        """A context manager in which the component is traced."""


class StepFailed(Exception):
    """A step's graph failed before anything was written: the call takes the ordinary road."""


class Step(Protocol):
    """A call that was recognised."""

    def run(self) -> Any:
        """Raises StepFailed."""


@runtime_checkable
class StepBinder(Binder, Protocol):
    """A binder that recognises a call that only continues the last one, and takes a shorter road for it."""

    def step(self, kwargs: dict[str, Any], here: tuple[Any, ...]) -> Step | None:
        """Such a step, ready to run; ``None`` for any other call.

        Args:
            here: modes and structure round the call.
        """

    def ran(
        self, module: torch.nn.Module, kwargs: dict[str, Any], call: Any, entry: Any, here: tuple[Any, ...]
    ) -> None:
        """Told of every call that an entry has run on the ordinary road."""

    def forget_steps(self) -> None:
        """Told that the entries are gone."""


@runtime_checkable
class FormBinder(Binder, Protocol):
    """A binder that changes what a call says, so that every form of call is proved once (`proof.misfit`)."""

    def form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Hashable, torch.Tensor | None]:
        """What kind of call this is, and which positions of its result count: (batch, sequence), ``None`` for all."""


#: The dims of an argument that was inferred to hold tensors.
_INFERRED = {0: None}


class SignatureBinder:
    """Binds by the signature of ``forward``; dynamic dims as declared or inferred."""

    def __init__(self, dims: ArgDims, inferred_for: type | None = None) -> None:
        """Take the dims; ``inferred_for`` is the class from whose annotations they come, if they do."""
        self.dims = dims
        self._inferred_for = inferred_for
        self._warned: set[str] = set()
        self._known: tuple[Any, inspect.Signature] | None = None

    @classmethod
    def inferred(cls, module_cls: type) -> SignatureBinder:
        """Return a binder with the dims that the annotations of a class's ``forward`` give.

        Raises:
            DecorationError: no argument is annotated as a tensor.
        """
        return cls(infer_dynamic_arg_dims(module_cls), module_cls)

    def bind(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        try:
            bound = self._signature(module).bind(*args, **kwargs)
        except TypeError as error:
            raise NotCompilable(f"the call does not fit the signature: {error}") from None
        values: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                values.update(value)
            elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
                raise NotCompilable(f"forward takes {name} by position only; pass it by name to have it compiled")
            elif value is not bound.signature.parameters[name].default:  # f(x) and f(x, None) are one call
                values[name] = value
        return Bound(values, self._label)

    def _signature(self, module: torch.nn.Module) -> inspect.Signature:
        """Kept until ``forward`` is another function: asking costs more than the rest of the call."""
        forward = module.__dict__.get("forward") or type(module).forward
        known = self._known
        if known is None or known[0] is not forward:
            known = self._known = (forward, inspect.signature(module.forward))
        return known[1]

    def _label(self, path: str, tensor: torch.Tensor) -> Labels:
        name = path.split("[")[0].split(".")[0]
        dims = self.dims.get(name)
        if not dims:
            self._warn_of_static(name, path, tensor)
            return (None,) * tensor.dim()
        if tensor.dim() == 0 and self._inferred_for is not None and dims == _INFERRED:
            return ()  # nobody said that this one has dims
        try:
            return labels_for(tensor, dims, path)
        except DecorationError as error:  # perhaps the caller's mistake, and then eager says so better
            raise NotCompilable(error.message, remedy=error.remedy) from None

    def _warn_of_static(self, name: str, path: str, tensor: torch.Tensor) -> None:
        """Warn, once an argument, that it holds a tensor although its annotation does not say so."""
        cls = self._inferred_for
        if cls is None or tensor.dim() == 0 or name in self._warned:
            return
        self._warned.add(name)
        annotation = written(forward_of(cls), name)
        found = "it has no annotation"
        if annotation:
            found = f"its annotation `{annotation}` does not say so"
        better = "torch.Tensor"
        if path != name:
            better = "list[torch.Tensor]"
        dims = dict.fromkeys([*self.dims, name], 0)
        warn_user(
            f"argument {name} of {cls.__qualname__}.forward holds a tensor, and {found}: its sizes are "
            f"static. Each other size is compiled again, or runs eager where it has to agree with a "
            f"dynamic one. Annotate the argument (for example `{name}: {better}`), or decorate the "
            f"class with support_torch_compile(dynamic_arg_dims={dims})."
        )

    @contextmanager
    def tracing(self, module: torch.nn.Module) -> Iterator[None]:
        yield
