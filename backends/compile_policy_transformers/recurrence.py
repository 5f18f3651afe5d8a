"""Linear attention and state-space scans as operators that stay opaque to a graph.

Transformers' torch code for them loops over chunks or tokens in Python, so that a graph would hold for one number of
chunks. Each operator here runs that very code at call time, on the tensors of the call, and picks the form for a
single token or for many as the model itself does. ``module`` names the Python module that has the functions.
None of them has a derivative.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch


def _function(module: str, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _settled(
    out: torch.Tensor, state: Any, dtype: torch.dtype, like: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and new state as the fake kernels promise them: contiguous, and no view of an argument."""
    out = out.to(dtype).contiguous()
    return out, out.new_empty(0) if like is None else state.to(like.dtype).contiguous()


@torch.library.custom_op("compile_policy::delta_rule", mutates_args=())
def delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
    normalized: bool,
    module: str,
    chunks: str,
    step: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule, with one decay a head (Gated DeltaNet) or a channel (Kimi Delta Attention).

    Args:
        query: (batch, tokens, key heads, key dim), like ``key``; ``value``: (batch, tokens, value heads, value dim).
        decay: (batch, tokens, value heads[, key dim]), in log space; ``beta``: (batch, tokens, value heads).
        state: (batch, value heads, key dim, value dim) after the tokens before, zeros where there are none.
        normalized: whether queries and keys are divided by their length.
        chunks, step: functions for many tokens and for one.

    Returns:
        Output in the shape of ``value`` and the dtype of ``query``; the state after the call, empty without one.
    """
    single = state is not None and query.shape[1] == 1
    out, after = _function(module, step if single else chunks)(
        query,
        key,
        value,
        g=decay,
        beta=beta,
        initial_state=state,
        output_final_state=state is not None,
        use_qk_l2norm_in_kernel=normalized,
    )
    return _settled(out, after, query.dtype, state)


@delta_rule.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
    normalized: bool,
    module: str,
    chunks: str,
    step: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = value.new_empty(value.shape, dtype=query.dtype)
    return out, out.new_empty(0) if state is None else state.new_empty(state.shape)


@torch.library.custom_op("compile_policy::chunk_scan", mutates_args=())
def chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    decay: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    state: torch.Tensor | None,
    chunk_size: int,
    softplus: bool,
    dt_min: float,
    dt_max: float | None,
    module: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state-space scan of Mamba 2.

    Args:
        x: (batch, tokens, heads, head dim); ``dt``: (batch, tokens, heads); ``decay``, ``skip``, ``dt_bias``: (heads,).
        b, c: (batch, tokens, groups, state size).
        state: (batch, heads, head dim, state size) after the tokens before, zeros where there are none.
        dt_min, dt_max: limits of ``dt`` in the form for many tokens; ``None`` is infinity.

    Returns:
        Output in the shape of ``x``, at least float32; the state after the call, empty without one.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if state is None or x.shape[1] > 1:
        result = _function(module, "mamba2_chunk_scan")(
            x,
            dt,
            decay,
            b,
            c,
            chunk_size=chunk_size,
            D=skip,
            dt_bias=dt_bias,
            initial_states=state,
            dt_softplus=softplus,
            dt_limit=(dt_min, float("inf") if dt_max is None else dt_max),
            return_final_states=state is not None,
        )
        out, after = result if state is not None else (result, None)
        return _settled(out, after, dtype, state)
    after = state.clone()  # the function writes into it
    head_dim, size = x.shape[3], b.shape[3]
    out = _function(module, "mamba2_selective_state_update")(
        after,
        x[:, 0],
        dt.transpose(1, 2).expand(-1, -1, head_dim),
        decay[:, None, None].expand(-1, head_dim, size).float(),
        b[:, 0],
        c[:, 0],
        None if skip is None else skip[:, None].expand(-1, head_dim),
        dt_bias=None if dt_bias is None else dt_bias[:, None].expand(-1, head_dim),
        dt_softplus=softplus,
    )
    return _settled(out[:, None], after, dtype, state)


@chunk_scan.register_fake
def _(
    x: torch.Tensor,
    dt: torch.Tensor,
    decay: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    state: torch.Tensor | None,
    chunk_size: int,
    softplus: bool,
    dt_min: float,
    dt_max: float | None,
    module: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    return out, out.new_empty(0) if state is None else state.new_empty(state.shape)


@torch.library.custom_op("compile_policy::selective_scan", mutates_args=())
def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    decay: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor | None,
    gate: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    state: torch.Tensor | None,
    softplus: bool,
    mambapy: bool,
    associative: bool,
    module: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The selective scan of Mamba.

    Args:
        x: (batch, channels, tokens), like ``dt`` and ``gate``; ``decay``: (channels, state size); ``skip``,
            ``dt_bias``: (channels,).
        b, c: (batch, state size, tokens).
        state: (batch, channels, state size) after the tokens before. As in Transformers, a call of several tokens
            starts from zeros whatever it is.
        mambapy, associative: which implementations the model may use for many tokens.

    Returns:
        Output in the shape of ``x``, at least float32; the state after the call, empty without one.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if state is None or x.shape[2] > 1:
        result = _function(module, "mamba_selective_scan")(
            x,
            dt,
            decay,
            b,
            c,
            D=skip,
            z=gate,
            delta_bias=dt_bias,
            delta_softplus=softplus,
            return_last_state=state is not None,
            use_mambapy=mambapy,
            use_associative_scan=associative,
        )
        out, after = result if state is not None else (result, None)
        return _settled(out, after, dtype, state)
    after = state.clone()  # the function writes into it
    out = _function(module, "mamba_selective_state_update")(
        after,
        x[..., 0],
        dt[..., 0],
        decay,
        b[..., 0],
        c[..., 0],
        skip,
        z=None if gate is None else gate[..., 0],
        dt_bias=dt_bias,
        dt_softplus=softplus,
    )
    return _settled(out[..., None], after, dtype, state)


@selective_scan.register_fake
def _(
    x: torch.Tensor,
    dt: torch.Tensor,
    decay: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor | None,
    gate: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    state: torch.Tensor | None,
    softplus: bool,
    mambapy: bool,
    associative: bool,
    module: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    return out, out.new_empty(0) if state is None else state.new_empty(state.shape)
