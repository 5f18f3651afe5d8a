"""Pixels of architectures whose feature method does not tell their form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from .styles import Request, Style, Tensors, fixed, nested, patches, side, tiles


def blocks(request: Request) -> Tensors:
    """minicpm: one picture after another as a row of patches, and the patch counts of each."""
    patch = request.vision.patch_size
    sizes = [(patches(h, patch, 4), patches(w, patch, 4)) for h, w in request.sizes]
    total = sum(h * w for h, w in sizes)
    return {"pixel_values": request.noise(1, 3, patch, total * patch), "target_sizes": torch.tensor(sizes)}


def pooled(request: Request) -> Tensors:
    """molmo2: one crop per image; every token names the four patches that it pools."""
    vision = request.vision
    n = side(vision) // vision.patch_size
    index = torch.arange(n * n).view(n // 2, 2, n // 2, 2).transpose(1, 2).reshape(-1, 4)
    count = len(request.sizes)
    offsets = torch.arange(count)[:, None, None] * n * n
    grids = torch.tensor([[n // 2, n // 2, 0, 0]] * count)
    return {
        "pixel_values": request.noise(count, n * n, 3 * vision.patch_size**2),
        "image_token_pooling": (index + offsets).flatten(0, 1),
        "image_grids": grids,
        "image_num_crops": torch.ones(count, dtype=torch.long),
    }


def patch_rows(request: Request) -> Tensors:
    """fuyu: the patches of each row's images."""
    patch = request.config.patch_size
    total = sum(patches(h, patch, 1) * patches(w, patch, 1) for h, w in request.row_sizes)
    return {"pixel_values": request.noise(request.batch, total, 3 * patch * patch)}


def flattened(request: Request) -> Tensors:
    """pix2struct, kosmos-2.5: patches that begin with their row and column."""
    patch, width = 16, request.vision.patch_embed_hidden_size
    h, w = (max(1, pixels // patch) for pixels in request.row_sizes[0])
    rows, columns = torch.meshgrid(torch.arange(1, h + 1), torch.arange(1, w + 1), indexing="ij")
    place = torch.stack([rows.flatten(), columns.flatten()], dim=-1).float().expand(request.batch, -1, -1)
    values = request.noise(request.batch, h * w, width)
    return {"flattened_patches": torch.cat([place, values], dim=-1)}


def two_towers(request: Request) -> Tensors:
    """deepseek_vl_hybrid: the same pictures for the tower of high resolution."""
    high = side(request.config.high_res_vision_config)
    return fixed(request) | {"high_res_pixel_values": request.noise(len(request.sizes), 3, high, high)}


def query_text(request: Request) -> Tensors:
    """instructblip: a question to the query former beside each picture."""
    ids = torch.randint(3, 256, (len(request.sizes), 5), generator=request.generator)
    return fixed(request) | {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def frames(request: Request) -> Tensors:
    """instructblipvideo: four frames a clip."""
    n = side(request.vision)
    ids = torch.randint(3, 256, (request.batch, 5), generator=request.generator)
    return {
        "pixel_values": request.noise(request.batch, 4, 3, n, n),
        "qformer_input_ids": ids,
        "qformer_attention_mask": torch.ones_like(ids),
    }


def aspect_tiles(request: Request) -> Tensors:
    """mllama: every image fills one row of tiles."""
    vision = request.vision
    lead = (request.batch, len(request.row_sizes))
    n = side(vision)
    return {
        "pixel_values": request.noise(*lead, vision.max_num_tiles, 3, n, n),
        "aspect_ratio_ids": torch.full(lead, 2),
        "aspect_ratio_mask": torch.ones(*lead, vision.max_num_tiles, dtype=torch.long),
    }


def pictures_per_row(request: Request) -> Tensors:
    """idefics: pictures of each row."""
    return {"pixel_values": nested(request)["pixel_values"]}


def single_tiles(request: Request) -> Tensors:
    """perception_lm: one tile of each image."""
    return {"pixel_values": fixed(request)["pixel_values"][:, None]}


def space_time(request: Request) -> Tensors:
    """inkling: one patch of frames, rows, columns and channels per token."""
    vision = request.vision
    patch, depth = vision.patch_size, vision.temporal_patch_size
    total = sum(patches(h, patch, 1) * patches(w, patch, 1) for h, w in request.sizes)
    return {"pixel_values": request.noise(total, depth, patch, patch, 3)}


def overview_and_crops(request: Request) -> Tensors:
    """phi4_multimodal: an overview of each image, its crops, and which patches of them are real."""
    square, patch = side(request.vision), request.vision.patch_size
    grids = [(max(1, round(h / square)), max(1, round(w / square))) for h, w in request.sizes]
    count, most = len(grids), 1 + max(rows * columns for rows, columns in grids)
    return {
        "image_pixel_values": request.noise(count, most, 3, square, square),
        "image_sizes": torch.tensor(grids) * square,
        "image_attention_mask": torch.ones(count, most, square // patch, square // patch, dtype=torch.long),
    }


def _overview_and_crops(config: Any, tensors: Tensors) -> int:
    """Two by two patches become a token; every row of tokens has one more, and one stands before the overview."""
    vision = config.vision_config
    base = (vision.image_size // vision.patch_size + 1) // 2
    grids = (tensors["image_sizes"] // vision.image_size * base).tolist()
    return sum(rows * (columns + 1) + 1 + base * (base + 1) for rows, columns in grids)


#: Tokens that stand for images, where the model has no method that computes their features.
COUNTS: dict[str, Callable[[Any, Tensors], int]] = {"phi4_multimodal": _overview_and_crops}

SPECIAL: dict[str, Style] = {
    "deepseek_vl_hybrid": two_towers,
    "fuyu": patch_rows,
    "granite_docling": tiles,
    "idefics": pictures_per_row,
    "inkling_mm_model": space_time,
    "instructblip": query_text,
    "instructblipvideo": frames,
    "kosmos-2.5": flattened,
    "minicpm_ocr": blocks,
    "minicpmv4_6": blocks,
    "minicpmv4_7": blocks,
    "mllama": aspect_tiles,
    "molmo2": pooled,
    "perception_lm": single_tiles,
    "phi4_multimodal": overview_and_crops,
    "pi0": tiles,
    "pix2struct": flattened,
}

# These see one picture a row, beside the text and not in it.
_ONE_PER_ROW = {
    *("blip", "git", "instructblipvideo", "kosmos-2", "kosmos-2.5", "pix2struct", "pp_formulanet", "udop"),
    "vision-encoder-decoder",
}


# These cannot do without a picture.
NEEDS_IMAGES = {
    *("blip", "blip-2", "idefics", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5"),
    *("pi0", "pix2struct", "pp_formulanet", "vision-encoder-decoder"),
}


def one_per_row(model: PreTrainedModel) -> bool:
    """Whether the model takes a single picture with each text."""
    return model.config.model_type in _ONE_PER_ROW
