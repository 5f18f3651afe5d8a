"""Other pictures for a call of a tower over packed patches: the same arguments, with grids of our own choice."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compile_policy.errors import NotCompilable, first_line
from compile_policy_transformers import attention
from compile_policy_transformers.prologue import Prologue, learn

#: Arguments of a tower that hold (frames,) height and width of every picture, in patches.
GRIDS = ("grid_thw", "image_grid_thw", "target_sizes")
#: Grids (frames, height, width in merged patches) of the example and of a second one: dims that differ are dynamic.
EXAMPLE = ((1, 2, 3), (1, 4, 1), (1, 3, 3), (1, 5, 2))
_OTHER = ((1, 3, 5), (1, 6, 2), (1, 2, 7), (1, 4, 4), (1, 5, 3), (1, 7, 3))
#: Sides of what is merged to one token that are tried when the tower names none.
_MERGES = (1, 2, 4, 3, 6, 8)

Grids = Sequence[tuple[int, int, int]]


def grid_argument(tower: nn.Module) -> str | None:
    """The argument of ``tower`` that holds the grids of its pictures."""
    parameters = inspect.signature(tower.forward).parameters
    return next((name for name in GRIDS if name in parameters), None)


def merge_of(tower: nn.Module) -> int:
    """Patches along one side that become one token, as the tower or its configuration says; 1 when neither does."""
    return next(_said_merges(tower), 1)


def _said_merges(tower: nn.Module) -> Iterator[int]:
    for owner in (tower, getattr(tower, "config", None)):
        for name in ("spatial_merge_size", "merge_size", "merge_kernel_size", "window_kernel_size"):
            said = getattr(owner, name, None)
            if isinstance(said, (list, tuple)) and said:
                said = said[0]
            if isinstance(said, int) and said > 1:
                yield said


def probe(tower: nn.Module, values: Mapping[str, Any]) -> tuple[Prologue, dict[str, Any], dict[str, Any]]:
    """The layout functions of a tower, and two calls that it runs on, layout included.

    Args:
        values: the arguments of a call, by name, without a layout.

    Raises:
        NotCompilable: no grids that the tower takes were found, or what it computes from them is not known.
    """
    found = _probed(tower, values, (1, 1))
    if not _one_of_something(*found):
        return found
    try:
        return _probed(tower, values, (2, 3))
    except NotCompilable:  # it takes pictures alone
        return found


def _one_of_something(prologue: Prologue, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a layout has a dim of size 1 with all pictures: the frames of a video may stand there."""
    layouts = [(one[name], other[name]) for name in prologue.names if isinstance(one[name], torch.Tensor)]
    return any(sizes == (1, 1) for pair in layouts for sizes in zip(pair[0].shape, pair[1].shape, strict=True))


def _probed(
    tower: nn.Module, values: Mapping[str, Any], frames: tuple[int, int]
) -> tuple[Prologue, dict[str, Any], dict[str, Any]]:
    """`probe` with so many frames in each picture of the two calls."""
    examples = [tuple((t, h, w) for _, h, w in grids) for t, grids in zip(frames, (EXAMPLE, _OTHER), strict=True)]
    why: Exception | None = None
    merges = dict.fromkeys((merge_of(tower), *_said_merges(tower), *_MERGES))
    for merge, dim in itertools.product(merges, _patch_dims(tower, values)):
        try:
            one, other = (_call_with(tower, values, grids, merge, dim) for grids in examples)
            with attention.traced_with(attention.configs_below(tower), attention.ENCODER):
                prologue, again = learn(tower, one), learn(tower, other)
            if prologue != again:
                raise NotCompilable(f"what {type(tower).__name__} computes from a grid differs from call to call")
        except NotCompilable:
            raise
        except Exception as error:
            why = why or error
            continue
        if prologue.reads:
            raise NotCompilable(
                f"it goes through its pictures one by one in Python: {prologue.reads}",
                remedy="Write that part over all patches at once, in a subclass (compile_policy.layers.override).",
            )
        return prologue, _with_layout(prologue, one), _with_layout(prologue, other)
    found = f": {first_line(why)}" if why is not None else ""
    raise NotCompilable(f"{type(tower).__name__} runs on none of the example grids{found}") from why


def _with_layout(prologue: Prologue, call: Mapping[str, Any]) -> dict[str, Any]:
    return dict(sorted({**call, **prologue.run(call)}.items()))


def _call_with(tower: nn.Module, values: Mapping[str, Any], grids: Grids, merge: int, dim: int) -> dict[str, Any]:
    """The call with random patches on ``grids``, counted in squares of ``merge`` patches a side.

    Args:
        dim: the dim of the pixels that grows with the number of patches.
    """
    name, first = grid_argument(tower), _pixels(tower)
    assert name is not None
    given: torch.Tensor = values[name]
    rows = [[t, h * merge, w * merge][-given.shape[1] :] for t, h, w in grids]
    grid = torch.tensor(rows, dtype=given.dtype, device=given.device)
    shape = list(values[first].shape)
    shape[dim], rest = divmod(shape[dim] * _patches(grid), _patches(given))
    if rest:
        raise ValueError(f"{_patches(grid)} patches do not fill whole rows of the pixels")
    generator = torch.Generator().manual_seed(0)
    call = {**values, first: torch.randn(shape, generator=generator).to(values[first]), name: grid}
    for other, value in values.items():  # one number a picture
        if isinstance(value, torch.Tensor) and value.dim() == 1 and len(value) == len(given) and other != first:
            call[other] = value[:1].expand(len(grid))
    return call


def _pixels(tower: nn.Module) -> str:
    return next(iter(inspect.signature(tower.forward).parameters))


def _patches(grid: torch.Tensor) -> int:
    return int(grid.prod(dim=1).sum())


def _patch_dims(tower: nn.Module, values: Mapping[str, Any]) -> list[int]:
    """Dims of the pixels that may grow with the number of patches, likely ones first.

    A row of the pixels is a patch, or several (merged ones), or a patch is several rows of them.
    """
    name = grid_argument(tower)
    assert name is not None
    shape, count = values[_pixels(tower)].shape, _patches(values[name])
    same = [d for d, size in enumerate(shape) if size == count]
    longer = [d for d, size in enumerate(shape) if size % count == 0]
    shorter = [d for d, size in enumerate(shape) if size > 1 and count % size == 0]
    return list(dict.fromkeys([*same, *longer, *shorter]))
