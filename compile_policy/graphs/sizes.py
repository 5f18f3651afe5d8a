"""Sizes of a graph: as people call them, and as numbers."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_WORD = re.compile(r"\b[a-z]+\d+\b")
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}
_FUNCTIONS: dict[str, Callable[..., int | float]] = {"Max": max, "Min": min, "Mod": operator.mod}
_LONGEST = 400  # characters of an expression that is worth working out


def labelled(size: str, symbols: Mapping[str, Mapping[str, Any]]) -> str:
    """``s20 + s63`` as ``past + sequence``."""
    return _WORD.sub(lambda m: str(symbols.get(m[0], {}).get("label") or m[0]), size)


def tensor_type(dtype: str, shape: Sequence[str] | None, symbols: Mapping[str, Mapping[str, Any]]) -> str:
    """``f32[batch, 64]``; empty for what is no tensor."""
    return "" if shape is None else f"{dtype}[{', '.join(labelled(str(size), symbols) for size in shape)}]"


def type_of(op: Mapping[str, Any], symbols: Mapping[str, Mapping[str, Any]]) -> str:
    """The same of a row of ``ops.json``."""
    shape = op.get("shape")
    return tensor_type(str(op.get("dtype", "")), shape if isinstance(shape, list) else None, symbols)


def numbers(symbols: Mapping[str, Mapping[str, Any]], given: Mapping[str, int]) -> dict[str, int]:
    """Symbol -> number: what is given for its label (or for itself), else what was traced."""
    found = {}
    for symbol, known in symbols.items():
        value = given.get(str(known.get("label")), given.get(symbol, known.get("size")))
        if isinstance(value, int):
            found[symbol] = value
    return found


def evaluated(shape: Sequence[str] | None, values: Mapping[str, int]) -> tuple[int, ...] | None:
    """A shape as numbers; ``None`` where a symbol is not known or an expression is not arithmetic."""
    sizes = [_evaluated(size, values) for size in shape or ()]
    return None if shape is None or None in sizes else tuple(int(size) for size in sizes if size is not None)


def _evaluated(size: str, values: Mapping[str, int]) -> int | float | None:
    if size.isdigit():
        return int(size)
    if size in values or len(size) > _LONGEST:
        return values.get(size)
    try:
        return _number(ast.parse(size, mode="eval").body, values)
    except (SyntaxError, KeyError, ArithmeticError, ValueError, RecursionError, MemoryError):
        return None


def _number(node: ast.AST, values: Mapping[str, int]) -> int | float:
    match node:
        case ast.Constant(value=int() as number):
            return number
        case ast.Name(id=name):
            return values[name]
        case ast.BinOp(left, op, right) if not isinstance(op, ast.Pow) or isinstance(right, ast.Constant):
            result: int | float = _OPERATORS[type(op)](_number(left, values), _number(right, values))
            if abs(result) > 2**63:
                raise ValueError("no size is as large as that")
            return result
        case ast.UnaryOp(op, operand):
            return -_number(operand, values) if isinstance(op, ast.USub) else _number(operand, values)
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _FUNCTIONS[name](*(_number(argument, values) for argument in arguments))
    raise ValueError(f"{type(node).__name__} is no arithmetic")
