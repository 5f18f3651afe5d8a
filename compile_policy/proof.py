"""A form of call is proved once: the caller's own call run eager, and the same call through the binder and the graph.

An entry is compared with eager when it is built, on the canonical call. Whether the canonical call means what the
caller's did, only the caller's call can tell: a decoder that derives positions from the padding mask, say, where the
binder counts tokens. So the first call of every form (which arguments are given, of what kind) runs both ways: the
graph on copies, and then the component itself on the caller's own arguments. What the caller gets is eager's, and
everything that the call leaves behind is what eager leaves.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compile_policy import compat
from compile_policy.entry import Entry
from compile_policy.errors import InternalError, first_line
from compile_policy.gradients import TOLERANCE as GRADIENT_TOLERANCE
from compile_policy.gradients import (
    comparable,
    cotangents_of,
    gradient_difference,
    gradients_of,
    wanted_of,
)
from compile_policy.random_state import drawn_states, same_states, seed_for_comparison
from compile_policy.reference import TOLERANCE, relative_error, tolerances
from compile_policy.stand_ins import Substitutes
from compile_policy.unseen import Unseen, refuse_hooks, unseen

OTHER_NUMBERS = "it draws other random numbers than eager"
_DEPTH = 6
_NO_MEMORY = (torch.OutOfMemoryError, MemoryError)
#: Runs a call through the graph, given positional and keyword arguments, the `Unseen` and the `Substitutes`.
Run = Callable[..., Any]


def form_of(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Which arguments a call gives and of what kind, without their sizes and numbers. Hashable."""
    return tuple((name, _kind(value)) for name, value in sorted(values.items()) if value is not None)


def _kind(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.dim(), value.dtype)
    if isinstance(value, Mapping):
        return tuple((str(k), _kind(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(_kind(v) for v in value))
    return value if isinstance(value, (bool, str, type(None))) else type(value)


@dataclass(frozen=True)
class Answer:
    """What the component itself made of a call that was compared.

    Attributes:
        result: eager's, for the caller.
        reason: how the graph differs, in words; empty when it does not.
        known: whether that can be said: ``False`` where there was no memory for a second run.
    """

    result: Any
    reason: str = ""
    known: bool = True


def answered(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    run: Run,
    entry: Entry,
    rows: torch.Tensor | None = None,
    tolerance: Mapping[torch.dtype, float] = TOLERANCE,
) -> Answer:
    """The caller's call answered by the module's own forward, and compared with ``run`` on copies of it.

    Both begin with the caller's random state, and draw the same numbers from it.

    Args:
        run: the call through the graph; it is given copies, what takes writes, and where to keep what the graph writes.
        rows: boolean, (batch, sequence): the positions that count, where some are padding. Nobody reads the others,
            nor what they leave in a cache.

    Raises:
        Exception: whatever eager raises on this call.
    """
    refuse_hooks(module)
    written = Substitutes(entry.graph.written)
    mine = got = None
    failed = ""
    known = True
    drawn: tuple[Any, ...] = ()
    try:
        with unseen(module) as world, torch.no_grad():
            mine = _copied((args, dict(kwargs)), _only(kwargs, entry.unread))
            world.stand_ins.allow(tensor for _, tensor in _tensors(mine))
            got = run(*mine, world, written)
            drawn = drawn_states()
    except _NO_MEMORY:
        mine, got, known = None, None, False
    except Exception as error:
        failed = f"it fails with {first_line(error)}"
    result = module.forward(*args, **kwargs)
    if failed or not known:
        return Answer(result, failed, known)
    if not same_states(drawn, drawn_states()):
        return Answer(result, OTHER_NUMBERS)
    try:
        reason = _compared(got, result, mine, (args, kwargs), rows, tolerances(module, tolerance))
        return Answer(result, reason or _state_differs(entry, written, tolerance))
    except _NO_MEMORY:
        return Answer(result, known=False)
    except Exception as error:  # eager has answered by now, and must not be asked again
        return Answer(result, InternalError("a result was compared with eager's", error).reason)


def misfit(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    run: Run,
    rows: torch.Tensor | None = None,
    tolerance: Mapping[torch.dtype, float] = TOLERANCE,
    written: frozenset[int] = frozenset(),
    *,
    gradients: bool = False,
    shared: Collection[str] = (),
) -> str:
    """How ``run`` differs from the module's own forward, in words; empty when it doesn't. Both run on copies.

    For a call that eager must not answer itself. Both begin with the same random state. A call on which eager fails is
    not compared: it is the caller's to hear of.

    Args:
        gradients: compare the gradients of parameters and of tensors of the call too.
        shared: arguments that the graph does not read: both runs are given the caller's own object.
        written: memory that the graph writes into, as `CompiledGraph.written` has it.

    Raises:
        NoMemory: there was not enough for a second run.
    """
    try:
        with unseen(module) as world, torch.set_grad_enabled(gradients), comparable():
            theirs, mine = (_copied((args, dict(kwargs)), _only(kwargs, shared)) for _ in range(2))
            world.stand_ins.allow(tensor for _, tensor in _tensors((theirs, mine)))
            seed_for_comparison()
            try:
                with world.stand_ins:
                    expected = module.forward(*theirs[0], **theirs[1])
            except _NO_MEMORY:
                raise
            except Exception:
                return ""
            drawn = drawn_states()
            seed_for_comparison()
            try:
                got = run(*mine, world, Substitutes(written))
            except _NO_MEMORY:
                raise
            except Exception as error:
                return f"it fails with {first_line(error)}"
            same = same_states(drawn, drawn_states())
            reason = _compared(got, expected, mine, theirs, rows, tolerances(module, tolerance))
            reason = reason or ("" if same else OTHER_NUMBERS)
            if not reason and gradients:
                reason = _other_gradients(
                    module, (dict(_tensors(got)), mine), (dict(_tensors(expected)), theirs), rows, world
                )
            return reason
    except _NO_MEMORY as error:
        raise NoMemory from error


class NoMemory(Exception):
    """A comparison could not be made for want of memory: nothing is concluded."""


def _compared(
    got: Any,
    expected: Any,
    mine: Any,
    theirs: Any,
    rows: torch.Tensor | None,
    tolerance: Mapping[torch.dtype, float],
) -> str:
    """How results differ, or what the calls leave in their arguments."""
    reason = _difference(dict(_tensors(got)), dict(_tensors(expected)), rows, tolerance, complete=True)
    if not reason and rows is None:
        reason = _difference(dict(_tensors(mine)), dict(_tensors(theirs)), None, tolerance, complete=False)
    return reason


def _state_differs(entry: Entry, written: Substitutes, tolerance: Mapping[torch.dtype, float]) -> str:
    """How what the graph wrote into its copies differs from what eager wrote; empty when it does not."""
    for tensor in entry.graph.changed():
        error = relative_error(written.of(tensor), tensor)
        if error > tolerance.get(tensor.dtype, 0.0):
            return f"a tensor that it writes into differs from eager by {error:.2g}"
    return ""


def _other_gradients(
    module: torch.nn.Module,
    got: tuple[dict[str, torch.Tensor], Any],
    want: tuple[dict[str, torch.Tensor], Any],
    rows: torch.Tensor | None,
    world: Unseen,
) -> str:
    """How the gradients of two runs differ, each given as its results by path and its arguments."""
    (results, mine), (expected, theirs) = got, want
    cotangents = cotangents_of(expected, rows)
    try:
        with world.stand_ins:  # going back may run parts of the component again
            eager = gradients_of(expected, cotangents, wanted_of(module, dict(_tensors(theirs))))
    except Exception:
        return ""  # the caller's to hear of
    try:
        found = gradients_of(results, cotangents, wanted_of(module, dict(_tensors(mine))))
    except Exception as error:
        return f"its backward fails with {first_line(error)}"
    return gradient_difference(found, eager, tolerances(module, GRADIENT_TOLERANCE))


def _only(kwargs: Mapping[str, Any], names: Collection[str]) -> list[Any]:
    return [value for name, value in kwargs.items() if name in names]


def _copied(value: Any, shared: Sequence[Any] = ()) -> Any:
    """A deep copy, of all but ``shared``; tensors in the middle of a gradient's graph, which it refuses, are cut off.

    Tensors that are parts of one another stay so: ``deepcopy`` copies their memory once.
    """
    memo: dict[int, Any] = {id(one): one for one in shared}
    found = {id(tensor): tensor for _, tensor in _tensors(value)}
    plain = {k: t for k, t in found.items() if type(t) is torch.Tensor and t.layout is torch.strided and t.is_leaf}
    sharing = Counter(compat.storage_of(t) for t in plain.values())
    for key, tensor in found.items():
        parts = key in plain and sharing[compat.storage_of(tensor)] > 1
        if not parts:
            copied = tensor.detach().clone(memory_format=torch.preserve_format)
            memo[key] = copied.requires_grad_(tensor.requires_grad)
    return copy.deepcopy(value, memo)


def _tensors(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in a nest of containers and plain objects such as caches, with its path."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, torch.nn.Module) or depth > _DEPTH:
        return
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{path}.{key}", depth + 1)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{path}[{i}]", depth + 1)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        for name, item in vars(value).items():
            yield from _tensors(item, f"{path}.{name}", depth + 1)


def _difference(
    got: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    rows: torch.Tensor | None,
    tolerance: Mapping[torch.dtype, float],
    *,
    complete: bool,
) -> str:
    for path, want in expected.items():
        have = got.get(path)
        if have is None or have.numel() == want.numel() == 0:
            if complete and have is None:
                return f"{path.lstrip('.')} is missing in the result"
            continue  # a lazy cache layer that is not used
        if rows is not None:
            if want.shape[:-1] != rows.shape or have.shape != want.shape:
                continue  # no hidden states: what padding leaves in a cache is read by nobody
            have, want = have[rows], want[rows]
        error = relative_error(have, want)
        if error > tolerance.get(want.dtype, 0.0):
            return f"{path.lstrip('.') or 'the result'} differs from eager by {error:.2g}"
    return ""
