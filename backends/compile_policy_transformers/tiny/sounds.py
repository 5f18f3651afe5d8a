"""Sound for models that hear: mel frames, waveforms or codes in the form that an architecture expects."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .images import Images
from .styles import first

#: Arguments of a forward that hold sound, and those that say which frames are real.
SOUNDS = ("input_features", "audio_input_features", "input_values", "audio_input_ids")
_MASKS = (
    *("input_features_mask", "feature_attention_mask", "audio_attention_mask", "input_values_mask"),
    *("audio_input_ids_mask", "padding_mask"),
)
NO_SOUNDS = Images({}, [], -1)


@dataclass(frozen=True)
class Form:
    """How an architecture takes sound.

    Attributes:
        bins_first: a piece is (bins, frames) and not (frames, bins); a waveform has no bins.
        fixed: every piece is padded to the length that the tower was built for.
        step: pieces are padded to a multiple of what this says of the configuration.
        samples: samples that count as one frame, of a model that takes the waveform.
        extras: further inputs, from (configuration, frames of each piece, tokens of each piece).
    """

    bins_first: bool = False
    fixed: bool = False
    step: Callable[[Any], int] = lambda config: 1
    samples: int = 1
    extras: Callable[[Any, list[int], list[int]], dict[str, Any]] = lambda config, frames, tokens: {}


def _chunk(config: Any) -> int:
    return 2 * int(config.n_window)


_FORMS: dict[str, Form] = {
    "dots3_note": Form(
        bins_first=True,
        extras=lambda c, frames, tokens: {"chunk_sample_lengths": torch.tensor([n * c.hop_length for n in frames])},
    ),
    "glmasr": Form(bins_first=True, step=lambda config: 8),
    "granite_speech": Form(extras=lambda c, frames, tokens: {"input_features_mask": _lengths_mask(tokens).bool()}),
    "moss_transcribe_diarize": Form(
        bins_first=True,
        fixed=True,
        extras=lambda c, frames, tokens: {"padding_mask": torch.ones(len(frames), 480_000, dtype=torch.long)},
    ),
    "muse_spark": Form(step=lambda config: int(config.samples_per_token), samples=12),
    "nemo_speechlm": Form(step=lambda config: 8),
    "phi4_multimodal": Form(extras=lambda c, frames, tokens: {"audio_embed_sizes": torch.tensor(tokens)}),
    "qwen2_5_omni_thinker": Form(bins_first=True),
    "qwen2_audio": Form(bins_first=True, fixed=True),
    "qwen3_asr": Form(bins_first=True, step=_chunk),
    "qwen3_omni_moe_thinker": Form(bins_first=True),
    "voxtral": Form(bins_first=True, fixed=True),
}
_FORMS["granite_speech_plus"] = _FORMS["granite_speech"]


def make_sounds(model: PreTrainedModel, frames: Sequence[int], batch: int, generator: torch.Generator) -> Images:
    """Sound inputs and placeholder tokens for ``batch`` rows with pieces of so many ``frames`` each.

    Raises:
        ValueError: the model takes no sound.
    """
    if not frames:
        return NO_SOUNDS
    argument, config = sound_argument(model), _sound_config(model.config)
    token_id = _placeholder(model.config)
    if argument is None or config is None or token_id is None:
        raise ValueError(f"{type(model).__name__} takes no sound.")
    form = _FORMS.get(model.config.model_type, Form())
    lengths = [_rounded(form, config, n) for n in frames]
    same = first(model.config, "audio_soft_tokens_per_image")  # of a model that pads the features of every piece
    tokens = [_count(model, form, argument, n) if same is None else int(same) for n in lengths]
    tensors = _tensors(model, form, argument, lengths * batch, tokens * batch, generator)
    pieces = [_with_markers(model.config, token_id, n) for n in tokens]
    return Images(tensors, pieces, token_id, kind=3)


def sound_argument(model: nn.Module) -> str | None:
    """The argument of the model's ``forward`` that holds sound."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in SOUNDS if name in accepted), None)


def _sound_config(config: Any) -> Any:
    return first(config, "audio_config", "acoustic_tokenizer_encoder_config", "encoder_config")


def _placeholder(config: Any) -> int | None:
    found = first(config, "audio_token_id", "audio_token_index") or first(_sound_config(config), "audio_token_id")
    return None if found is None else int(found)


def _rounded(form: Form, config: Any, frames: int) -> int:
    if form.fixed:
        return 2 * int(config.max_source_positions)
    step = form.step(config)
    return -(-frames * form.samples // step) * step


def _tensors(
    model: PreTrainedModel,
    form: Form,
    argument: str,
    lengths: list[int],
    tokens: list[int],
    generator: torch.Generator,
) -> dict[str, Any]:
    """Pieces padded to the longest, the mask of their frames, and what else the architecture wants."""
    config, longest = _sound_config(model.config), max(lengths)
    mask = _lengths_mask(lengths)
    if argument == "input_values":
        values = torch.randn(len(lengths), longest, generator=generator) * mask
        values = values[:, None] if hasattr(config, "downsampling_ratios") else values  # one channel
    elif argument == "audio_input_ids":
        size = (len(lengths), longest, _bins(config))
        values = torch.randint(0, config.mel_vocab_size, size, generator=generator)
    else:
        values = torch.randn(len(lengths), longest, _bins(config), generator=generator) * mask[..., None]
        values = values.transpose(1, 2).contiguous() if form.bins_first else values
    accepted = inspect.signature(model.forward).parameters
    named = {name: mask.bool() if _is_bool(model, name) else mask for name in _MASKS if name in accepted}
    return {argument: values, **named, **form.extras(config, lengths, tokens)}


def _lengths_mask(lengths: list[int]) -> torch.Tensor:
    """(pieces, longest), one where a piece has a frame."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def _is_bool(model: PreTrainedModel, name: str) -> bool:
    return model.config.model_type in ("gemma3n", "gemma4", "gemma4_unified", "phi4_multimodal", "vibevoice_asr")


def _bins(config: Any) -> int:
    """Values of a frame."""
    found = first(config, "feature_size", "num_mel_bins", "n_mel_bins", "input_dim", "input_size", "audio_embed_dim")
    nested = next((value for value in vars(config).values() if hasattr(value, "num_mel_bins")), None)
    found = found if found is not None else getattr(nested, "num_mel_bins", 128)
    return int(found) * int(getattr(config, "num_stacked_frames", 1))


def _with_markers(config: Any, token_id: int, count: int) -> torch.Tensor:
    start = first(config, "audio_start_token_id", "audio_bos_token_id")
    end = first(config, "audio_end_token_id", "audio_eos_token_id")
    return torch.tensor([start] * (start is not None) + [token_id] * count + [end] * (end is not None))


@torch.no_grad()
def _count(model: PreTrainedModel, form: Form, argument: str, frames: int) -> int:
    """Tokens of one piece, counted on the features that the model computes."""
    generator = torch.Generator().manual_seed(0)
    tensors = _tensors(model, form, argument, [frames], [1], generator)
    for owner in (getattr(model, "model", None), model):  # a wrapper may hide arguments
        method: Any = getattr(owner, "get_audio_features", None)
        if method is None or "args" in inspect.signature(method).parameters:
            continue
        accepted = inspect.signature(method).parameters
        features = method(**{name: value for name, value in tensors.items() if name in accepted})
        valid = getattr(features, "attention_mask", None)
        rows = first(features, "pooler_output", "last_hidden_state")
        rows = rows if isinstance(rows, torch.Tensor) else features
        return int(valid.sum()) if valid is not None else int(rows.shape[:-1].numel())
    tower = next(m for name, m in model.named_modules() if name.endswith(("audio_tower", "audio_embed.encoder")))
    lengths = getattr(tower, "_get_feat_extract_output_lengths", None)
    if lengths is not None:
        return int(lengths(torch.tensor(frames))[1])
    out = tower(tensors[argument], tensors["audio_attention_mask"])
    return int(out.shape[1])
