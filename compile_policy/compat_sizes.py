"""Sizes that Dynamo would fix although the program asks for less: private symbols of its translator.

Two cases, both of which cost a graph for every size:

- a text that names a size, as the messages of checks do, is made although nobody reads it while the check holds. Here
  it is made when something reads it, which fixes the sizes as before;
- ``range(0, size, 500)`` fixes the size. Here it fixes the number of steps: a loop over chunks is one graph for all
  sizes with so many chunks.

What a program computes stays the same. A version of torch that has none of these symbols, or others, is left alone.
Drop the first once Dynamo formats sizes in texts of several parts late, the second once ``call_range`` keeps a size.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo import symbolic_convert
from torch._dynamo.variables.builtin import BuiltinVariable
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lazy import LazySymNodeFormatString, LazyVariableTracker
from torch._dynamo.variables.tensor import SymNodeVariable
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

_BUILD_STRING = dis.opmap["BUILD_STRING"]


@contextmanager
def sizes_kept() -> Iterator[None]:
    """Inside the block, captures fix no size in the two cases above."""
    tables = [cls.dispatch_table for cls in _translators()]
    strings = [table[_BUILD_STRING] for table in tables]
    call_range = BuiltinVariable.call_range
    try:
        for table, build in zip(tables, strings, strict=True):
            table[_BUILD_STRING] = _late(build)
        BuiltinVariable.call_range = _by_steps(call_range)  # type: ignore[method-assign]
        _forget_handlers()
        yield
    finally:
        for table, build in zip(tables, strings, strict=True):
            table[_BUILD_STRING] = build
        BuiltinVariable.call_range = call_range  # type: ignore[method-assign]
        _forget_handlers()


def _translators() -> list[Any]:
    found: list[Any] = [symbolic_convert.InstructionTranslatorBase]
    for cls in found:
        found += cls.__subclasses__()
    return found


def _forget_handlers() -> None:
    """Dynamo keeps bound methods such as ``call_range`` by the types of their arguments."""
    handlers: dict[Any, Any] = BuiltinVariable.call_function_handler_cache
    for key in [key for key in handlers if key[0] is range]:
        del handlers[key]


class _Text(LazySymNodeFormatString):
    """A text of several parts, some of which are sizes."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def __repr__(self) -> str:
        return "".join(part.as_python_constant() for part in self.parts)


def _late(build: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def build_string(translator: Any, instruction: Any) -> None:
        parts = translator.stack[len(translator.stack) - instruction.arg :]
        late = [part for part in parts if _is_late(part)]
        if not late or not all(_is_late(part) or isinstance(part, ConstantVariable) for part in parts):
            build(translator, instruction)
            return
        translator.popn(instruction.arg)
        translator.push(LazyVariableTracker.create(_Text(parts), source=None, tx=translator))

    return build_string


def _is_late(part: Any) -> bool:
    """Whether this is a size to be formatted, or a text with some, that nothing has read yet."""
    if not isinstance(part, LazyVariableTracker) or part.is_realized():
        return False
    value = part.peek_value()
    if isinstance(value, _Text):
        return True
    return isinstance(value, LazySymNodeFormatString) and not free_unbacked_symbols(value.sym_node_var.sym_num)


def _by_steps(call_range: Callable[..., Any]) -> Callable[..., Any]:
    def by_steps(self: Any, tx: Any, *args: Any) -> Any:
        if len(args) == 3 and isinstance(args[1], SymNodeVariable):
            start, step = (a.as_python_constant() if a.is_python_constant() else None for a in (args[0], args[2]))
            stop = args[1].sym_num
            if type(start) is int and type(step) is int and step > 1 and isinstance(stop, torch.SymInt):
                steps = max(0, int((stop - start + step - 1) // step))  # int: a condition on this number alone
                args = (args[0], ConstantVariable.create(start + steps * step), args[2])
        return call_range(self, tx, *args)

    return by_steps
