"""Inputs of models whose sound runs beside the text, so much of it for every token, or that write sound itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .shrink import FIRST_SPECIAL_ID, FIRST_TEXT_ID

Tensors = dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """How one architecture takes the two.

    Attributes:
        whole: inputs of ``forward``, from the configuration, those of the text, and a generator.
        begun: inputs of ``generate``, from the configuration, those of ``forward``, and how many tokens are to follow.
    """

    whole: Callable[[Any, Tensors, torch.Generator], Tensors]
    begun: Callable[[Any, Tensors, int], Tensors]


def streamed(model: PreTrainedModel, inputs: Tensors, generator: torch.Generator) -> Tensors:
    """``inputs`` of text with the sound beside it, for a model that hears so; others as they are."""
    stream = _STREAMS.get(model.config.model_type)
    return inputs if stream is None else stream.whole(model.config, inputs, generator)


def generation_inputs(model: PreTrainedModel, inputs: Mapping[str, Any], new_tokens: int) -> dict[str, Any]:
    """Inputs of ``model.generate`` for ``new_tokens``, from those that `tiny_inputs` made for ``model(**inputs)``.

    They are the same, but for models that hear while they write: the sound goes on beside the tokens that are written.
    """
    stream = _STREAMS.get(model.config.model_type)
    return dict(inputs) if stream is None else stream.begun(model.config, dict(inputs), new_tokens)


def _mel_beside_text(config: Any, inputs: Tensors, generator: torch.Generator) -> Tensors:
    batch, length = inputs["input_ids"].shape
    shape = (batch, config.audio_config.num_mel_bins, length * config.audio_length_per_tok)
    return inputs | {"input_features": torch.randn(shape, generator=generator), "num_delay_tokens": 6}


def _mel_goes_on(config: Any, inputs: Tensors, new_tokens: int) -> Tensors:
    heard = inputs["input_features"]
    shape = (*heard.shape[:2], new_tokens * config.audio_length_per_tok)
    more = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return inputs | {"input_features": torch.cat([heard, more], dim=2)}


def _codes_beside_text(config: Any, inputs: Tensors, generator: torch.Generator) -> Tensors:
    ids = inputs["input_ids"]
    codes = torch.randint(0, config.codebook_vocab_size - 1, (*ids.shape, config.num_codebooks), generator=generator)
    return inputs | {"input_ids": torch.cat([ids[..., None], codes], dim=2)}


def _wave(config: Any, inputs: Tensors, new_tokens: int) -> Tensors:
    """`generate` takes text and a waveform, and makes codes of that."""
    ids = inputs["input_ids"][..., 0]
    samples = (ids.shape[1] + new_tokens) * config.codec_config.frame_size
    wave = torch.randn(ids.shape[0], 1, samples, generator=torch.Generator().manual_seed(1))
    return inputs | {"input_ids": ids, "input_values": wave}


def _codebooks(config: Any, inputs: Tensors, generator: torch.Generator) -> Tensors:
    """A row of text is several rows of codes, with one mask."""
    batch, length = inputs["input_ids"].shape
    shape = (batch * config.num_codebooks, length)
    return inputs | {"input_ids": torch.randint(FIRST_TEXT_ID, FIRST_SPECIAL_ID, shape, generator=generator)}


def _from_start(config: Any, inputs: Tensors, new_tokens: int) -> Tensors:
    """What stands for a code that is not there yet is no code itself, and is taken away from what was written."""
    absent = config.vocab_size
    return inputs | {
        "decoder_start_token_id": absent,
        "pad_token_id": absent,
        "num_return_sequences": 1,
        "num_beams": 1,
    }


_STREAMS = {
    "kyutai_speech_to_text": Stream(_codes_beside_text, _wave),
    "musicgen_decoder": Stream(_codebooks, _from_start),
    "musicgen_melody_decoder": Stream(_codebooks, _from_start),
    "voxtral_realtime": Stream(_mel_beside_text, _mel_goes_on),
}
