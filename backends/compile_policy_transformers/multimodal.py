"""Encoders of a multimodal model: which modules they are and which modality each encodes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compile_policy.errors import UnsupportedModelError

from .components import Found, as_model, generates, holds, qualname, rule_for

MODALITIES = ("image", "video", "audio")

# Transformers' own names for encoders, and what an encoder class says it is fed with (language models: "input_ids").
_NAMES = {
    *("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower"),
    *("audio_tower", "audio_encoder", "speech_encoder"),
}
_PICTURES = {"pixel_values", "pixel_values_videos", "flattened_patches"}
_SOUNDS = {"input_features", "input_values", "audio_values"}


def _get_encoder_cls(config_or_model: PreTrainedConfig | nn.Module, modality: str) -> type[nn.Module]:
    """Class of the encoder that a call of the model runs for ``modality``; nothing is allocated for a configuration.

    Raises:
        ValueError: the modality is none of image, video, audio.
        UnsupportedModelError: the model has no separate encoder for it.
    """
    if modality not in MODALITIES:
        raise ValueError(f"modality is {modality!r}, but should be one of {', '.join(MODALITIES)}.")
    model = as_model(config_or_model)
    for found in find_encoders(model):
        if modality in found.modalities:
            return type(found.module)
    raise UnsupportedModelError(
        f"{type(model).__name__} has no separate {modality} encoder.",
        remedy="Leave out --compile-mm-encoder (compile_mm_encoder=False) for this model.",
    )


def find_encoders(model: nn.Module) -> list[Found]:
    """Every encoder of the model: those that it names itself, and other towers in its tree.

    A tower that several modalities share is one component; its role names the first.
    """
    modalities: dict[nn.Module, set[str]] = {}
    for modality in MODALITIES:
        tower = _named_encoder(model, modality)
        if tower is not None and (modality == "audio" or _takes(model, modality)):
            modalities.setdefault(tower, set()).add(modality)
    rule = rule_for(model)
    for modality, path in rule.encoders if rule is not None else ():
        modalities.setdefault(model.get_submodule(path), set()).add(modality)
    for tower in _towers(model, decoder_as_named(model)):
        if not any(holds(known, tower) or holds(tower, known) for known in modalities):
            modalities[tower] = _modalities_by_name(model, tower)
    _separate_video_tower(modalities)
    return [_found(model, tower, kinds) for tower, kinds in modalities.items()]


def as_encoder(model: nn.Module) -> Found | None:
    """The model itself as the encoder that it is, such as a ViT without a head; ``None`` for any other model."""
    if not _is_tower("", model) or generates(model):
        return None
    assert isinstance(model, PreTrainedModel)
    modality = "audio" if model.main_input_name in _SOUNDS else "image"
    return Found(f"encoder[{modality}]", "", model, frozenset({modality}))


def _found(model: nn.Module, tower: nn.Module, kinds: set[str]) -> Found:
    first = next(m for m in MODALITIES if m in kinds)
    path = qualname(model, tower)
    assert path is not None
    return Found(f"encoder[{first}]", path, tower, frozenset(kinds))


def _takes(model: nn.Module, modality: str) -> bool:
    declared = getattr(model, "input_modalities", ())
    return modality in declared or hasattr(model, f"get_{modality}_features")


def _named_encoder(model: nn.Module, modality: str) -> nn.Module | None:
    """What ``get_encoder`` answers, where that is an encoder.

    Without one it answers the model itself or its base; encoder-decoder models answer an encoder that reads token ids
    too, which is no separate encoder.
    """
    get_encoder = getattr(model, "get_encoder", None)
    if get_encoder is None:
        return None
    try:
        tower = get_encoder(modality=modality)
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        return None  # some models answer for the modalities they have, and raise for the others
    if not isinstance(tower, nn.Module) or not qualname(model, tower) or _reads_token_ids(tower):
        return None
    decoder = decoder_as_named(model)
    return None if decoder is not None and holds(tower, decoder) else tower


def decoder_as_named(model: nn.Module) -> nn.Module | None:
    """What the model's own ``get_decoder`` answers."""
    get_decoder = getattr(model, "get_decoder", None)
    try:
        decoder: Any = get_decoder() if get_decoder is not None else None
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        return None
    return decoder if isinstance(decoder, nn.Module) else None


def _reads_token_ids(module: nn.Module) -> bool:
    return "input_ids" in inspect.signature(module.forward).parameters


def _towers(module: nn.Module, decoder: nn.Module | None) -> Iterator[nn.Module]:
    """The outermost modules below ``module`` that are fed with pixels or sound, and do not hold the decoder."""
    for name, child in module.named_children():
        holds_more = decoder is not None and child is not decoder and holds(child, decoder)
        if _is_tower(name, child) and not holds_more:
            yield child
        else:
            yield from _towers(child, decoder)


def _is_tower(name: str, module: nn.Module) -> bool:
    if not isinstance(module, PreTrainedModel) or _reads_token_ids(module):
        return False
    if "encoder_hidden_states" in inspect.signature(module.forward).parameters:  # a decoder of sound (speecht5)
        return False
    # An image tokenizer (VQ-VAE) is used through encode(): calling it, and so compiling its call, never happens.
    if hasattr(module, "encode") and hasattr(module, "decode"):
        return False
    return name in _NAMES or module.main_input_name in _PICTURES | _SOUNDS


def _modalities_by_name(model: nn.Module, tower: nn.Module) -> set[str]:
    assert isinstance(tower, PreTrainedModel)
    name = (qualname(model, tower) or "").rsplit(".", 1)[-1]
    if tower.main_input_name in _SOUNDS or "audio" in name or "speech" in name:
        return {"audio"}
    if "video" in name:
        return {"video"}
    return {"image"}


def _separate_video_tower(modalities: dict[nn.Module, set[str]]) -> None:
    """A tower of its own for video means that the image tower does not see any."""
    if {"video"} in modalities.values():
        for kinds in modalities.values():
            if "image" in kinds:
                kinds.discard("video")
