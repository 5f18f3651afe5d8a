"""Gated activation of a feed-forward layer (Shazeer, 2020, arXiv:2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from compile_policy.layers.custom_op import CustomOp


@CustomOp.register("silu_and_mul")
class SiluAndMul(CustomOp):
    """x [..., 2 * d] -> ``silu(x[..., :d]) * x[..., d:]``, [..., d].

    torch has no kernel of its own for it: with ``compile_native`` it becomes one kernel where nothing around it is
    compiled.
    """

    def forward_native(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
