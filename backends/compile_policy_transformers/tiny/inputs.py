"""Inputs for a model, made from its own signature and configuration: no tokenizer, no processor."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..components import answering
from .extras import add_extras
from .images import make_images
from .shrink import FIRST_SPECIAL_ID, FIRST_TEXT_ID
from .sounds import make_sounds
from .streams import streamed
from .videos import make_videos

PAD_ID = 0


def tiny_inputs(
    model: PreTrainedModel,
    *,
    text_len: int,
    images: Sequence[tuple[int, int]] = (),
    videos: Sequence[tuple[int, int, int]] = (),
    sounds: Sequence[int] = (),
    batch: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Random inputs ready for ``model(**inputs)`` and ``model.generate(**inputs)``.

    Every row holds the given images, videos and sounds (other values in each row) in the middle of random text; rows
    after the first have less text and are padded on the left.

    Args:
        model: a model such as `tiny_model` builds. Where a part of it answers and the whole has no ``forward``, as the
            thinker of an omni model does, the inputs are for that part.
        text_len: text tokens of the first row, beside those of images, videos and sounds; at least 2.
        images: height and width in pixels of each image of a row, rounded to what the model's patches allow; models
            with a fixed image size ignore them.
        videos: frames, height and width in pixels of each video of a row, rounded like images; frames are rounded to
            what the model merges in time, and are those of the longest video where a model wants all equal.
        sounds: frames of each piece of sound of a row (samples, where a model takes the waveform), rounded to what
            the model allows; models with a fixed length ignore them.
        batch: number of rows.
        seed: seed of text and pixels.

    Returns:
        ``input_ids`` and ``attention_mask`` of shape (batch, sequence), and what the architecture wants for images,
        videos and sounds: ``pixel_values``, ``pixel_values_videos``, ``input_features`` and, where needed,
        ``image_grid_thw``, ``video_grid_thw``, ``mm_token_type_ids``, ``image_sizes``, ``input_features_mask`` and so
        on.

    Raises:
        ValueError: images, videos or sounds for a model that takes none, or a text too short.
    """
    part: Any = answering(model)
    model = part
    if text_len < 2:
        raise ValueError(f"text_len is {text_len}: give at least 2 tokens.")
    generator = torch.Generator().manual_seed(seed)
    accepted = set(inspect.signature(model.forward).parameters)
    block = make_images(model, list(images), batch, generator)
    seen = make_videos(model, list(videos), batch, generator)
    heard = make_sounds(model, sounds, batch, generator)
    parts = (block, seen, heard)
    between = [piece for part in parts for piece in zip(part.tokens, part.marks(), strict=True)]
    rows = [_row(model, text_len - _shorter_by(b, text_len), between, generator) for b in range(batch)]
    inputs: dict[str, Any] = {
        "input_ids": _pad_left([ids for ids, _ in rows], PAD_ID),
        "attention_mask": _pad_left([torch.ones_like(ids) for ids, _ in rows], 0),
    }
    if between:
        marks = _pad_left([marks for _, marks in rows], 0)
        inputs |= {name: marks for name in ("mm_token_type_ids", "token_type_ids") if name in accepted}
    tensors = {**block.tensors, **seen.tensors, **heard.tensors}
    named = {name: value for name, value in tensors.items() if name in accepted}
    inputs |= named or tensors  # named nowhere: they travel as keywords to an encoder inside
    return streamed(model, add_extras(model, inputs, accepted, len(images), generator), generator)


def _shorter_by(row: int, text_len: int) -> int:
    return min(text_len // 3 + 2 * row, text_len - 2) if row else 0


def _row(
    model: PreTrainedModel,
    text_len: int,
    between: Sequence[tuple[torch.Tensor, torch.Tensor]],
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and marks of text with images, videos and sounds spread through it.

    Neighbours would look like one image to some architectures.
    """
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", FIRST_SPECIAL_ID)
    text = torch.randint(FIRST_TEXT_ID, min(FIRST_SPECIAL_ID, vocabulary), (text_len,), generator=generator)
    pieces = text.tensor_split(len(between) + 1)
    ids, marks = [pieces[0]], [torch.zeros_like(pieces[0]).int()]
    for (tokens, kinds), piece in zip(between, pieces[1:], strict=True):
        ids += [tokens, piece]
        marks += [kinds, torch.zeros_like(piece).int()]
    return torch.cat(ids), torch.cat(marks)


def _pad_left(rows: list[torch.Tensor], filler: int) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=filler) for row in rows])
