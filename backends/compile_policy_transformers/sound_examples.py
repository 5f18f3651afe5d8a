"""Calls of an audio tower with other numbers and lengths of pieces, made from one that it was called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compile_policy.errors import NotCompilable
from compile_policy.shapes import Labels
from compile_policy.unseen import probed

FRAMES = "frames"
#: Lengths of packed pieces of an example, shorter than any chunk that towers cut; and of a second one, longer.
_SHORT, _LONG = (29, 17, 23), (431, 107, 31, 19)


def sound_examples(
    tower: nn.Module, values: Mapping[str, Any], pieces: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Labels]]:
    """Two other calls that the tower runs on, and labels of the dims that differ from the given one's.

    Raises:
        NotCompilable: it runs on none of those that were tried.
    """
    main = values[next(iter(values))]
    if not isinstance(main, torch.Tensor) or main.dim() < 2:
        raise NotCompilable("the sound of this call is no tensor of pieces, or of frames and their values")
    if (lengths := _lengths(values, main)) is not None:
        calls = [_packed(values, lengths, counts) for counts in (_SHORT, _LONG)]
        if all(_runs(tower, call) for call in calls):
            return calls[0], calls[1], _labels(values, calls[0], pieces, packed=True)
    count = 3 if len(main) != 3 else 5
    for dim in (*range(main.dim() - 1, 0, -1), None):
        frames = main.shape[dim] if dim is not None else 0
        for longer in (2 * frames + 1, 2 * frames, 3 * frames):  # an odd number is the least likely to be special
            one, other = (_stretched(values, main, dim, n, longer) for n in (count, count + 1))
            if _runs(tower, one):
                return one, other if _runs(tower, other) else one, _labels(values, one, pieces)
    raise NotCompilable(f"{type(tower).__name__} runs on no other number of pieces")


def _runs(tower: nn.Module, call: Mapping[str, Any]) -> bool:
    try:
        probed(tower, lambda: tower.forward(**call))
    except NotCompilable:
        raise
    except Exception:
        return False
    return True


def _stretched(
    values: Mapping[str, Any], main: torch.Tensor, dim: int | None, count: int, longer: int
) -> dict[str, Any]:
    """The call with ``count`` pieces, ``longer`` in dim ``dim``; masks keep their padding behind."""
    generator = torch.Generator().manual_seed(0)
    frames = main.shape[dim] if dim is not None else 0
    out = dict(values)
    for name, value in values.items():
        if not isinstance(value, torch.Tensor) or not value.dim() or len(value) != len(main):
            continue
        rows = value[torch.arange(count) % len(value)]
        for d in range(1, value.dim()) if dim is not None else ():
            grows = d == dim if value is main else value.shape[d] == frames
            rows = torch.cat([rows] * 3, dim=d).narrow(d, 0, longer) if grows else rows
        if value.is_floating_point():
            rows = torch.randn(rows.shape, generator=generator).to(value)
        elif value.dim() == 2 and value is not main:
            rows = rows.sort(dim=1, descending=True, stable=True).values
        out[name] = rows.contiguous()
    return out


def _lengths(values: Mapping[str, Any], main: torch.Tensor) -> str | None:
    """The argument that says how pieces are packed in the last dim of ``main``."""
    for name, value in values.items():
        whole = isinstance(value, torch.Tensor) and value.dim() == 1 and not value.is_floating_point()
        if whole and main.dim() == 2 and int(value.sum()) == main.shape[-1]:
            return name
    return None


def _packed(values: Mapping[str, Any], lengths: str, counts: Sequence[int]) -> dict[str, Any]:
    """The call with packed pieces of so many frames."""
    generator = torch.Generator().manual_seed(0)
    name, given = next(iter(values)), values[lengths]
    main = values[name]
    sound = torch.randn(main.shape[0], sum(counts), generator=generator).to(main)
    out = {**values, name: sound, lengths: torch.tensor(counts, dtype=given.dtype, device=given.device)}
    for other, value in values.items():  # one number a piece
        if other != lengths and isinstance(value, torch.Tensor) and value.shape == given.shape:
            out[other] = value[:1].expand(len(counts)).contiguous()
    return out


def _labels(
    given: Mapping[str, Any], example: Mapping[str, Any], pieces: str, packed: bool = False
) -> dict[str, Labels]:
    """Labels of the tensors: the first dim is pieces, others are frames where the example differs.

    Args:
        pieces: the label of the first dim.
        packed: pieces follow one another in the last dim, and only arguments with one dim have one number a piece.
    """
    out: dict[str, Labels] = {}
    for name, value in example.items():
        if isinstance(value, torch.Tensor):
            before = given[name].shape
            names = [FRAMES if a != b else None for a, b in zip(value.shape, before, strict=True)]
            if value.dim() and not (packed and value.dim() > 1):
                names[0] = pieces
            out[name] = tuple(names)
    return out
