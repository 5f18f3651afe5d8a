"""What a tower computes from the grid of its pictures, or the lengths of its sounds, outside the graph.

Positions, window orders and sequence lengths depend on the values of a grid, in Python and with sizes that only the
values tell. Transformers' own layout functions compute them (``get_vision_...`` and others that take ``kwargs``), and
take a result that is handed back to the tower as a keyword argument. An eager run of the tower on small inputs shows
which of them it calls and with what; from then on they are called before the graph, with the arguments of each call.
No model code is changed.
"""

from __future__ import annotations

import linecache
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from compile_policy.errors import NotCompilable
from compile_policy.unseen import probed
from compile_policy_transformers.origins import Derived, origin

#: Stands for every longest length: the varlen operator reads lengths from the tensor, a number would be a constant.
ANY_LENGTH = 1 << 20
_LENGTH = "get_max_seqlen"
_lock = threading.RLock()


@dataclass(frozen=True)
class Step:
    """One call of a layout function.

    Attributes:
        function: the function.
        given: its arguments by position or name; tensors are `Derived` from the arguments of the call.
        names: keyword arguments of the tower under which the results are handed back.
    """

    function: Callable[..., Any]
    given: tuple[tuple[int | str, Any], ...]
    names: tuple[str, ...]

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if self.function.__name__ == _LENGTH:
            return dict.fromkeys(self.names, ANY_LENGTH)
        arguments = {place: v.of(values) if isinstance(v, Derived) else v for place, v in self.given}
        positional = [arguments[i] for i in range(sum(isinstance(place, int) for place in arguments))]
        named = {place: value for place, value in arguments.items() if isinstance(place, str)}
        brought = {name: values[name] for name in self.names if name in values}
        return _named(self.names, self.function(*positional, **named, kwargs=brought))


class Prologue:
    """The layout functions that a tower calls.

    Attributes:
        reads: class, file, line and code where the tower turns a grid into numbers outside of them; usually empty.
    """

    def __init__(self, steps: tuple[Step, ...], reads: str = "") -> None:
        self.steps = steps
        self.reads = reads

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prologue) and self.steps == other.steps

    __hash__ = None  # type: ignore[assignment]

    @property
    def names(self) -> frozenset[str]:
        """The keyword arguments that `run` makes."""
        return frozenset(name for step in self.steps for name in step.names)

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Layout of the pictures of a call, by keyword argument; ``values`` are its arguments by name."""
        layout: dict[str, Any] = {}
        for step in self.steps:
            layout.update(step.run({**values, **layout}))
        return layout


def learn(tower: torch.nn.Module, values: Mapping[str, Any]) -> Prologue:
    """Run ``tower(**values)`` and note the layout functions that it calls.

    Raises:
        NotCompilable: the tower hands something to a layout function that is not known to come from the call, or asks
            for two layouts under one name.
        Exception: whatever the tower raises on these pictures.
    """
    seen: list[Step] = []
    reads = NumbersRead()
    with _lock, _noting(tower, values, seen, reads):

        def run() -> None:
            with reads:
                tower.forward(**values)  # hooks of the tower itself run round the whole call

        try:
            probed(tower, run)
        except NotCompilable:
            raise
        except Exception:
            if not _on_meta(tower):  # without weights only what was called so far is known
                raise
    steps: list[Step] = []
    for step in seen:
        known_names = {name for known in steps for name in known.names}
        if step in steps or (step.function.__name__ == _LENGTH and known_names.issuperset(step.names)):
            continue
        if known_names.intersection(step.names):
            raise NotCompilable(f"{type(tower).__name__} computes {' and '.join(step.names)} in two ways")
        steps.append(step)
    return Prologue(tuple(steps), reads.place)


def layout_functions(tower: torch.nn.Module) -> dict[str, Callable[..., Any]]:
    """The layout functions that the module of ``tower`` has, by name."""
    namespace = vars(sys.modules[type(tower).__module__])
    return {n: f for n, f in namespace.items() if n.startswith("get_vision_") or n == _LENGTH or _takes_results(f)}


def _takes_results(function: Any) -> bool:
    """Whether results computed beforehand can be handed in, as a dictionary called ``kwargs``."""
    if not isinstance(function, FunctionType):
        return False
    code = function.__code__
    return "kwargs" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


@contextmanager
def _noting(tower: torch.nn.Module, values: Mapping[str, Any], seen: list[Step], reads: NumbersRead) -> Iterator[None]:
    """Note the calls of layout functions that this thread makes."""
    thread = threading.get_ident()
    namespace = vars(sys.modules[type(tower).__module__])
    functions = layout_functions(tower)
    made: dict[str, Any] = {}

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, kwargs: dict[str, Any] | None = None, **named: Any) -> Any:
            if threading.get_ident() != thread or kwargs is None:
                return function(*args, **named) if kwargs is None else function(*args, **named, kwargs=kwargs)
            asked = _Asked(kwargs)
            with reads.allowed():
                result = function(*args, **named, kwargs=asked)
            for name in asked.names:
                kwargs.pop(name, None)
            arguments: dict[int | str, Any] = {**dict(enumerate(args)), **dict(named.items())}
            seen.append(_step(tower, function, arguments, tuple(asked.names), {**values, **made}))
            if function.__name__ != _LENGTH:
                made.update(_named(tuple(asked.names), result))
            return result

        return call

    try:
        namespace.update({name: noting(function) for name, function in functions.items()})
        yield
    finally:
        namespace.update(functions)


class NumbersRead(TorchFunctionMode):
    """Notes where a grid is turned into numbers, or gone through row by row; entered round a call.

    Attributes:
        place: the last such place: class, file, line and code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.place = ""
        self._allowed = False

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """A part of the call that runs outside the graph."""
        before, self._allowed = self._allowed, True
        try:
            yield
        finally:
            self._allowed = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        watched = func in (torch.Tensor.tolist, torch.Tensor.__iter__) and not self._allowed
        if watched and args[0].dim() == 2:
            self.place = _place(sys._getframe(1))
        return func(*args, **(kwargs or {}))


def _place(frame: Any) -> str:
    folder = os.path.dirname(torch.__file__)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(folder):
        frame = frame.f_back
    file, line = frame.f_code.co_filename, frame.f_lineno
    owner = type(frame.f_locals["self"]).__name__ + ", " if "self" in frame.f_locals else ""
    return f"{owner}{os.path.basename(file)}:{line}: {linecache.getline(file, line).strip()}"


class _Asked(dict[str, Any]):
    """Keyword arguments that note which of them are asked for."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__(given)
        self.names: dict[str, None] = {}

    def pop(self, name: str, *default: Any) -> Any:
        self.names[name] = None
        return super().pop(name, *default)


def _step(
    tower: torch.nn.Module,
    function: Callable[..., Any],
    arguments: Mapping[int | str, Any],
    names: tuple[str, ...],
    values: Mapping[str, Any],
) -> Step:
    given: list[tuple[int | str, Any]] = []
    for place, value in arguments.items() if function.__name__ != _LENGTH else ():
        found = origin(value, values) if isinstance(value, torch.Tensor) else value
        if found is None and value is not None:
            raise NotCompilable(f"{type(tower).__name__} hands {function.__name__} a tensor that it computes itself")
        given.append((place, found))
    return Step(function, tuple(given), names)


def _named(names: tuple[str, ...], result: Any) -> dict[str, Any]:
    parts = result if isinstance(result, tuple) else (result,)
    layout = dict(zip(names, parts, strict=True))
    return {name: ANY_LENGTH if name.startswith("max_") else v for name, v in layout.items()}


def _on_meta(tower: torch.nn.Module) -> bool:
    return any(p.is_meta for p in tower.parameters())
