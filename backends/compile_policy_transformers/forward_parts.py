"""A decoder's forward taken apart in three: what comes before its layers, the layers, and what comes behind them.

A decoder that holds a tower, or another model, calls it before its layers: with sizes that only the values of a picture
tell, and in the first call of a sequence only. That part stays eager, and so does the last, which arranges the result.
Both are cheap beside the layers, the part between, which sees hidden states, masks and positions alone and is compiled.

The parts are made from the source of the forward itself, statement by statement, and run with its own globals. What
the statements of one part leave in local variables, those of the next begin with.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import merge_with_config_defaults

from compile_policy_transformers.releases import IDLE_DECORATORS

_DEFAULTS = {"merge_with_config_defaults", "check_model_inputs"}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Methods that change a container.
_CHANGES = {"append", "extend", "insert", "add", "update", "setdefault", "pop"}


@dataclass(frozen=True)
class Parts:
    """The parts of one forward.

    Attributes:
        forward: the function, without its decorators.
        before: takes the arguments of the forward and returns its local variables.
        layers: takes those in `given`, by name, and returns a dictionary of those that it changes.
        behind: takes those in `used` and returns the result.
    """

    forward: FunctionType
    before: Callable[..., dict[str, Any]]
    layers: FunctionType
    behind: FunctionType
    given: frozenset[str]
    used: frozenset[str]


def parts_of(decoder: nn.Module) -> Parts | None:
    """The parts of ``decoder``'s forward; ``None`` where it calls no other model before its layers, or is not so built.

    The layers have to be gone through in a statement of their own in the body of the forward, no other model is
    called from there on, and the result is returned behind them.
    """
    holding = {name for name, child in decoder.named_children() if _holds_model(child)}
    lists = {n for n, child in decoder.named_children() if isinstance(child, nn.ModuleList) and len(child)} - holding
    forward = inspect.unwrap(type(decoder).forward)
    if not holding or not lists or "forward" in vars(decoder) or not isinstance(forward, FunctionType):
        return None
    return _taken_apart(
        forward, frozenset(lists), frozenset(holding), frozenset(n for n, _ in decoder.named_children())
    )


def _holds_model(module: nn.Module) -> bool:
    """Whether it is, or holds, a model; a tower that says so of itself, or has blocks behind a convolution."""
    parts = [] if isinstance(module, nn.ModuleList) else list(module.modules())
    has_blocks = any(isinstance(m, nn.ModuleList) and len(m) for m in parts)
    return any(isinstance(m, PreTrainedModel) or (has_blocks and isinstance(m, _CONVOLUTIONS)) for m in parts)


@functools.cache
def _taken_apart(
    forward: FunctionType, lists: frozenset[str], holding: frozenset[str], modules: frozenset[str]
) -> Parts | None:
    function = _parsed(forward)
    if function is None or forward.__closure__:
        return None
    names = {name for decorator in function.decorator_list if (name := _name(decorator))}
    if len(names) != len(function.decorator_list) or not names <= IDLE_DECORATORS | _DEFAULTS or function.args.vararg:
        return None
    body = function.body
    start = next((i for i, s in enumerate(body) if _goes_through(s, lists)), None)
    if not start:
        return None
    returns = next((i for i, s in enumerate(body) if _returns(s)), 0)
    if returns <= start or holding & set(_attributes(body[start:])):
        return None
    end = max(i for i in range(start, returns) if i == start or modules & set(_called(body[i]))) + 1
    own = set(forward.__code__.co_varnames) - {"self"}
    read, written = _read(body[start:end]) & own, _written(body[start:end]) & own
    used = frozenset(_read(body[end:]) & own)
    left = sorted(written & used)
    given = frozenset(read | set(left))
    before = _made(forward, "before", function.args, [*body[:start], _behind(body[start - 1], "return locals()")])
    before.__defaults__, before.__kwdefaults__ = forward.__defaults__, forward.__kwdefaults__
    returned = f"return {{{', '.join(f'{name!r}: {name}' for name in left)}}}"
    layers = _made(forward, "layers", _taking(given), [*body[start:end], _behind(body[end - 1], returned)])
    behind = _made(forward, "behind", _taking(used), body[end:])
    defaults = merge_with_config_defaults(before) if names & _DEFAULTS else before
    layers.__kwdefaults__, behind.__kwdefaults__ = dict.fromkeys(given), dict.fromkeys(used)
    return Parts(forward, defaults, layers, behind, given, used)


def _parsed(forward: FunctionType) -> ast.FunctionDef | None:
    """The definition of ``forward``, with the line numbers of its file; ``None`` where there is no source."""
    try:
        source = textwrap.dedent(inspect.getsource(forward))
    except (OSError, TypeError):
        return None
    tree = ast.parse(source)
    ast.increment_lineno(tree, forward.__code__.co_firstlineno - 1)
    function = tree.body[0]
    return function if isinstance(function, ast.FunctionDef) else None


def _made(forward: FunctionType, name: str, arguments: ast.arguments, body: Sequence[ast.stmt]) -> FunctionType:
    """A function of these statements that belongs to the file, and reads the globals, of ``forward``."""
    plain = ast.arguments(
        posonlyargs=[ast.arg(a.arg) for a in arguments.posonlyargs],
        args=[ast.arg(a.arg) for a in arguments.args],
        kwonlyargs=[ast.arg(a.arg) for a in arguments.kwonlyargs],
        kw_defaults=[None] * len(arguments.kwonlyargs),
        kwarg=None if arguments.kwarg is None else ast.arg(arguments.kwarg.arg),
        defaults=[],
    )
    function = ast.FunctionDef(f"{forward.__name__}_{name}", plain, list(body), [])
    ast.copy_location(function, body[0])
    tree = ast.fix_missing_locations(ast.Module([function], []))
    made: dict[str, Any] = {}
    exec(compile(tree, forward.__code__.co_filename, "exec", dont_inherit=True), made)
    return FunctionType(made[function.name].__code__, forward.__globals__, function.name)


def _behind(statement: ast.stmt, line: str) -> ast.stmt:
    """A line of code that stands where ``statement`` does."""
    added = ast.parse(line).body[0]
    for node in ast.walk(added):
        ast.copy_location(node, statement)
    return added


def _taking(names: Iterable[str]) -> ast.arguments:
    keywords = [ast.arg(name) for name in sorted(names)]
    return ast.arguments([], [ast.arg("self")], None, keywords, [None] * len(keywords), None, [])


def _name(decorator: ast.expr) -> str:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""


def _goes_through(statement: ast.stmt, lists: frozenset[str]) -> bool:
    loops = (n for n in ast.walk(statement) if isinstance(n, (ast.For, ast.While, ast.ListComp)))
    return any(lists & set(_attributes([loop])) for loop in loops)


def _attributes(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Names of the attributes of ``self`` that are read."""
    for n in (n for node in nodes for n in ast.walk(node) if isinstance(n, ast.Attribute)):
        if isinstance(n.value, ast.Name) and n.value.id == "self":
            yield n.attr


def _called(statement: ast.stmt) -> Iterator[str]:
    return _attributes(n.func for n in ast.walk(statement) if isinstance(n, ast.Call))


def _returns(statement: ast.stmt) -> bool:
    return any(isinstance(n, (ast.Return, ast.Yield, ast.YieldFrom, ast.Await)) for n in ast.walk(statement))


def _read(body: Iterable[ast.stmt]) -> set[str]:
    names = [n for s in body for n in ast.walk(s) if isinstance(n, (ast.Name, ast.AugAssign))]
    augmented = {n.target.id for n in names if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)}
    return augmented | {n.id for n in names if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _written(body: Iterable[ast.stmt]) -> set[str]:
    """Variables that are assigned, or hold a container that is changed."""
    found: set[str] = set()
    for n in (n for s in body for n in ast.walk(s)):
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
            found.add(n.id)
        elif isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in _CHANGES:
            found |= {n.func.value.id} if isinstance(n.func.value, ast.Name) else set()
        elif isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Store) and isinstance(n.value, ast.Name):
            found.add(n.value.id)
    return found
