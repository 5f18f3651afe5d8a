"""Inputs for a model, made from its own signature and configuration: no tokenizer, no processor."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .extras import add_extras
from .images import make_images
from .shrink import FIRST_SPECIAL_ID, FIRST_TEXT_ID
from .sounds import make_sounds

PAD_ID = 0


def tiny_inputs(
    model: PreTrainedModel,
    *,
    text_len: int,
    images: Sequence[tuple[int, int]] = (),
    sounds: Sequence[int] = (),
    batch: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Random inputs ready for ``model(**inputs)`` and ``model.generate(**inputs)``.

    Every row holds the given images and sounds (other values in each row) in the middle of random text; rows after
    the first have less text and are padded on the left.

    Args:
        model: a model such as `tiny_model` builds.
        text_len: text tokens of the first row, beside those of images and sounds; at least 2.
        images: height and width in pixels of each image of a row, rounded to what the model's patches allow; models
            with a fixed image size ignore them.
        sounds: frames of each piece of sound of a row (samples, where a model takes the waveform), rounded to what
            the model allows; models with a fixed length ignore them.
        batch: number of rows.
        seed: seed of text and pixels.

    Returns:
        ``input_ids`` and ``attention_mask`` of shape (batch, sequence), and what the architecture wants for images and
        sounds: ``pixel_values``, ``input_features`` and, where needed, ``image_grid_thw``, ``mm_token_type_ids``,
        ``image_sizes``, ``input_features_mask`` and so on.

    Raises:
        ValueError: images or sounds for a model that takes none, or a text too short.
    """
    if text_len < 2:
        raise ValueError(f"text_len is {text_len}: give at least 2 tokens.")
    generator = torch.Generator().manual_seed(seed)
    accepted = set(inspect.signature(model.forward).parameters)
    block = make_images(model, list(images), batch, generator)
    heard = make_sounds(model, sounds, batch, generator)
    between = [*block.tokens, *heard.tokens]
    rows = [_row(model, text_len - _shorter_by(b, text_len), between, generator) for b in range(batch)]
    inputs: dict[str, Any] = _pad_left(rows)
    inputs |= _token_types(inputs["input_ids"], {block.token_id: 1, heard.token_id: 3}, accepted, bool(between))
    tensors = {**block.tensors, **heard.tensors}
    named = {name: value for name, value in tensors.items() if name in accepted}
    inputs |= named or tensors  # named nowhere: they travel as keywords to an encoder inside
    return add_extras(model, inputs, accepted, len(images), generator)


def _shorter_by(row: int, text_len: int) -> int:
    return min(text_len // 3 + 2 * row, text_len - 2) if row else 0


def _row(
    model: PreTrainedModel, text_len: int, between: Sequence[torch.Tensor], generator: torch.Generator
) -> torch.Tensor:
    """Text with images and sounds spread through it: neighbours would look like one image to some architectures."""
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", FIRST_SPECIAL_ID)
    text = torch.randint(FIRST_TEXT_ID, min(FIRST_SPECIAL_ID, vocabulary), (text_len,), generator=generator)
    pieces = text.tensor_split(len(between) + 1)
    parts = [pieces[0]]
    for tokens, piece in zip(between, pieces[1:], strict=True):
        parts += [tokens, piece]
    return torch.cat(parts)


def _pad_left(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), PAD_ID)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _token_types(ids: torch.Tensor, kinds: dict[int, int], accepted: set[str], marked: bool) -> dict[str, torch.Tensor]:
    if not marked:
        return {}
    marks = torch.zeros_like(ids).int()
    for token_id, kind in kinds.items():
        if token_id >= 0:
            marks[ids == token_id] = kind
    return {name: marks for name in ("mm_token_type_ids", "token_type_ids") if name in accepted}
