"""Attention over packed sequences and its gradient, as operators that stay opaque to a graph.

The gradient is written out, because an operator's code runs below autograd: softmax of the scores again, a block of
queries at a time, so that no matrix over all pairs of a long sequence is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

#: Queries whose scores are kept at a time.
BLOCK = 512


@torch.library.custom_op("compile_policy::varlen_attention", mutates_args=())
def varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention inside each packed sequence, without a mask over all pairs.

    Args:
        query: (1, heads, tokens, head dim); ``key`` and ``value`` may have fewer heads.
        cu_seqlens: (sequences + 1,) cumulative lengths, from 0 to ``tokens``.

    Returns:
        (1, tokens, heads, head dim).

    Neighbouring sequences of one length (windows, images of one size) are computed as one batch.
    """
    _, heads, tokens, _ = query.shape
    out = query.new_empty(1, tokens, heads, value.shape[-1])
    for part, count, length in runs(cu_seqlens):
        q, k, v = (batched(x[:, :, part], count, length) for x in (query, key, value))
        o = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        out[0, part] = o.transpose(1, 2).reshape(-1, heads, value.shape[-1])
    return out


def runs(cu_seqlens: torch.Tensor) -> Iterator[tuple[slice, int, int]]:
    """(tokens, sequences, length) of neighbouring sequences of one length; empty sequences are left out."""
    bounds = cu_seqlens.tolist()
    start = 0
    while start < len(bounds) - 1:
        length = bounds[start + 1] - bounds[start]
        stop = start + 1
        while stop < len(bounds) - 1 and bounds[stop + 1] - bounds[stop] == length:
            stop += 1
        if length:
            yield slice(bounds[start], bounds[stop]), stop - start, length
        start = stop


def batched(x: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """(1, heads, count * length, dim) -> (count, heads, length, dim)."""
    split: torch.Tensor = x[0].unflatten(1, (count, length))
    return split.transpose(0, 1)


@varlen_attention.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


@torch.library.custom_op("compile_policy::varlen_attention_backward", mutates_args=())
def varlen_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, in their shapes.

    Args:
        grad: (1, tokens, heads, value dim), the gradient of ``out``, the result of `varlen_attention`.
    """
    grads = (torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value))
    for part, count, length in runs(cu_seqlens):
        q, k, v = (_exact(batched(x[:, :, part], count, length)) for x in (query, key, value))
        g, o = (_exact(batched(x[:, part].transpose(1, 2), count, length)) for x in (grad, out))
        found = _dense_backward(g, q, k, v, o, scale)
        for whole, one in zip(grads, found, strict=True):
            whole[0, :, part] = one.transpose(0, 1).flatten(1, 2).to(whole.dtype)
    return grads


def _exact(x: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _dense_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of attention without a mask; all (count, heads, length, dim), keys and values maybe of fewer heads."""
    groups = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    of_query, of_keys, of_values = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
    for start in range(0, query.shape[2], BLOCK):
        rows = slice(start, start + BLOCK)
        q, g, o = query[:, :, rows], grad[:, :, rows], out[:, :, rows]
        weights = torch.softmax(q @ keys.transpose(2, 3) * scale, dim=-1)
        of_values += weights.transpose(2, 3) @ g
        inner = (g * o).sum(-1, keepdim=True)
        scores = weights * (g @ values.transpose(2, 3) - inner) * scale
        of_query[:, :, rows] = scores @ keys
        of_keys += scores.transpose(2, 3) @ q
    shape = (query.shape[0], key.shape[1], groups)
    return of_query, of_keys.unflatten(1, shape[1:]).sum(2), of_values.unflatten(1, shape[1:]).sum(2)


@varlen_attention_backward.register_fake
def _(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    query, key, value, cu_seqlens, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, output, cu_seqlens)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    query, key, value, out, cu_seqlens = ctx.saved_tensors
    found = varlen_attention_backward(grad, query, key, value, out, cu_seqlens, ctx.scale)
    return (*found, None, None)


varlen_attention.register_autograd(_backward, setup_context=_keep)
