"""What no general rule can tell about how a decoder takes its arguments, one row an architecture.

A row is needed where a decoder reads an argument in a form of its own. It names the cause, so that it can be taken out
when that is gone; `tests/test_decoder_rules.py` fails for a row that is no longer needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class DecoderRule:
    """How one architecture's decoder differs.

    Attributes:
        model_type: of the decoder's own configuration.
        why: what it does with the argument; ``until``: what would make the row needless.
        padding_mask: it reads the padding mask itself, so the mask stays (batch, keys).
        padding_dtype: of the mask that it makes where none is given.
        only_hides: all it does with the padding mask is to hide keys, so that a prepared mask stands for one.
        returns_mask: it returns that mask, which is put into the result as the caller gave it.
        alike: tensor arguments that are the same for all rows; the first dim of others is taken for the batch.
        wraps_cache: it puts a plain `DynamicCache` into an `EncoderDecoderCache`, and returns that.
        ids: the argument in which it reads token ids beside their embeddings, where its configuration has
            ``ids_where``; its method ``ids_from`` finds those of embeddings. Its cache keeps the last ones, and ends of
            sequences where nothing came before.
    """

    model_type: str
    why: str
    until: str
    padding_mask: bool = False
    padding_dtype: torch.dtype = torch.long
    only_hides: bool = False
    returns_mask: bool = False
    alike: tuple[str, ...] = ()
    wraps_cache: bool = False
    ids: str = ""
    ids_where: str = ""
    ids_from: str = ""


RULES: tuple[DecoderRule, ...] = (
    DecoderRule(
        "bloom",
        "modeling_bloom.py, build_alibi_tensor: the slopes of ALiBi are counted along the padding mask",
        until="BloomModel takes position ids, or its bias, as an argument",
        padding_mask=True,
    ),
    DecoderRule(
        "udop",
        "modeling_udop.py, UdopStack.forward: returns the padding mask beside the hidden states",
        until="BaseModelOutputWithAttentionMask is gone",
        padding_mask=True,
        padding_dtype=torch.float32,
        only_hides=True,
        returns_mask=True,
    ),
    DecoderRule(
        "voxtral_realtime_text",
        "modeling_voxtral_realtime.py, VoxtralRealtimeTextModel.forward: t_cond, the delay, has a first dim of 1",
        until="a dim of 1 can be told from a batch of 1",
        alike=("t_cond",),
    ),
    DecoderRule(
        "blip_text_model",
        "modeling_blip_text.py, BlipTextEncoder.forward: a decoder by name, an encoder-decoder by its cache",
        until="BlipTextModel is handed an EncoderDecoderCache by generate",
        wraps_cache=True,
    ),
    DecoderRule(
        "qwen4_exp_text",
        "modeling_qwen4_exp.py, Qwen4ExpTextNGramEmbedding.forward: hashes the last token ids of a sequence",
        until="its history of ids begins with zeros, and the model around hands the ids on in every call",
        ids="ple_input_ids",
        ids_where="ple_layer_ids",
        ids_from="reverse_embedding",
    ),
)

NO_RULE = DecoderRule("", "", "")


def rule_of(config: Any) -> DecoderRule:
    """The rule of a decoder with this configuration; one that asks for nothing where there is none."""
    model_type = getattr(config, "model_type", None)
    return next((rule for rule in RULES if rule.model_type == model_type), NO_RULE)
