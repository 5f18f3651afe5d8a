"""Inputs beside text and pixels that some architectures ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Wanted:
    """What the extra inputs are made for: ``batch`` rows of ``length`` tokens with ``images`` pictures each."""

    config: Any
    batch: int
    length: int
    images: int
    generator: torch.Generator


def add_extras(
    model: PreTrainedModel, inputs: dict[str, Any], accepted: set[str], images: int, generator: torch.Generator
) -> dict[str, Any]:
    """``inputs`` completed for the model's ``forward``, whose argument names are ``accepted``.

    Args:
        images: number of images a row.
    """
    inputs = dict(inputs)
    batch, length = inputs["input_ids"].shape
    wanted = Wanted(model.config, batch, length, images, generator)
    for argument, make in _BY_ARGUMENT.items():
        if argument in accepted and argument not in inputs:
            inputs |= make(wanted)
    if model.config.is_encoder_decoder and model.main_input_name != "input_ids":  # the encoder reads pixels only
        inputs["decoder_input_ids"] = inputs.pop("input_ids")
        inputs["decoder_attention_mask"] = inputs.pop("attention_mask")
    elif model.config.is_encoder_decoder or "self_conditioning_logits" in accepted:
        canvas = getattr(model.config, "canvas_length", 3)
        inputs["decoder_input_ids"] = torch.randint(3, 256, (batch, canvas), generator=generator)
    return inputs


def _boxes(wanted: Wanted) -> dict[str, torch.Tensor]:
    corners = torch.rand(wanted.batch, wanted.length, 2, generator=wanted.generator) * 0.4 + 0.05
    return {"bbox": torch.cat([corners, corners + 0.3], dim=-1)}


def _visible_images(wanted: Wanted) -> dict[str, torch.Tensor]:
    shape = (wanted.batch, wanted.length, wanted.images)
    return {"image_attention_mask": torch.ones(shape, dtype=torch.long)} if wanted.images else {}


def _visible_tiles(wanted: Wanted) -> dict[str, torch.Tensor]:
    if not wanted.images:
        return {}
    shape = (wanted.batch, wanted.length, wanted.images, wanted.config.vision_config.max_num_tiles)
    return {"cross_attention_mask": torch.ones(shape, dtype=torch.long)}


def _image_places(wanted: Wanted) -> dict[str, torch.Tensor]:
    """The last tokens but one give way to the image, so that no row has them in its padding."""
    mask = torch.zeros(wanted.batch, wanted.length, dtype=torch.long)
    mask[:, -wanted.config.latent_query_num - 1 : -1] = 1
    return {"image_embeds_position_mask": mask} if wanted.images else {}


def _protein(wanted: Wanted) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 20, (wanted.batch, 7), generator=wanted.generator)
    return {"protein_input_ids": ids, "protein_attention_mask": torch.ones_like(ids)}


def _robot(wanted: Wanted) -> dict[str, torch.Tensor]:
    config, generator = wanted.config, wanted.generator
    return {
        "state": torch.randn(wanted.batch, config.max_state_dim, generator=generator),
        "noise": torch.randn(wanted.batch, config.chunk_size, config.max_action_dim, generator=generator),
        "timestep": torch.rand(wanted.batch, generator=generator),
    }


_BY_ARGUMENT: dict[str, Callable[[Wanted], dict[str, torch.Tensor]]] = {
    "bbox": _boxes,
    "image_attention_mask": _visible_images,
    "cross_attention_mask": _visible_tiles,
    "image_embeds_position_mask": _image_places,
    "protein_input_ids": _protein,
    "noise": _robot,
}
