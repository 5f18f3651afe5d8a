"""Pixels in the form that an architecture expects, chosen by what its feature method accepts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.image_processing_utils import select_best_resolution

Size = tuple[int, int]
Tensors = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What is wanted: ``batch`` rows, each with images of the given sizes (height, width in pixels)."""

    model: PreTrainedModel
    row_sizes: list[Size]
    batch: int
    generator: torch.Generator

    @property
    def sizes(self) -> list[Size]:
        return self.row_sizes * self.batch

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def vision(self) -> Any:
        config = self.config
        return (
            first(config, "vision_config", "vq_config", "encoder")
            or first(config.get_text_config(), "vision_config")
            or config
        )

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)


Style = Callable[[Request], Tensors]


def first(config: Any, *names: str) -> Any:
    """The first attribute that is there and not ``None``."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def channels(vision: Any) -> int:
    return int(first(vision, "in_channels", "num_channels") or 3)


def side(vision: Any) -> int:
    """Side of a square picture, looked up in nested configurations too."""
    for config in (vision, *(value for value in vars(vision).values() if hasattr(value, "model_type"))):
        found = first(config, "image_size", "input_size", "resolution")
        if found is not None:
            return int(found[0] if isinstance(found, (list, tuple)) else found)
    return 64


def patches(pixels: int, patch: int, merge: int) -> int:
    """Patches along one side, a multiple of what is merged into one token."""
    return max(1, round(pixels / (patch * merge))) * merge


def merge_of(config: Any) -> int:
    found = first(config, "spatial_merge_size", "merge_size", "merge_kernel_size") or 1
    return int(found[0] if isinstance(found, (list, tuple)) else found)


def grid(request: Request) -> Tensors:
    """Flattened patches of all images after one another, and their grids (frames, rows, columns)."""
    vision = request.vision
    patch, merge = vision.patch_size, merge_of(vision)
    grids = [(1, patches(h, patch, merge), patches(w, patch, merge)) for h, w in request.sizes]
    total = sum(h * w for _, h, w in grids)
    depth = first(vision, "temporal_patch_size", "patch_temporal") or 1
    shape = {
        "paddleocr_vl": (total, channels(vision), patch, patch),
        "kimi_k25": (total, channels(vision), patch, patch),
        "inkling2": (total // merge**2, merge * patch, merge * patch, channels(vision)),
    }.get(request.config.model_type, (total, channels(vision) * depth * patch * patch))
    if request.config.model_type == "inkling2":  # its grid counts merged tokens
        grids = [(1, h // merge, w // merge) for _, h, w in grids]
    tensors = {"pixel_values": request.noise(*shape), "image_grid_thw": torch.tensor(grids)}
    if request.config.model_type == "video_llama_3":
        tensors["image_merge_sizes"] = torch.full((len(grids),), merge)
    return tensors


def grid_hw(request: Request) -> Tensors:
    """Flattened patches, and the rows and columns of each image."""
    patch = request.vision.patch_size
    grids = [(patches(h, patch, 2), patches(w, patch, 2)) for h, w in request.sizes]
    total = sum(h * w for h, w in grids)
    return {"pixel_values": request.noise(total, 3 * patch * patch), "image_grid_hw": torch.tensor(grids)}


def fixed(request: Request) -> Tensors:
    """One square picture of the configured size per image."""
    vision = request.vision
    return {"pixel_values": request.noise(len(request.sizes), channels(vision), side(vision), side(vision))}


def nested(request: Request) -> Tensors:
    """Pictures per row, padded to the same number, with a mask of their pixels."""
    shape = (request.batch, len(request.row_sizes), 3, side(request.vision), side(request.vision))
    return {"pixel_values": request.noise(*shape), "pixel_attention_mask": torch.ones(*shape[:2], *shape[3:]).bool()}


def tiles(request: Request) -> Tensors:
    """Pictures per row, and which of them are real."""
    tensors = nested(request)
    return {**tensors, "pixel_attention_mask": tensors["pixel_attention_mask"].flatten(2).all(-1)}


def crops(request: Request) -> Tensors:
    """An overview and the tiles of the best fitting grid for each image, and the sizes of the originals."""
    square = side(request.vision)
    best = [select_best_resolution(size, request.config.image_grid_pinpoints) for size in request.sizes]
    most = max(1 + (h // square) * (w // square) for h, w in best)
    values = request.noise(len(best), most, channels(request.vision), square, square)
    return {"pixel_values": values, "image_sizes": torch.tensor(request.sizes)}


def sized(request: Request) -> Tensors:
    """Pictures of their own sizes, padded to the largest."""
    patch = first(request.vision, "patch_size") or 8
    step = merge_of(request.config)
    sizes = [(patches(h, patch, step) * patch, patches(w, patch, step) * patch) for h, w in request.sizes]
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    return {"pixel_values": request.noise(len(sizes), 3, height, width), "image_sizes": torch.tensor(sizes)}


def packed(request: Request) -> Tensors:
    """Flattened patches per image, padded to the longest, with shapes and mask."""
    vision, factor = request.vision, first(request.config, "downsample_factor") or 1
    shapes = [(patches(h, vision.patch_size, factor), patches(w, vision.patch_size, factor)) for h, w in request.sizes]
    longest = max(h * w for h, w in shapes)
    mask = torch.stack([(torch.arange(longest) < h * w).long() for h, w in shapes])
    values = request.noise(len(shapes), longest, channels(vision) * vision.patch_size**2)
    return {"pixel_values": values, "spatial_shapes": torch.tensor(shapes), "pixel_attention_mask": mask}


def positioned(request: Request) -> Tensors:
    """Flattened patches per image with their (column, row) positions, -1 for padding."""
    vision = request.vision
    pool = first(vision, "pooling_kernel_size") or 1
    patch = vision.patch_size
    if hasattr(vision, "model_patch_size"):  # patches come pooled already
        patch, pool = vision.model_patch_size, 1
    shapes = [(patches(h, patch, pool), patches(w, patch, pool)) for h, w in request.sizes]
    longest = max(h * w for h, w in shapes)
    positions = torch.full((len(shapes), longest, 2), -1)
    for i, (h, w) in enumerate(shapes):
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        positions[i, : h * w] = torch.stack([columns.flatten(), rows.flatten()], dim=-1)
    values = request.noise(len(shapes), longest, 3 * patch**2)
    return {"pixel_values": values, "image_position_ids": positions}
