"""What a run would leave behind in Python, learned from a trace that runs nothing.

Writes into tensors are no such effect: they are part of a graph, and a trial run makes them in copies.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch._dynamo

from compile_policy.compat import original_error
from compile_policy.compat_buffers import plain_buffers
from compile_policy.compat_effects import Stopped, stop_and_note
from compile_policy.errors import NotCompilable
from compile_policy.watch import suspended

_serial = itertools.count()


class ChangesItself(NotCompilable):
    """A call changes the component's Python state, which a graph would not do.

    Attributes:
        always: every call does; else the first one may be the only one, which builds a table, say.
    """

    def __init__(self, reason: str, *, always: bool = True) -> None:
        super().__init__(reason, remedy="Keep what is noted in a tensor that is written in place, or in a hook.")
        self.always = always


def effects_of(
    run: Callable[..., Any], leaves: Sequence[torch.Tensor], module: torch.nn.Module, owned: Sequence[object] = ()
) -> list[str]:
    """What ``run(*leaves)``, which calls ``module``, would change in Python, in words.

    Args:
        owned: objects made for the run, whose changes do not count.

    Raises:
        Exception: whatever tracing raises, such as for a line that prints.
    """
    found: list[str] = []

    def traced(anchor: torch.Tensor, *leaves: torch.Tensor) -> tuple[()]:
        torch.add(anchor, 1)  # there is a graph, whatever the run computes
        run(*leaves)
        return ()

    code = traced.__code__.replace(co_name=f"traced_{next(_serial)}")  # Dynamo files what it knows under the code
    fresh = types.FunctionType(code, traced.__globals__, "traced", None, traced.__closure__)
    compiled: Any = torch.compile(
        fresh, backend=stop_and_note(found, _names_of(run, owned)), fullgraph=True, dynamic=False
    )
    try:
        with ExitStack() as stack:
            stack.enter_context(torch._dynamo.config.patch(specialize_int=True, specialize_float=True))
            stack.enter_context(suspended())
            stack.enter_context(plain_buffers(module))
            compiled(torch.zeros(1), *leaves)
    except Exception as error:
        if not isinstance(original_error(error), Stopped):
            raise
    return found


def _names_of(run: Callable[..., Any], owned: Sequence[object]) -> tuple[str, ...]:
    """How Dynamo names objects that ``run`` closes over, or that are items of a dict that it closes over."""
    names: list[str] = []
    for number, cell in enumerate(getattr(run, "__closure__", None) or ()):
        name = f"L['run'].__closure__[{number}].cell_contents"
        held = cell.cell_contents
        if any(held is one for one in owned):
            names.append(name)
        elif type(held) is dict:
            names += [f"{name}[{key!r}]" for key, item in held.items() if any(item is one for one in owned)]
    return tuple(names)
