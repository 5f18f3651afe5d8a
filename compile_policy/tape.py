"""The operators that an eager run calls, in order, as data.

Two runs that do the same are two equal tapes: the same operators with the same numbers, and every tensor of the same
origin. Tensors are told apart by where they come from, not by their values.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

#: ``("leaf", i)``, ``("tensor", id)`` of a parameter, buffer or other tensor of the component, ``("op", n, i)`` for
#: the i-th tensor that operator n returned, ``("constant", ...)`` for a small one made from numbers, ``("unknown",)``.
Origin = tuple[Any, ...]
_CONSTANT = 16  # items up to which a tensor of unknown origin is compared by value


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        op: the overload.
        numbers: all arguments that are no tensors, with the structure of all of them. Hashable.
        tensors: the origins of those that are, in order.
    """

    op: Any
    numbers: tuple[Any, ...]
    tensors: tuple[Origin, ...]


class Tape(TorchDispatchMode):
    """Records every operator inside the block; one thread, one run.

    Attributes:
        calls: in order.
        marks: (what, number of calls before it), in order; put there by `mark`.
    """

    def __init__(self, leaves: Sequence[torch.Tensor], tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.marks: list[tuple[Any, int]] = []
        self._origins: dict[int, tuple[weakref.ref[torch.Tensor], Origin]] = {}
        for tensor in tensors:
            self._note(tensor, ("tensor", id(tensor)))
        for i, leaf in enumerate(leaves):
            self._note(leaf, ("leaf", i))

    def mark(self, what: Any) -> None:
        self.marks.append((what, len(self.calls)))

    def origin(self, tensor: torch.Tensor) -> Origin:
        found = self._origins.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        if type(tensor) is torch.Tensor and tensor.device.type != "meta" and tensor.numel() <= _CONSTANT:
            with torch._C._DisableTorchDispatch():
                return ("constant", tensor.dtype, tuple(tensor.shape), repr(tensor.tolist()))
        return ("unknown",)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, spec = pytree.tree_flatten((args, kwargs or {}))
        tensors = tuple([self.origin(a) for a in flat if isinstance(a, torch.Tensor)])
        numbers = tuple(["*" if isinstance(a, torch.Tensor) else (type(a).__name__, repr(a)) for a in flat])
        number = len(self.calls)
        self.calls.append(Call(op, (str(spec), *numbers), tensors))
        result = op(*args, **(kwargs or {}))
        for i, made in enumerate(pytree.tree_leaves(result)):
            if isinstance(made, torch.Tensor):
                known = self._origins.get(id(made))
                if known is None or known[0]() is not made:  # not written in place
                    self._note(made, ("op", number, i))
        return result

    def _note(self, tensor: torch.Tensor, origin: Origin) -> None:
        self._origins[id(tensor)] = (weakref.ref(tensor), origin)
