"""Size conditions are Python text that is evaluated, so text from a file is read before it runs."""

from __future__ import annotations

import ast
from collections.abc import Sequence

_FUNCTIONS = frozenset({"Max", "Min", "max", "min", "floor", "float"})
_MATH = frozenset({"ceil", "floor", "sqrt"})
_ALLOWED: tuple[type[ast.AST], ...] = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.UAdd),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Div, ast.Mod, ast.Pow),
    *(ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.IfExp, ast.Load),
)
_LONGEST = 20_000


def check_conditions(conditions: Sequence[str]) -> None:
    """Let through what compares sizes ``s[leaf][dim]`` with each other and with numbers.

    Raises:
        ValueError: a condition that does anything else.
    """
    for condition in conditions:
        if not isinstance(condition, str) or len(condition) > _LONGEST:
            raise ValueError("a size condition is no short text")
        try:
            tree = ast.parse(condition, mode="eval")
        except (SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"a size condition is no expression: {error}") from None
        _check(tree)


def _check(node: ast.AST) -> None:
    if isinstance(node, ast.Constant):
        if type(node.value) not in (int, float, bool):
            raise ValueError(f"a size condition holds {node.value!r}")
    elif isinstance(node, ast.Subscript):
        inner = node.value
        if not (isinstance(inner, ast.Subscript) and isinstance(inner.value, ast.Name) and inner.value.id == "s"):
            raise ValueError("a size condition reads something else than sizes")
        _check_index(node.slice)
        _check_index(inner.slice)
    elif isinstance(node, ast.Call):
        if not _is_arithmetic(node.func) or node.keywords:
            raise ValueError("a size condition calls something else than arithmetic functions")
        for argument in node.args:
            _check(argument)
    elif isinstance(node, _ALLOWED):
        for child in ast.iter_child_nodes(node):
            _check(child)
    else:
        raise ValueError(f"a size condition holds a {type(node).__name__}")


def _is_arithmetic(function: ast.expr) -> bool:
    if isinstance(function, ast.Attribute):
        return isinstance(function.value, ast.Name) and function.value.id == "math" and function.attr in _MATH
    return isinstance(function, ast.Name) and function.id in _FUNCTIONS


def _check_index(node: ast.AST) -> None:
    if not (isinstance(node, ast.Constant) and type(node.value) is int):
        raise ValueError("a size condition reads something else than sizes")
