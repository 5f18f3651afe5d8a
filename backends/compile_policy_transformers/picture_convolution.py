"""Convolutions over pictures that are packed in one row of patches: traced as one operator.

Cause: LFM3-VL's layers take the grid of their pictures as a list of numbers and convolve picture by picture in Python
(modeling_lfm3_vl.py, ``Lfm3VlVisionShortConv.forward``, ``for frames, (temporal, height, width) in zip(...)``), so that
a graph would hold for one set of pictures. While its layers are traced, such a module has a ``forward`` of ours: the
same projections and gates, and `convolve_pictures`, which runs the loop at call time, on a grid that is a tensor.

A module is known by its code, whatever its class is called: by the fingerprint of the ``forward`` that this was
written against (Transformers 5.23). One whose code is another is traced as it is, which fails, so that the layers run
eager. Nothing of Transformers is changed. Drop this once the stock layers take their grid as a tensor.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F

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
    start, channels = 0, states.shape[1]
    for frames, height, width in grid.tolist():
        stop = start + frames * height * width
        squares = states[start:stop].view(frames, height // merge, width // merge, merge, merge, channels)
        rows = squares.permute(0, 5, 1, 3, 2, 4).reshape(frames, channels, height, width)
        rows = F.conv2d(rows, weight, padding=weight.shape[-1] // 2, groups=channels)
        squares = rows.view(frames, channels, height // merge, merge, width // merge, merge)
        out[start:stop] = squares.permute(0, 2, 4, 3, 5, 1).reshape(stop - start, channels)
        start = stop
    return out


@convolve_pictures.register_fake
def _(states: torch.Tensor, weight: torch.Tensor, grid: torch.Tensor, merge: int) -> torch.Tensor:
    return torch.empty_like(states)


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
