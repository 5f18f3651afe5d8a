"""Positions that a table counts on from a length: ``torch.arange(past, past + new)``.

With a static cache the length is a tensor, and the number of positions is then the difference of two values that no
trace knows. Traced is ``torch.arange(new) + past``, which has the same values. It is the form of the expression that
is looked for, not the name of a model.
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compile_policy_transformers.releases import is_idle

_NO_GRAD = ["torch.no_grad()"]


@contextmanager
def counted_by_size(decoder: nn.Module) -> Iterator[None]:
    """Have modules of ``decoder`` that count in this way traced for all lengths; eager runs have their own forward."""
    given: list[nn.Module] = []
    try:
        for module in decoder.modules():
            made = None if "forward" in vars(module) else _rewritten(type(module).forward)
            if made is not None:
                vars(module)["forward"] = types.MethodType(made, module)
                given.append(module)
        yield
    finally:
        for module in given:
            del vars(module)["forward"]


@functools.cache
def _rewritten(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """The forward with the other expression while Dynamo traces it; ``None`` where it does not have the first."""
    inner = inspect.unwrap(forward)
    if not isinstance(inner, types.FunctionType) or "arange" not in inner.__code__.co_names:
        return None
    counts = _Counts()
    try:
        tree = counts.visit(ast.parse(textwrap.dedent(inspect.getsource(inner))))
    except (OSError, SyntaxError):
        return None
    (function,) = tree.body
    decorators = [text for text in map(ast.unparse, function.decorator_list) if not is_idle(text)]
    if not counts.found or decorators not in ([], _NO_GRAD) or set(inner.__code__.co_freevars) - {"__class__"}:
        return None
    function.decorator_list = []
    made = _made(function, inner)
    traced: Any = torch.no_grad()(made) if decorators else made

    @functools.wraps(forward)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (traced if torch.compiler.is_dynamo_compiling() else forward)(self, *args, **kwargs)

    return method


class _Counts(ast.NodeTransformer):
    found = False

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name("torch"), attr="arange"),
                args=[ast.Name(first) as past, ast.BinOp(left=ast.Name(again), op=ast.Add(), right=new)],
            ) if first == again:
                self.found = True
                count = ast.Call(func=node.func, args=[new], keywords=node.keywords)
                return ast.copy_location(ast.BinOp(left=count, op=ast.Add(), right=past), node)
        return node


def _made(function: ast.stmt, original: types.FunctionType) -> types.FunctionType:
    """``function`` as code of the same file and module, with the class that ``super()`` is about."""
    maker = ast.parse("def made(__class__): pass")
    maker.body[0].body = [function, ast.Return(ast.Name(original.__name__, ast.Load()))]  # type: ignore[attr-defined]
    ast.increment_lineno(ast.fix_missing_locations(function), original.__code__.co_firstlineno - 1)
    flags = __future__.annotations.compiler_flag
    code = compile(ast.fix_missing_locations(maker), original.__code__.co_filename, "exec", flags=flags)
    names: dict[str, Any] = {}
    exec(code, original.__globals__, names)
    cells = dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
    found = names["made"](cells["__class__"].cell_contents if cells else None)
    assert isinstance(found, types.FunctionType)
    found.__defaults__, found.__kwdefaults__ = original.__defaults__, original.__kwdefaults__
    return found
