"""Inputs beside text and pixels that some architectures ask for."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from .styles import first


def add_extras(
    model: PreTrainedModel, inputs: dict[str, Any], accepted: set[str], images: int, generator: torch.Generator
) -> dict[str, Any]:
    """``inputs`` completed for the model's ``forward``, whose argument names are ``accepted``.

    Args:
        images: number of images a row.
    """
    inputs = dict(inputs)
    ids = inputs["input_ids"]
    batch, length = ids.shape
    if model.config.is_encoder_decoder and model.main_input_name != "input_ids":  # the encoder reads pixels only
        inputs["decoder_input_ids"] = inputs.pop("input_ids")
        inputs["decoder_attention_mask"] = inputs.pop("attention_mask")
    elif model.config.is_encoder_decoder or "self_conditioning_logits" in accepted:
        canvas = getattr(model.config, "canvas_length", 3)
        inputs["decoder_input_ids"] = torch.randint(3, 256, (batch, canvas), generator=generator)
    if "bbox" in accepted:
        corners = torch.rand(batch, length, 2, generator=generator) * 0.4 + 0.05
        inputs["bbox"] = torch.cat([corners, corners + 0.3], dim=-1)
    if "image_attention_mask" in accepted and images:
        inputs["image_attention_mask"] = torch.ones(batch, length, images, dtype=torch.long)
    if "cross_attention_mask" in accepted and images:
        shape = (batch, length, images, model.config.vision_config.max_num_tiles)
        inputs["cross_attention_mask"] = torch.ones(shape, dtype=torch.long)
    if "image_embeds_position_mask" in accepted and images:
        queries = int(first(model.config, "latent_query_num"))
        mask = torch.zeros(batch, length, dtype=torch.long)
        mask[:, length - queries - 1 : length - 1] = 1
        inputs["image_embeds_position_mask"] = mask
    if "protein_input_ids" in accepted:
        inputs["protein_input_ids"] = torch.randint(5, 20, (batch, 7), generator=generator)
        inputs["protein_attention_mask"] = torch.ones(batch, 7, dtype=torch.long)
    if "state" in accepted:
        config, shape = model.config, (batch, model.config.chunk_size, model.config.max_action_dim)
        inputs["state"] = torch.randn(batch, config.max_state_dim, generator=generator)
        inputs["noise"] = torch.randn(shape, generator=generator)
        inputs["timestep"] = torch.rand(batch, generator=generator)
    return inputs
