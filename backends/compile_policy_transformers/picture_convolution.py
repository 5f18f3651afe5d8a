"""Convolutions over pictures that are packed in one row of patches: traced as one operator.

Cause: LFM3-VL's layers take the grid of their pictures as a list of numbers and convolve picture by picture in Python
(modeling_lfm3_vl.py, ``Lfm3VlVisionShortConv.forward``, ``for frames, (temporal, height, width) in zip(...)``), so that
a graph would hold for one set of pictures. While its layers are traced, such a module has a ``forward`` of ours: the
same projections and gates, and `convolve_pictures`, which runs the loop at call time, on a grid that is a tensor.

A module is known by its code, whatever its class is called: by the fingerprint of the ``forward`` that this was
written against (`releases`). One whose code is another is traced as it is, which fails, so that the layers run
eager. Nothing of Transformers is changed. Drop this once the stock layers take their grid as a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from compile_policy_transformers import releases
from compile_policy_transformers.known_code import fingerprint
from compile_policy_transformers.swapped import swapped

_FORWARD = releases.PICTURE_CONVOLUTION


@torch.library.custom_op("compile_policy::convolve_pictures", mutates_args=())
def convolve_pictures(states: torch.Tensor, weight: torch.Tensor, grid: torch.Tensor, merge: int) -> torch.Tensor:
    """Depthwise convolution of each frame of each picture over its height and width, without bias.

    Args:
        states: (patches, channels); the patches of a frame in squares of ``merge`` a side, square after square.
        weight: (channels, 1, side, side), ``side`` odd; the edges are padded with zeros.
        grid: (pictures, 3): frames, height and width of each, in patches.

    Returns:
        In the shape of ``states``.
    """
    out = torch.empty_like(states)
    for part, shape in _frames(grid):
        rows = F.conv2d(_rows(states[part], shape, merge), weight, **_how(weight))
        out[part] = _patches(rows, merge)
    return out


def _frames(grid: torch.Tensor) -> Iterator[tuple[slice, tuple[int, int, int]]]:
    """(patches, (frames, height, width)) of each picture."""
    start = 0
    for frames, height, width in grid.tolist():
        stop = start + frames * height * width
        yield slice(start, stop), (frames, height, width)
        start = stop


def _rows(patches: torch.Tensor, shape: tuple[int, int, int], merge: int) -> torch.Tensor:
    """Squares of patches -> (frames, channels, height, width)."""
    frames, height, width = shape
    channels = patches.shape[1]
    squares = patches.reshape(frames, height // merge, width // merge, merge, merge, channels)
    return squares.permute(0, 5, 1, 3, 2, 4).reshape(frames, channels, height, width)


def _patches(rows: torch.Tensor, merge: int) -> torch.Tensor:
    """(frames, channels, height, width) -> squares of patches."""
    frames, channels, height, width = rows.shape
    squares = rows.reshape(frames, channels, height // merge, merge, width // merge, merge)
    return squares.permute(0, 2, 4, 3, 5, 1).reshape(frames * height * width, channels)


def _how(weight: torch.Tensor) -> dict[str, Any]:
    return {"padding": weight.shape[-1] // 2, "groups": weight.shape[0]}


@convolve_pictures.register_fake
def _(states: torch.Tensor, weight: torch.Tensor, grid: torch.Tensor, merge: int) -> torch.Tensor:
    return torch.empty_like(states)


@torch.library.custom_op("compile_policy::convolve_pictures_backward", mutates_args=())
def convolve_pictures_backward(
    grad: torch.Tensor, states: torch.Tensor, weight: torch.Tensor, grid: torch.Tensor, merge: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of states and weight, in their shapes; ``grad`` is that of the result of `convolve_pictures`."""
    of_states, of_weight = torch.empty_like(states), torch.zeros_like(weight)
    for part, shape in _frames(grid):
        rows, outer = _rows(states[part], shape, merge), _rows(grad[part], shape, merge)
        of_rows = conv2d_input(rows.shape, weight, outer, **_how(weight))
        of_states[part] = _patches(of_rows, merge)
        of_weight += conv2d_weight(rows, weight.shape, outer, **_how(weight))
    return of_states, of_weight


@convolve_pictures_backward.register_fake
def _(
    grad: torch.Tensor, states: torch.Tensor, weight: torch.Tensor, grid: torch.Tensor, merge: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(states), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    states, weight, grid, ctx.merge = inputs
    ctx.save_for_backward(states, weight, grid)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return (*convolve_pictures_backward(grad, *ctx.saved_tensors, ctx.merge), None, None)


convolve_pictures.register_autograd(_backward, setup_context=_keep)


def _forward(self: Any, hidden_states: torch.Tensor, grid_thw: Any, **kwargs: Any) -> torch.Tensor:
    out: torch.Tensor
    if not torch.compiler.is_dynamo_compiling():  # another thread
        out = type(self).forward(self, hidden_states, grid_thw, **kwargs)
        return out
    before, after, states = self.in_proj(hidden_states).chunk(3, dim=-1)
    mixed = convolve_pictures(before * states, self.spatial_conv.weight, grid_thw, self.spatial_merge_size)
    out = self.out_proj(after * mixed)
    return out


def convolving(layers: torch.nn.Module) -> AbstractContextManager[None]:
    """Let the known convolutions in ``layers`` run as one operator in a trace."""
    return swapped([module for module in layers.modules() if _is_known(module)], _forward)


def _is_known(module: Any) -> bool:
    convolution = getattr(module, "spatial_conv", None)
    if type(convolution) is not torch.nn.Conv2d or "forward" in vars(module):
        return False
    if fingerprint(type(module).forward) != _FORWARD or "forward" in vars(convolution):
        return False
    side, _ = convolution.kernel_size
    plain = torch.nn.Conv2d(
        convolution.in_channels,
        convolution.in_channels,
        side,
        padding=side // 2,
        groups=convolution.in_channels,
        bias=False,
        device="meta",
    )
    hooks = convolution._forward_hooks or convolution._forward_pre_hooks  # it is not called any more
    return not hooks and side % 2 == 1 and convolution.extra_repr() == plain.extra_repr()
