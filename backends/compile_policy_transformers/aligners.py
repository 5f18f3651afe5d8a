"""Layers that attend to something beside the text only if any of it counts: traced without that question.

Cause: Evolla's layers ask whether a mask lets anything through (modeling_evolla.py,
``EvollaSequenceAlignerCrossAttention.forward``, ``protein_kv_attn_mask.any()``), which only its values tell. While a
decoder is traced, such a layer has a ``forward`` of ours: the same masks, attention and gates, all computed, and taken
where the mask lets something through.

A layer is known by its code, whatever its class is called: the fingerprint of ``forward`` has to be that of what this
was written against. One whose code is another is traced as it is, which fails at that line, so
that the decoder runs eager. Nothing of Transformers is changed. Drop this once the stock layer asks for no values.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from compile_policy_transformers import releases
from compile_policy_transformers.known_code import fingerprint
from compile_policy_transformers.swapped import swapped

#: Fingerprint of the code that the twin stands for.
_FORWARD = releases.EVOLLA_ALIGNER


def asking_layers(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers in ``decoder`` whose code is known."""
    own = [m for m in decoder.modules() if hasattr(m, "gate_attention") and "forward" not in vars(m)]
    return [m for m in own if fingerprint(type(m).forward) == _FORWARD]


def attending(layers: list[torch.nn.Module]) -> AbstractContextManager[None]:
    """Let these layers attend in a trace whatever their masks hold."""
    return swapped(layers, _forward)


def _forward(
    self: Any,
    query_states: torch.Tensor,
    protein_kv_states: torch.Tensor | None,
    structure_kv_states: torch.Tensor | None,
    msa_kv_states: torch.Tensor | None,
    query_attn_mask: torch.Tensor | None,
    protein_kv_attn_mask: torch.Tensor | None = None,
    structure_kv_attn_mask: torch.Tensor | None = None,
    msa_kv_attn_mask: torch.Tensor | None = None,
    protein_batch_mask: torch.Tensor | None = None,
    structure_batch_mask: torch.Tensor | None = None,
    msa_batch_mask: torch.Tensor | None = None,
    **unused: Any,  # the cache, by the name that a release gives it
) -> torch.Tensor:
    """The layer's ``forward``: (batch, queries, hidden size)."""
    states = (protein_kv_states, structure_kv_states, msa_kv_states)
    given = (protein_kv_attn_mask, structure_kv_attn_mask, msa_kv_attn_mask)
    rows = (protein_batch_mask, structure_batch_mask, msa_batch_mask)
    if not torch.compiler.is_dynamo_compiling():  # another thread
        out: torch.Tensor = type(self).forward(self, query_states, *states, query_attn_mask, *given, *rows)
        return out
    masks = [_mask(*three) for three in zip(states, given, rows, strict=True)]
    seen = [mask.any() for mask in masks if mask is not None]
    if not seen:
        return query_states
    attended = torch.tanh(self.gate_attention) * self.cross_attention(query_states, *states, query_attn_mask, *masks)
    mixed = query_states + attended
    mixed = mixed + self.ff(mixed) * torch.tanh(self.gate_ffw)
    return torch.where(torch.stack(seen).any(), mixed, query_states)


def _mask(states: torch.Tensor | None, given: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor | None:
    """(batch, states) which states count: as given, or all those of the rows that count."""
    if states is None or given is not None or rows is None:
        return None if states is None else given
    return torch.ones(states.shape[:2], device=states.device) * rows[:, None]
