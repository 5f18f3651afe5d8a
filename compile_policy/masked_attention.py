"""Attention that picks its kernel at run time: a plain causal mask is a mark of one byte, not a matrix.

A dense mask of a long prompt costs queries x keys bytes and makes attention compute the half that it hides. Where a
caller knows that a mask is the causal one, it passes `causal_mark` in its place. A captured graph reads its mask
through `masked_attention` alone, so one graph serves both: the operator sees which of the two it was given and runs
the causal kernel or the masked one. `takes_marks` finds the inputs of a graph for which that holds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

_LIBRARY = torch.library.Library("compile_policy", "FRAGMENT")
_NAME = "masked_attention"
#: A mark is one element at this place of a storage of this size, expanded. Models expand masks of one element too:
#: the place tells them apart. It is a multiple of what kernels want inputs aligned to.
_PLACE, _SIZE = 64, 81


def causal_mark(batch: int, queries: int, keys: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A stand-in for the mask (batch, 1, queries, keys) under which query i sees the keys 0 to i.

    One closed element, expanded. Read as a mask it would hide everything, so it is no mask that a caller may mean.
    """
    return torch.zeros(_SIZE, dtype=torch.bool, device=device)[_PLACE].expand(batch, 1, queries, keys)


def is_causal_mark(mask: torch.Tensor) -> bool:
    """True if ``mask`` comes from `causal_mark`: recognised by its layout, without reading its value."""
    if mask.dtype is not torch.bool or mask.dim() != 4 or mask.numel() < 2:
        return False
    layout = (mask.storage_offset(), mask.untyped_storage().nbytes())
    return layout == (_PLACE, _SIZE) and not any(mask.stride()[2:])


def dense(mask: torch.Tensor) -> torch.Tensor:
    """The boolean mask that a `causal_mark` stands for; any other tensor as it is."""
    if not is_causal_mark(mask):
        return mask
    batch, _, queries, keys = mask.shape
    causal = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril()
    return causal.expand(batch, 1, queries, keys).contiguous()


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Scaled dot-product attention under ``mask``, opaque to a graph. It has no formula for gradients.

    Args:
        query: (batch, heads, queries, head dim). ``key`` and ``value`` may have fewer heads, each for a group.
        mask: boolean, true where seen, broadcastable to (batch, heads, queries, keys); or a `causal_mark`.
        scale: factor of the scores; 1 / sqrt(head dim) when ``None``.

    Returns:
        (batch, queries, heads, head dim), contiguous.
    """
    result: torch.Tensor = torch.ops.compile_policy.masked_attention.default(query, key, value, mask, scale)
    return result


def _run(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float | None
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    if is_causal_mark(mask):
        seen = query.shape[2]  # a static cache has empty slots behind these
        key, value = key.narrow(2, 0, seen), value.narrow(2, 0, seen)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


def _shape(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float | None
) -> torch.Tensor:
    batch, heads, queries, _ = query.shape
    # What scaled_dot_product_attention asks of a mask: sizes that have to be equal are one symbol in the graph.
    for size, wanted in zip(mask.shape, (batch, heads, queries, key.shape[2]), strict=True):
        if not statically_known_true(size == 1):
            torch._check(size == wanted)
    return query.new_empty(batch, queries, heads, value.shape[-1])


def takes_marks(node: Node) -> bool:
    """True if the values of an input are read as a mask by `masked_attention`, and by nothing else.

    Sizes may be read off it: a mark has those of the mask.
    """
    readers = [user for user in node.users if user.target is not torch.ops.aten.sym_size.int]
    return bool(readers) and all(is_masked_attention(user) and _mask(user) is node for user in readers)


def is_masked_attention(node: Node) -> bool:
    """True if ``node`` of a captured graph is a call of `masked_attention`."""
    return node.op == "call_function" and node.target is torch.ops.compile_policy.masked_attention.default


def _mask(node: Node) -> object:
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("mask")


# Any layout of the inputs will do: without this tag Inductor copies them to the strides seen in the trace.
_LIBRARY.define(
    f"{_NAME}(Tensor query, Tensor key, Tensor value, Tensor mask, float? scale) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
_LIBRARY.impl(_NAME, _run, "CompositeExplicitAutograd")
torch.library.register_fake(f"compile_policy::{_NAME}", _shape, lib=_LIBRARY)
