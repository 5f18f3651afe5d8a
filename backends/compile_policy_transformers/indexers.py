"""Indexers that choose the tokens of each query by one in Python: traced with one operator for the choice.

Cause: which tokens a query may see is data, and Qwen4-Exp's indexer goes through rows and queries, branching on how
many there are (modeling_qwen4_exp.py, ``Qwen4ExpTextQSAIndexer.forward``, ``if num_complete_blocks > 0``). While a
decoder is traced, such an indexer has a ``forward`` of ours: the same projections, rotary positions and update of the
cache, then `select_tokens` in place of the loops, with the arithmetic of the stock code.

An indexer is known by its code, whatever its class is called: the fingerprints of ``forward``, of its norm and of the
rotary embedding have to be those that this was written against (`releases`). One whose code is another is
traced as it is, which fails at that line, so that the decoder runs eager. Nothing of Transformers is changed. Drop
this once the stock indexer traces to one graph.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from compile_policy_transformers import releases
from compile_policy_transformers.known_code import fingerprint
from compile_policy_transformers.swapped import swapped

#: Fingerprints of the code that the twin stands for.
_FORWARD, _ADDITIVE = releases.QWEN4_INDEXER, releases.QWEN4_INDEXER_ADDITIVE
_NORM, _ROTARY = releases.QWEN4_NORM, releases.QWEN4_ROTARY


@torch.library.custom_op("compile_policy::select_tokens", mutates_args=())
def select_tokens(
    query: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    ratio: int,
    most: int,
) -> torch.Tensor:
    """Which of the tokens that a query may see it attends to: the blocks of most weight, and those of no whole block.

    Args:
        query: (batch, queries, heads, dim), with rotary positions; ``keys``: (batch, slots, dim), without.
        visible: (batch, queries, slots) boolean. The visible tokens of a query, in order, form blocks of ``ratio``.
        cos, sin: (batch, tokens, rotary dim) of all tokens so far.
        norm: (dim,) weight of the norm of a block's mean key, less 1.
        most: blocks that a query attends to.

    Returns:
        Boolean, in the shape of ``visible``.
    """
    chosen = torch.zeros_like(visible)
    for row in range(len(query)):
        known = states = None
        for i in reversed(range(query.shape[1])):  # the longest first: the others mostly see the beginning of it
            tokens = visible[row, i].nonzero().flatten()
            whole = tokens.numel() // ratio
            chosen[row, i, tokens[whole * ratio :]] = True
            if not whole:
                continue
            blocks = tokens[: whole * ratio].view(whole, ratio)
            if known is None or states is None or not torch.equal(known[:whole], blocks):
                known, states = blocks, _block_states(keys[row], blocks, cos[row], sin[row], norm, eps)
            scores = torch.matmul(query[row, i].float(), states[:whole].float().transpose(-1, -2)).transpose(-1, -2)
            scores = torch.relu(scores).sum(dim=-1) / math.sqrt(keys.shape[-1])
            best = scores.topk(min(most, whole), dim=0).indices
            chosen[row, i, blocks[best].flatten()] = True
    return chosen


@select_tokens.register_fake
def _(
    query: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    ratio: int,
    most: int,
) -> torch.Tensor:
    return visible.new_empty(visible.shape)


def _block_states(
    keys: torch.Tensor, blocks: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: torch.Tensor, eps: float
) -> torch.Tensor:
    """(blocks, dim): mean keys of ``blocks`` (blocks, ratio), normed, at the position of the first token of each."""
    mean = keys[blocks].float().mean(dim=1).to(keys.dtype).float()
    normed = mean * torch.rsqrt(mean.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + norm.float())
    return _rotated(normed.to(keys.dtype), cos[blocks[:, 0]], sin[blocks[:, 0]])


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions on the first channels of ``x``, as many as ``cos`` has."""
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned[..., : turned.shape[-1] // 2], turned[..., turned.shape[-1] // 2 :]
    return torch.cat([turned * cos + torch.cat((-second, first), dim=-1) * sin, kept], dim=-1)


def _forward(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor,
    cache: Any,
) -> torch.Tensor:
    """The indexer's ``forward``: (batch, 1, queries, slots) boolean."""
    if not torch.compiler.is_dynamo_compiling():  # another thread
        out: torch.Tensor = type(self).forward(self, hidden_states, position_embeddings, attention_mask, cache)
        return out
    batch, length, _ = hidden_states.shape
    cos, sin = position_embeddings
    heads, width = self.index_n_heads, self.index_head_dim
    query, keys = self.index_qk_proj(hidden_states).split([heads * width, self.index_kv_heads * width], dim=-1)
    query = self.q_layernorm(query.reshape(batch, length, heads, width))
    query = _rotated(query, cos[:, -length:].unsqueeze(2), sin[:, -length:].unsqueeze(2))
    if cache is not None:
        keys = cache.update_indexer(keys, self.layer_idx)
    visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    norm = self.k_layernorm
    chosen: torch.Tensor = select_tokens(
        query, keys, visible[:, 0], cos, sin, norm.weight, norm.eps, self.compress_ratio, self.block_topk
    )
    return chosen.unsqueeze(1)


def _additive_forward(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor,
    cache: Any,
) -> torch.Tensor:
    """`_forward` for code that adds the choice to a mask of numbers: zero for what is chosen."""
    chosen = _forward(self, hidden_states, position_embeddings, attention_mask, cache)
    if not torch.compiler.is_dynamo_compiling() or not attention_mask.is_floating_point():
        return chosen
    zero = attention_mask.new_zeros(())
    return torch.where(chosen, zero, torch.finfo(attention_mask.dtype).min)


def selecting_indexers(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """The indexers in ``decoder`` whose code is known."""
    return [module for module in decoder.modules() if _is_known(module)]


@contextmanager
def selecting(indexers: list[torch.nn.Module]) -> Iterator[None]:
    """Let these indexers choose by one operator in a trace."""
    additive = [m for m in indexers if fingerprint(type(m).forward) == _ADDITIVE]
    boolean = [m for m in indexers if m not in additive]
    with swapped(boolean, _forward), swapped(additive, _additive_forward):
        yield


def _is_known(module: Any) -> bool:
    if "forward" in vars(module) or not hasattr(module, "compress_ratio"):
        return False
    if fingerprint(type(module).forward) not in (_FORWARD, _ADDITIVE):
        return False
    norm, names = module.k_layernorm, inspect.unwrap(type(module).forward).__globals__
    norms = (type(norm).forward, getattr(type(norm), "_norm", None))
    rotary = (names.get("apply_rotary_pos_emb"), names.get("rotate_half"))
    if tuple(map(fingerprint, norms)) != _NORM or tuple(map(fingerprint, rotary)) != _ROTARY:
        return False
    # The norm of the blocks is not called any more: what somebody put on it would be left out.
    changed = "forward" in vars(norm) or norm._forward_hooks or norm._forward_pre_hooks
    return not changed and norm.group_size is None and module.index_kv_heads == 1
