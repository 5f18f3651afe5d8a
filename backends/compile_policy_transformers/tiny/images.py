"""Placeholder tokens for images, counted on the features that the model itself computes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from .forms import style_of
from .special import COUNTS, NEEDS_IMAGES, one_per_row
from .styles import Request, Size, first


@dataclass(frozen=True)
class Images:
    """The images of a batch.

    Attributes:
        tensors: pixel inputs of the whole batch.
        tokens: placeholder ids of each image of one row, markers around it included.
        token_id: the placeholder; -1 for models that have none.
        kind: how token types mark the placeholders: 1 for images, 2 for videos, 3 for sounds.
    """

    tensors: dict[str, Any]
    tokens: list[torch.Tensor]
    token_id: int
    kind: int = 1

    def marks(self) -> list[torch.Tensor]:
        """For each of ``tokens``: the kind where the placeholder stands, 0 at the markers."""
        return [(tokens == self.token_id).int() * self.kind for tokens in self.tokens]


NO_IMAGES = Images({}, [], -1)


def make_images(model: PreTrainedModel, sizes: list[Size], batch: int, generator: torch.Generator) -> Images:
    """Pixel inputs and placeholder tokens for ``batch`` rows of the images of ``sizes`` (height, width in pixels).

    Raises:
        ValueError: the model takes no images, or needs one.
    """
    if not sizes:
        if model.config.model_type in NEEDS_IMAGES:
            raise ValueError(f"{type(model).__name__} needs an image with every text.")
        return NO_IMAGES
    if not _takes_pixels(model) and feature_method(model) is None:
        raise ValueError(f"{type(model).__name__} takes no images.")
    if one_per_row(model):
        sizes = sizes[:1]
    style = style_of(model, feature_method(model))
    tensors = style(Request(model, sizes, batch, generator))
    token_id = placeholder(model)
    if token_id is None:
        return Images(tensors, [], -1)
    counts = [_count(model, style(Request(model, [size], 1, torch.Generator().manual_seed(0)))) for size in sizes]
    return Images(tensors, [with_markers(model.config, token_id, count) for count in counts], token_id)


def _takes_pixels(model: PreTrainedModel) -> bool:
    """Whether the model says so: one for text alone may only repeat what its architecture sees as a whole."""
    named = inspect.signature(model.forward).parameters
    pixels = any("pixel_values" in name or name == "flattened_patches" for name in named)
    return pixels and bool({"image", "video"} & set(model.input_modalities))


def placeholder(model: PreTrainedModel) -> int | None:
    """The token that stands for a piece of an image; ``None`` when images come in another way."""
    config = first(model.config, "vlm_config") or model.config
    found = first(config, "image_token_id", "image_token_index", "image_patch_id", "video_token_index")
    found = found or first(getattr(config, "vision_config", None), "image_token_id")
    if found is None and (mapping := getattr(model.config, "vocabulary_map", None)):
        found = mapping["<image>"]
    return cast("int | None", found)


def with_markers(config: Any, token_id: int, count: int) -> torch.Tensor:
    """``count`` placeholders between the markers that the configuration names."""
    start = first(config, "vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index")
    end = first(config, "vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index")
    return torch.tensor([start] * (start is not None) + [token_id] * count + [end] * (end is not None))


@torch.no_grad()
def _count(model: PreTrainedModel, tensors: dict[str, Any]) -> int:
    methods = list(feature_methods(model))
    if model.config.model_type in COUNTS:
        return COUNTS[model.config.model_type](model.config, tensors)
    if not methods:
        queries = getattr(model.config, "num_query_tokens", None)  # for each frame of a clip
        return int(queries * tensors["pixel_values"].shape[1]) if queries else 1
    if model.config.model_type == "pi0":  # its own forward takes cameras by row, the model inside one after another
        tensors = {"pixel_values": tensors["pixel_values"].flatten(0, 1)}
    return rows_of(methods, tensors)


def rows_of(methods: Iterable[Callable[..., Any]], tensors: Mapping[str, Any]) -> int:
    """Features that the method which takes most of ``tensors`` computes from them: one for each placeholder."""
    # a wrapper may take fewer arguments by name than what it wraps
    method = max(methods, key=lambda m: len(tensors.keys() & inspect.signature(m).parameters.keys()))
    accepted = inspect.signature(method).parameters
    features = method(**{name: value for name, value in tensors.items() if name in accepted})
    if not isinstance(features, torch.Tensor) and type(features) not in (list, tuple):
        features = first(features, "pooler_output", "deepstack_features", "last_hidden_state")
    return _rows(features)


def _rows(features: Any) -> int:
    if isinstance(features, torch.Tensor):
        return features.shape[:-1].numel()
    if features and isinstance(features[0], tuple) and isinstance(features[0][0], int):  # (layer, features) pairs
        return _rows(features[0][1])
    return sum(_rows(part) for part in features)


def feature_method(model: nn.Module) -> Callable[..., Any] | None:
    """``get_image_features`` of the model, or of what it wraps where the wrapper hides the arguments."""
    return next(feature_methods(model), None)


def feature_methods(model: nn.Module, name: str = "get_image_features") -> Iterator[Callable[..., Any]]:
    """The methods of this name: of the model and of what it wraps; without those that hide their arguments."""
    inner = getattr(model, "model", None)
    parts = (getattr(inner, part, None) for part in ("encoder", "vlm"))
    for owner in (model, inner, getattr(model, "base_model", None), *parts):
        method: Any = getattr(owner, name, None)
        if method is not None and "args" not in inspect.signature(method).parameters:
            yield method
