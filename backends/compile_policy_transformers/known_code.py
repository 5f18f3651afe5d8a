"""The code of functions as data: whether it is the code that something was written against, and what it does."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from compile_policy_transformers.releases import CACHE_NAMES


@functools.cache
def fingerprint(function: Callable[..., Any] | None) -> str:
    """Digest of a function's code without its name, comments, docstring, decorators and annotations.

    An argument that is a cache counts as the same by each of its names (`releases.CACHE_NAMES`).

    Returns:
        An empty string where there is no source.
    """
    tree = tree_of(function)
    if tree is None:
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns, node.decorator_list, node.name = None, [], ""
            if ast.get_docstring(node) is not None:
                del node.body[0]
        elif isinstance(node, ast.arg):
            node.annotation = None
            node.arg = _one_name(node.arg)
        elif isinstance(node, ast.Name):
            node.id = _one_name(node.id)
        elif isinstance(node, ast.keyword) and node.arg is not None:
            node.arg = _one_name(node.arg)
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def _one_name(name: str) -> str:
    return CACHE_NAMES[0] if name in CACHE_NAMES else name


def tree_of(function: Callable[..., Any] | None) -> ast.Module | None:
    """Syntax tree of a function, behind its decorators; ``None`` where there is no source."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):
        return None


def methods_used(cls: type, name: str = "forward") -> Iterator[Callable[..., Any]]:
    """A method, and the methods of ``cls`` that it calls on itself, and those that these call."""
    waiting, seen = [name], {name}
    while waiting:
        function = inspect.unwrap(getattr(cls, waiting.pop()))
        code = getattr(function, "__code__", None)
        if code is None:
            continue
        yield function
        called = {n for n in code.co_names if _is_own(inspect.getattr_static(cls, n, None))} - seen
        waiting += sorted(called)
        seen |= called


def _is_own(method: Any) -> bool:
    return inspect.isfunction(method) and not method.__module__.startswith("torch.")
