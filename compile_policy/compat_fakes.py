"""Fake tensors of other sizes than a trace had: private symbols of torch's symbolic shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic


def with_sizes(tensor: torch.Tensor, symbols: Mapping[Any, int]) -> torch.Tensor:
    """A fake tensor like the given one, in which some symbols have values."""

    def number(size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        value = size.node.expr.subs(dict(symbols))
        if value.is_Integer:
            return int(value)
        return size.node.shape_env.create_symintnode(value, hint=None)

    fake: Any = tensor
    with fake.fake_mode:
        shape, strides = [number(s) for s in tensor.shape], [number(s) for s in tensor.stride()]
        return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)


def of_shorter_length(tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor like the given one, whose last dim is a symbol of its own, smaller than it was."""
    fake: Any = tensor
    env, size = fake.fake_mode.shape_env, fake.shape[-1]
    hint = int(size.node.hint) - 1
    symbol = env.create_symbol(hint, ConstantSource(f"length_{id(tensor)}"), dynamic_dim=DimDynamic.DYNAMIC)
    length = env.create_symintnode(symbol, hint=hint)
    with fake.fake_mode:
        return torch.empty((*tensor.shape[:-1], length), dtype=tensor.dtype, device=tensor.device)


def with_own_sizes(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Fake tensors like the given ones, in which every symbol is the size of some dim.

    AOTInductor reads symbols off the sizes of its inputs, and cannot undo a division: where all that is known of
    ``s`` so far is a dim of ``s // 4``, that dim gets a symbol of its own.
    """
    numbers: list[Any] = [number for tensor in tensors for number in tensor.shape]
    sizes = [number.node for number in numbers if isinstance(number, torch.SymInt)]
    known = {node.expr for node in sizes if node.expr.is_Symbol}
    own: dict[Any, Any] = {}
    read: set[Any] = set()
    for node in sizes:
        if node.expr.is_Symbol:
            read.add(node.expr)
        divided = any(part.is_Function for part in (node.expr, *node.expr.args))  # has to be known before it is met
        if not node.expr.free_symbols <= (read if divided else known) and node.has_hint() and node.expr not in own:
            name = ConstantSource(f"size_{len(own)}_{id(tensors)}")
            own[node.expr] = node.shape_env.create_symbol(node.hint, name, dynamic_dim=DimDynamic.DYNAMIC)
    for size, symbol in list(own.items()):  # strides are multiplied out: of ``1 + s // 2`` they show ``s // 2`` alone
        divisions = [part for part in size.args if part.is_Function] if size.is_Add else []
        if len(divisions) == 1 and not (size - divisions[0]).free_symbols:
            own[divisions[0]] = symbol - (size - divisions[0])
    return [_renamed(tensor, own) for tensor in tensors]


def _renamed(tensor: torch.Tensor, own: Mapping[Any, Any]) -> torch.Tensor:
    """A fake tensor like the given one, with symbols in place of some expressions."""
    numbers: list[Any] = [*tensor.shape, *tensor.stride()]
    if not any(isinstance(n, torch.SymInt) and n.node.expr != n.node.expr.subs(dict(own)) for n in numbers):
        return tensor
    made = [
        n.node.shape_env.create_symintnode(n.node.expr.subs(dict(own)), hint=n.node.hint)
        if isinstance(n, torch.SymInt)
        else n
        for n in numbers
    ]
    fake: Any = tensor
    with fake.fake_mode:
        shape, strides = made[: tensor.dim()], made[tensor.dim() :]
        return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)
