"""Pixels and placeholder tokens, in the form that an architecture expects."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel

Size = tuple[int, int]


@dataclass(frozen=True)
class Images:
    """The images of a batch.

    Attributes:
        tensors: pixel inputs of the whole batch.
        tokens: placeholder ids of each image of one row, markers around it included.
        token_id: the placeholder.
    """

    tensors: dict[str, torch.Tensor]
    tokens: list[torch.Tensor]
    token_id: int


def make_images(model: PreTrainedModel, sizes: list[Size], batch: int, generator: torch.Generator) -> Images:
    """Pixel inputs and placeholder tokens for ``batch`` rows of the images of ``sizes`` (height, width in pixels).

    Raises:
        ValueError: the model takes no images.
    """
    token_id = _first(model.config, "image_token_id", "image_token_index", "media_placeholder_token_id")
    if token_id is None or not hasattr(model, "get_image_features"):
        raise ValueError(f"{type(model).__name__} takes no images.")
    style = _style(model)
    tensors = style(model.config, sizes * batch, generator)
    counts = [_count(model, style(model.config, [size], torch.Generator().manual_seed(0))) for size in sizes]
    start = _first(model.config, "vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index")
    end = _first(model.config, "vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index")
    tokens = []
    for count in counts:
        ids = [start] * (start is not None) + [token_id] * count + [end] * (end is not None)
        tokens.append(torch.tensor(ids))
    return Images(tensors, tokens, token_id)


Style = Callable[[Any, list[Size], torch.Generator], dict[str, torch.Tensor]]


def _style(model: PreTrainedModel) -> Style:
    accepted = inspect.signature(_feature_method(model)).parameters
    if "image_grid_thw" in accepted:
        return grid
    return fixed


def grid(config: Any, sizes: list[Size], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Flattened patches of all images after one another, and their grids (frames, rows, columns)."""
    vision = config.vision_config
    patch = vision.patch_size
    merge = _first(vision, "spatial_merge_size", "merge_size") or 1
    grids = [(1, _round(h, patch, merge), _round(w, patch, merge)) for h, w in sizes]
    channels = _first(vision, "in_channels", "num_channels") or 3
    width = channels * (_first(vision, "temporal_patch_size") or 1) * patch * patch
    total = sum(t * h * w for t, h, w in grids)
    return {
        "pixel_values": torch.randn(total, width, generator=generator),
        "image_grid_thw": torch.tensor(grids),
    }


def fixed(config: Any, sizes: list[Size], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One picture of the configured size per image."""
    vision = config.vision_config
    side = vision.image_size
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    channels = _first(vision, "in_channels", "num_channels") or 3
    return {"pixel_values": torch.randn(len(sizes), channels, height, width, generator=generator)}


def _round(pixels: int, patch: int, merge: int) -> int:
    """Patches along one side, a multiple of what is merged into one token."""
    return max(1, round(pixels / (patch * merge))) * merge


@torch.no_grad()
def _count(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> int:
    """Placeholders that one image needs, counted on the features that the model itself computes."""
    method = _feature_method(model)
    accepted = inspect.signature(method).parameters
    features = method(**{k: v for k, v in tensors.items() if k in accepted})
    features = getattr(features, "pooler_output", features)
    parts = features if isinstance(features, (list, tuple)) else [features]
    return sum(part.shape[:-1].numel() for part in parts)


def _feature_method(model: PreTrainedModel) -> Callable[..., Any]:
    method: Any = model.get_image_features
    return cast(Callable[..., Any], method)


def _first(config: Any, *names: str) -> Any:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None
