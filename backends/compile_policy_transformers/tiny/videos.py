"""Videos: frames in the form in which an architecture takes its pictures, and where they stand in the text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .forms import style_of
from .images import NO_IMAGES, Images, feature_method, feature_methods, placeholder, rows_of, with_markers
from .shrink import FIRST_TEXT_ID
from .styles import Request, Tensors, first, fixed

#: Frames, height and width in pixels.
Clip = tuple[int, int, int]
VIDEOS = "pixel_values_videos"


def make_videos(model: PreTrainedModel, clips: list[Clip], batch: int, generator: torch.Generator) -> Images:
    """Pixel inputs and placeholder tokens for ``batch`` rows of the videos ``clips``.

    Raises:
        ValueError: the model takes no videos.
    """
    if not clips:
        return NO_IMAGES
    accepted = inspect.signature(model.forward).parameters
    if VIDEOS not in accepted:
        as_images = "" if "image" in model.input_modalities else " of their own: give them as images, of four frames"
        raise ValueError(f"{type(model).__name__} takes no videos{as_images}.")
    clips = [(_frames(model, n, clips), height, width) for n, height, width in clips]
    tensors = _tensors(model, clips, batch, generator)
    for name in ("second_per_grid_ts", "video_second_per_grid"):
        if name in accepted:
            tensors[name] = torch.ones(len(clips) * batch)
    pieces = [_piece(model, _tensors(model, [clip], 1, torch.Generator().manual_seed(0))) for clip in clips]
    return Images(tensors, [ids for ids, _ in pieces], pieces[0][1], kind=2)


def _frames(model: PreTrainedModel, frames: int, clips: list[Clip]) -> int:
    """Frames of a video, or steps in time where several frames are one."""
    if "video_grid_thw" in inspect.signature(model.forward).parameters:
        vision = model.config.vision_config
        merged = int(first(vision, "temporal_merge_size") or 1)
        steps = frames // int(first(vision, "temporal_patch_size", "patch_temporal") or 1)
        return max(1, steps // merged) * merged
    return max(n for n, _, _ in clips)  # many take them as one tensor


def _tensors(model: PreTrainedModel, clips: list[Clip], batch: int, generator: torch.Generator) -> Tensors:
    """What the model takes pictures as, with a picture for each frame."""
    accepted = inspect.signature(model.forward).parameters
    sizes = [(height, width) for frames, height, width in clips for _ in range(frames)]
    request = Request(model, sizes, batch, generator)
    counts = torch.tensor([frames for frames, _, _ in clips] * batch)
    told = "video_grid_thw", "video_position_ids", "target_sizes_videos", "video_token_pooling"
    if not any(name in accepted for name in told):
        return {VIDEOS: _whole(model, request, len(counts))}
    pictures = style_of(model, feature_method(model))(request)
    tensors = {VIDEOS: pictures["pixel_values"]}
    starts = counts.cumsum(0) - counts
    if "video_grid_thw" in accepted:
        grids = pictures["image_grid_thw"][starts]
        tensors["video_grid_thw"] = torch.cat([counts[:, None], grids[:, 1:]], dim=1)
    if "video_merge_sizes" in accepted:
        tensors["video_merge_sizes"] = pictures["image_merge_sizes"][starts]
    if "video_position_ids" in accepted:
        tensors |= {"video_position_ids": pictures["image_position_ids"], "num_frames_per_video": counts}
    if "target_sizes_videos" in accepted:
        tensors["target_sizes_videos"] = pictures["target_sizes"]
    if "video_token_pooling" in accepted:
        grids = pictures["image_grids"][starts, :2]
        tensors |= {
            "video_token_pooling": pictures["image_token_pooling"],
            "video_grids": torch.cat([counts[:, None], grids], dim=1),
        }
    return tensors


def _whole(model: PreTrainedModel, request: Request, clips: int) -> torch.Tensor:
    """Frames of the configured size, (videos, frames, channels, height, width), or flat where only that runs."""
    style = style_of(model, feature_method(model))
    values: torch.Tensor = (style if style.__module__.endswith("special") else fixed)(request)["pixel_values"]
    apart = values if values.dim() > 4 else values.unflatten(0, (clips, -1))
    try:
        _count(model, {VIDEOS: apart})
    except (RuntimeError, ValueError):
        return values
    return apart


@torch.no_grad()
def _count(model: PreTrainedModel, tensors: Mapping[str, Any]) -> int:
    methods = list(feature_methods(model, "get_video_features"))
    if methods:
        return rows_of(methods, tensors)
    return rows_of(feature_methods(model), {"pixel_values": tensors[VIDEOS]})


def _piece(model: PreTrainedModel, tensors: Mapping[str, Any]) -> tuple[torch.Tensor, int]:
    """Placeholders of one video, and the token that they are: the first form that the model itself can read."""
    count = _count(model, tensors)
    forms = list(_forms(model.config, count, placeholder(model), tensors))
    return next(((ids, token) for ids, token in forms if _reads(model, ids, count, token, tensors)), forms[0])


def _forms(
    config: Any, count: int, image_token: int | None, tensors: Mapping[str, Any]
) -> Iterator[tuple[torch.Tensor, int]]:
    """One run of placeholders, or one for each step in time with the time before it; the token of pictures too."""
    token = first(config, "video_token_id", "video_token_index")
    start, end = first(config, "video_start_token_id"), first(config, "video_end_token_id")
    steps = int(tensors["video_grid_thw"][0, 0]) if "video_grid_thw" in tensors else 1
    time = torch.tensor([FIRST_TEXT_ID])
    for placed in dict.fromkeys(t for t in (token, image_token) if t is not None):
        inside = [[_run(config, placed, count, start is None)]]
        if count % steps == 0:
            inside.append([part for _ in range(steps) for part in (time, with_markers(config, placed, count // steps))])
        for parts in inside:
            marks = [torch.tensor([t]) if t is not None else torch.tensor([], dtype=torch.long) for t in (start, end)]
            yield torch.cat([marks[0], *parts, marks[1]]), placed


def _run(config: Any, token: int, count: int, marked: bool) -> torch.Tensor:
    return with_markers(config, token, count) if marked else torch.full((count,), token)


@torch.no_grad()
def _reads(model: nn.Module, ids: torch.Tensor, count: int, token: int, tensors: Mapping[str, Any]) -> bool:
    """Whether the model finds all placeholders of the video ``ids``, and positions for them."""
    for owner in (getattr(model, "model", None), model):
        positions: Callable[..., Any] | None = getattr(owner, "get_rope_index", None)
        found: Callable[..., Any] | None = getattr(owner, "get_placeholder_mask", None)
        try:
            if found is not None and "video_features" in inspect.signature(found).parameters:
                embeddings = model.get_input_embeddings()(ids[None])  # type: ignore[operator]
                if found(ids[None], inputs_embeds=embeddings)[1][..., 0].sum() != count:
                    return False
            if positions is not None:
                given = {
                    "attention_mask": torch.ones_like(ids)[None],
                    "mm_token_type_ids": (ids == token).int()[None] * 2,
                    "second_per_grids": torch.ones(1),
                    **tensors,
                }
                accepted = inspect.signature(positions).parameters
                positions(ids[None], **{name: value for name, value in given.items() if name in accepted})
        except (RuntimeError, StopIteration, ValueError, IndexError):
            return False
    return True
