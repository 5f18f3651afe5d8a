"""Attention as the policy traces it: registered with Transformers' own attention and mask interfaces.

Three names. ``DECODER``: a mask is always given, dense and boolean, so that no branch on sizes (``is_causal``, "skip
the mask") ends up in a graph; prefill, decode and padding are then one graph. ``ADDITIVE``: the same for decoders that
write their attention out and add the mask to the scores. ``ENCODER``: packed images or windows,
described by ``cu_seq_lens``, go through an operator that stays opaque to the graph; its name contains "flash" because
that is how Transformers' vision towers decide to hand over the lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import has_static_value
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compile_policy.masked_attention import causal_mark, masked_attention
from compile_policy_transformers.packed_attention import varlen_attention as varlen_attention

DECODER = "compile_policy"
ADDITIVE = "compile_policy_additive"
#: Masks alone, for what runs eager before a graph; on the configuration: which masks are made, and those that were.
NOTED = "compile_policy_noted"
NOTED_AS, NOTED_MASKS = "_noted_as", "_noted_masks"
#: Set on the configuration that masks are made from while causal marks may take the place of causal masks.
MARKS = "_causal_marks"
#: Marks are for prompts of at least so many tokens: below, a dense mask costs next to nothing.
MARKED_FROM = 128
ENCODER = "compile_policy_flash_varlen"
CAUSAL_ENCODER = f"{ENCODER}_causal"

#: Implementations that compute what `dense_attention` computes; others are the user's choice and traced as they are.
REPLACED = frozenset({"sdpa", "eager", None})


def chosen_functions(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, function) of the attention, and of the masks for it, that configurations below ``module`` choose."""
    for config in configs_below(module):
        name = getattr(config, "_attn_implementation", None)
        for kind, registry in (("attention", ALL_ATTENTION_FUNCTIONS), ("masks", ALL_MASK_ATTENTION_FUNCTIONS)):
            if name in registry:
                yield f"the {kind} {name!r}", registry[name]


def dense_mask(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Transformers' boolean mask (batch, 1, query, key), never skipped in favour of an ``is_causal`` flag."""
    kwargs["allow_is_causal_skip"] = False
    kwargs["allow_is_bidirectional_skip"] = False
    mask = sdpa_mask(*args, **kwargs)
    assert mask is not None
    return mask


def decoder_mask(*args: Any, config: Any = None, **kwargs: Any) -> torch.Tensor | None:
    """`dense_mask`, but none where nothing is masked whatever the sizes: an encoder's output without padding.

    A `causal_mark` where ``config`` takes marks and Transformers says that SDPA's ``is_causal`` means the same.
    """
    everything = kwargs.get("mask_function") is bidirectional_mask_function and kwargs.get("attention_mask") is None
    if everything and kwargs.get("allow_is_bidirectional_skip"):
        return None
    if not getattr(config, MARKS, False) or not kwargs.get("allow_is_causal_skip"):
        return dense_mask(*args, **kwargs)
    kwargs["allow_is_bidirectional_skip"] = False
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    if mask is not None:
        return mask
    device = kwargs.get("device", "cpu")
    return causal_mark(kwargs["batch_size"], kwargs["q_length"], kwargs["kv_length"], device)


def additive_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> torch.Tensor | None:
    """`decoder_mask` as numbers to add to the scores: 0, and the lowest of ``dtype`` where attention is closed."""
    mask = decoder_mask(*args, **kwargs)
    return None if mask is None else added(mask, dtype)


def added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as numbers to add to the scores: 0, and the lowest of ``dtype``; any other mask as it is."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min)


def causal_where_open(*args: Any, **kwargs: Any) -> torch.Tensor:
    """`dense_mask` as the attention of a module that calls itself causal sees it.

    Transformers leaves a bidirectional mask out where it hides nothing, and SDPA is causal without one.
    """
    mask = dense_mask(*args, **kwargs)
    if not kwargs.get("allow_is_bidirectional_skip"):
        return mask
    return torch.where(mask.all(), torch.ones_like(mask).tril(), mask)


def noted_mask(*args: Any, config: Any, **kwargs: Any) -> torch.Tensor | None:
    """The mask of ``DECODER`` or ``ADDITIVE``, put down in the list that the configuration brings."""
    make = additive_mask if getattr(config, NOTED_AS) == ADDITIVE else decoder_mask
    mask = make(*args, config=config, **kwargs)
    getattr(config, NOTED_MASKS).append(mask)
    return mask


def dense_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention under a given mask.

    Args:
        query: (batch, heads, queries, head dim); ``key`` and ``value`` may have fewer heads (grouped queries).
        attention_mask: boolean or additive, broadcastable to (batch, heads, queries, keys), or ``None`` for
            attention without restrictions. A causal module always gets a mask from the policy.
        s_aux: (heads,) attention sinks, logits that take part in the softmax and are dropped after it.
        sinks: the same as (batch, heads, queries, 1), a sink for each query.

    Returns:
        (batch, queries, heads, head dim) and ``None`` for the weights.
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if attention_mask is None and causal:
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{type(module).__name__} is causal and was called without a mask")
        # Another thread runs eager: it began, and left its mask to SDPA, before this thread set out to trace.
        attention_mask = _left_to_sdpa(query, key)
    groups = query.shape[1] // key.shape[1]
    if getattr(module, "num_key_value_groups", groups) != groups:
        raise ValueError(f"{query.shape[1]} heads of queries do not fit {key.shape[1]} of keys and values")
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[2], 1)
    explicit = softcap is not None or sinks is not None
    # The CPU kernel reads grouped heads in place, under a mask too; elsewhere a mask would mean the slow fallback.
    in_place = groups > 1 and query.device.type == "cpu" and not explicit
    if groups > 1 and not in_place:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if position_bias is not None:
        # Expanded here: left to SDPA, whether it has to be is a condition on the batch.
        attention_mask = _with_bias(attention_mask, position_bias, query.dtype).expand(query.shape[0], -1, -1, -1)
    if scaling is not None and not has_static_value(scaling):
        # Made of a size, as channel attention has it. SDPA takes a number: the graph would hold for one size.
        query, scaling = query * scaling, 1.0
    if attention_mask is not None and _is_opaque(query, attention_mask, dropout, explicit):
        return masked_attention(query, key, value, attention_mask, scaling), None
    if explicit:
        out = _explicit(query, key, value, attention_mask, scaling, softcap, sinks)
    else:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=in_place
        )
    # Not .contiguous(): that asks whether a copy is needed, and the answer differs for a single token.
    return out.transpose(1, 2).clone(memory_format=torch.contiguous_format), None


def _is_opaque(query: torch.Tensor, mask: torch.Tensor, dropout: float, explicit: bool) -> bool:
    """True if `masked_attention` may compute it: a boolean mask, nothing special, no gradients, no autocast."""
    if mask.dtype is not torch.bool or mask.dim() != 4 or dropout != 0.0 or explicit:
        return False
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled(query.device.type)


def _left_to_sdpa(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """What Transformers' own SDPA attention hides from a causal module that was given no mask."""
    queries, keys = query.shape[2], key.shape[2]
    return None if queries == 1 else torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()


def _with_bias(mask: torch.Tensor | None, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask is None:
        return bias
    return torch.where(mask, bias, torch.finfo(dtype).min) if mask.dtype is torch.bool else mask + bias


def _explicit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax attention written out, for what SDPA has no argument for."""
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype is torch.bool else scores + mask
    if sinks is None:
        weights = F.softmax(scores, dim=-1, dtype=torch.float32)
    else:
        weights = F.softmax(torch.cat([scores, sinks], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]
    return weights.to(value.dtype) @ value


def encoder_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of an encoder: packed sequences when lengths are given, else `dense_attention`."""
    if cu_seq_lens_q is None:
        return dense_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("dropout"):
        raise ValueError("packed attention has no dropout")  # while traced: the tower runs eager, with this reason
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return varlen_attention(query, key, value, cu_seq_lens_q, scale), None


AttentionInterface.register(DECODER, dense_attention)
AttentionMaskInterface.register(DECODER, decoder_mask)
AttentionInterface.register(ADDITIVE, dense_attention)
AttentionMaskInterface.register(ADDITIVE, additive_mask)
AttentionMaskInterface.register(NOTED, noted_mask)
AttentionInterface.register(ENCODER, encoder_attention)
AttentionMaskInterface.register(ENCODER, dense_mask)
AttentionInterface.register(CAUSAL_ENCODER, encoder_attention)
AttentionMaskInterface.register(CAUSAL_ENCODER, causal_where_open)


def encoder_name(tower: torch.nn.Module) -> str:
    """The attention that a tower is traced with."""
    flags = {m.is_causal for m in tower.modules() if isinstance(getattr(m, "is_causal", None), bool)}
    by_sdpa = getattr(getattr(tower, "config", None), "_attn_implementation", None) == "sdpa"
    return CAUSAL_ENCODER if flags == {True} and by_sdpa else ENCODER


@contextmanager
def traced_with(configs: list[PreTrainedConfig], name: str) -> Iterator[None]:
    """Let modules that read ``configs`` use the attention ``name``; restored on leaving, whatever happens.

    Other threads that run the model eager meanwhile see it too, and get equal results from it.
    """
    saved: list[tuple[Any, Any]] = []
    for config in configs:
        given = config._attn_implementation
        if given in REPLACED:
            saved.append((config, given))
    try:
        for config, _ in saved:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, given in saved:
            config._attn_implementation_internal = given


def is_eager(module: torch.nn.Module) -> bool:
    """Whether the user chose attention that is written out, which also returns its weights, anywhere in ``module``."""
    return any(config._attn_implementation == "eager" for config in configs_below(module))


def configs_below(module: torch.nn.Module) -> list[PreTrainedConfig]:
    """The distinct configurations that ``module`` and its sub-modules read their attention from."""
    found: dict[int, PreTrainedConfig] = {}
    for sub in module.modules():
        config = getattr(sub, "config", None)
        if isinstance(config, PreTrainedConfig):
            found[id(config)] = config
    return list(found.values())
