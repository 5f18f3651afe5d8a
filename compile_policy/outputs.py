"""How a component's result is put together again from the tensors that a graph returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.utils._pytree as pytree

Constructor = Callable[[list[Any]], Any]
#: Base class of results -> makes a constructor for one class of them and the names of its parts, or ``None``.
_constructors: dict[type, Callable[[type, Sequence[str]], Constructor | None]] = {}


def register_constructor(base: type, make: Callable[[type, Sequence[str]], Constructor | None]) -> None:
    """Have results of classes below ``base`` made by ``make(cls, names)`` where pytree's way to make them is slow.

    The constructor takes the parts in the order of ``names`` and returns what pytree would have made of them.
    """
    _constructors[base] = make


@dataclass(frozen=True)
class OutputSpec:
    """How to put a component's result together.

    Attributes:
        tree: pytree structure of the result.
        leaves: per leaf ``("tensor",)``, ``("value", argument name)`` or ``("const", value)``.
    """

    tree: pytree.TreeSpec
    leaves: tuple[tuple[Any, ...], ...]

    @cached_property
    def tensors(self) -> int:
        """How many of the leaves are tensors."""
        return sum(leaf[0] == "tensor" for leaf in self.leaves)

    @cached_property
    def names(self) -> frozenset[str]:
        """Arguments that the result holds."""
        return frozenset(leaf[1] for leaf in self.leaves if leaf[0] == "value")

    def build(self, tensors: Sequence[torch.Tensor], values: Mapping[str, Any]) -> Any:
        """The result of ``tensors`` (more than needed is no error) and the arguments in `names`."""
        parts: list[Any] = []
        n = 0
        for leaf in self.leaves:
            kind = leaf[0]
            if kind == "tensor":
                parts.append(tensors[n])
                n += 1
            else:
                parts.append(values[leaf[1]] if kind == "value" else leaf[1])
        return self._construct(parts)

    @cached_property
    def _construct(self) -> Constructor:
        tree = self.tree
        if isinstance(tree.type, type) and tree.num_nodes == tree.num_children + 1:  # nothing is nested
            for base, make in _constructors.items():
                constructor = make(tree.type, tree.context) if issubclass(tree.type, base) else None
                if constructor is not None:
                    return constructor
        return lambda parts: pytree.tree_unflatten(parts, tree)
