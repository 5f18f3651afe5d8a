"""Layers that a tower goes through in its own ``forward``, as one module that can be compiled.

Such a tower has no stack of layers that is a module, only a list and a loop: ``for layer in self.layers: x = layer(x,
...)``. While a region is in front of the list, that loop meets the list itself, once, and the list runs its layers.
Nobody else who goes through the list sees anything but the layers; parameters keep their names.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from compile_policy.region import region_of
from compile_policy_transformers.known_code import tree_of

#: The code whose loops go through a list.
_walked_in: WeakKeyDictionary[nn.Module, CodeType] = WeakKeyDictionary()
_PLAIN = (ast.Name, ast.Attribute, ast.Constant, ast.expr_context)


class LayerChain(nn.ModuleList):
    """A list of layers each of which takes what the one before returned.

    Attributes:
        rows: arguments that the layers take as lists of numbers, and that come as tensors.
        picks: the tower takes the first of what a layer returns, ``layer(x)[0]``.
    """

    rows: frozenset[str]
    picks: bool

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            kwargs = {n: v.tolist() if n in rows_of(self) and torch.is_tensor(v) else v for n, v in kwargs.items()}
        for layer in self._modules.values():
            out = layer(hidden_states, *args, **kwargs)
            hidden_states = out[0] if self.picks else out
        return (hidden_states,) if self.picks else hidden_states

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A copy or a pickle is a plain list of layers."""
        left_out = ("rows", "picks", "_compiled_call_impl")
        state = {name: value for name, value in vars(self).items() if name not in left_out}
        return nn.ModuleList, (), state

    def __iter__(self) -> Iterator[nn.Module]:
        return iter((self,)) if self._is_walked() else super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        whole = isinstance(index, slice) and range(len(self))[index] == range(len(self))
        return self if whole and self._is_walked() else super().__getitem__(index)

    def _is_walked(self) -> bool:
        """Whether the tower's own loop asks for the layers of a list that has a region."""
        if torch.compiler.is_dynamo_compiling():
            return False
        return sys._getframe(2).f_code is _walked_in.get(self) and region_of(self) is not None


def rows_of(chain: LayerChain) -> frozenset[str]:
    found: frozenset[str] = vars(chain).get("rows", frozenset())
    return found


def chain_name(tower: nn.Module) -> str | None:
    """Name of the list that ``tower`` goes through as a chain, so far as its code says so.

    Its ``forward`` has a single loop over layers, which does nothing but hand the result of one layer to the next,
    beside arguments that stay the same.
    """
    tree = tree_of(type(tower).forward)
    if tree is None or "forward" in vars(tower):
        return None
    loops = _loops(tree)
    lists = [name for _, name in loops if isinstance(getattr(tower, name, None), nn.ModuleList)]
    return lists[0] if len(lists) == 1 and all(_is_chain(loop, tree) for loop, n in loops if n in lists) else None


def as_chain(tower: nn.Module, name: str) -> LayerChain:
    """Turn the list of layers into a chain."""
    layers: Any = getattr(tower, name)
    layers.__class__ = LayerChain
    tree = tree_of(type(tower).forward)
    assert tree is not None
    layers.picks = any(isinstance(loop.body[0].value, ast.Subscript) for loop, n in _loops(tree) if n == name)
    _walked_in[layers] = inspect.unwrap(type(tower).forward).__code__
    chain: LayerChain = layers
    return chain


def unchain(model: nn.Module) -> None:
    """Make plain lists of all chains in ``model``."""
    for module in model.modules():
        if isinstance(module, LayerChain):
            for name in ("rows", "picks"):
                vars(module).pop(name, None)
            module.__class__ = nn.ModuleList  # type: ignore[assignment]


def _loops(tree: ast.AST) -> list[tuple[Any, str]]:
    """Loops over lists of ``self``, and the names of these."""
    loops = (node for node in ast.walk(tree) if isinstance(node, ast.For))
    return [(node, name) for node in loops if (name := _list_of(node.iter))]


def _list_of(iterated: ast.expr) -> str:
    """``layers`` of ``self.layers``, ``self.layers[:n]`` or ``enumerate(self.layers)``."""
    if isinstance(iterated, ast.Call) and isinstance(iterated.func, ast.Name) and iterated.func.id == "enumerate":
        iterated = iterated.args[0]
    if isinstance(iterated, ast.Subscript) and isinstance(iterated.slice, ast.Slice):
        iterated = iterated.value
    own = isinstance(iterated, ast.Attribute) and isinstance(iterated.value, ast.Name) and iterated.value.id == "self"
    return iterated.attr if isinstance(iterated, ast.Attribute) and own else ""


def _is_chain(loop: ast.For, tree: ast.AST) -> bool:
    names = [node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)]
    if len(loop.body) != 1 or loop.orelse or not isinstance(step := loop.body[0], ast.Assign):
        return False
    call, targets = step.value, step.targets
    if isinstance(call, ast.Subscript) and isinstance(call.slice, ast.Constant) and call.slice.value == 0:
        call = call.value
    if not isinstance(call, ast.Call) or len(targets) != 1 or not isinstance(states := targets[0], ast.Name):
        return False
    if not isinstance(call.func, ast.Name) or call.func.id != names[-1] or not call.args:
        return False
    first, *others = call.args
    if not isinstance(first, ast.Name) or first.id != states.id:
        return False
    used = [node for value in (*others, *(k.value for k in call.keywords)) for node in ast.walk(value)]
    if not all(isinstance(node, _PLAIN) for node in used):
        return False
    if {node.id for node in used if isinstance(node, ast.Name)} & {states.id, *names}:
        return False
    uses = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]  # once set, once called, never again
    return uses.count(names[-1]) == 2 and all(uses.count(name) == 1 for name in names[:-1])
