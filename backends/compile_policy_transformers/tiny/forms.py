"""Which form of pixels an architecture expects."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from .special import SPECIAL
from .styles import Style, crops, first, fixed, grid, grid_hw, nested, packed, positioned, sized

_BY_ARGUMENT: tuple[tuple[str, Style], ...] = (
    ("image_grid_thw", grid),
    ("image_grid_hw", grid_hw),
    ("spatial_shapes", packed),
    ("image_position_ids", positioned),
    ("image_sizes", sized),
    ("pixel_attention_mask", nested),
)


def style_of(model: PreTrainedModel, features: Callable[..., Any] | None) -> Style:
    """The style of the model: by name where only that tells, else by the arguments of its feature method."""
    if model.config.model_type in SPECIAL:
        return SPECIAL[model.config.model_type]
    accepted = inspect.signature(features).parameters if features is not None else {}
    if "image_sizes" in accepted and first(model.config, "image_grid_pinpoints"):
        return crops
    return next((style for argument, style in _BY_ARGUMENT if argument in accepted), fixed)
