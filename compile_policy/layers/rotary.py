"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864)."""

from __future__ import annotations

import torch

from compile_policy.layers.custom_op import CustomOp


@CustomOp.register("rotary_embedding")
class RotaryEmbedding(CustomOp):
    """Turns queries and keys by their positions.

    Args:
        head_size: width of a head.
        rotary_dim: how many of its components are turned; the rest passes.
        max_position: number of positions in the table.
        base: the longest wavelength is 2 pi times this.
        is_neox_style: component i is paired with i + rotary_dim / 2; otherwise with its neighbour (GPT-J).
        dtype: dtype of the table; torch's default when not given.

    Raises:
        ValueError: an odd ``rotary_dim``, or one beyond the head.
        IndexError: on call, a position beyond the table.
    """

    cos_sin_cache: torch.Tensor

    def __init__(
        self,
        head_size: int,
        rotary_dim: int,
        max_position: int,
        base: float = 10000.0,
        is_neox_style: bool = True,
        dtype: torch.dtype | None = None,
        *,
        enforce_enable: bool = False,
        compile_native: bool = False,
    ) -> None:
        super().__init__(enforce_enable=enforce_enable, compile_native=compile_native)
        if rotary_dim % 2 or not 0 < rotary_dim <= head_size:
            raise ValueError(f"rotary_dim is {rotary_dim}; it must be even and at most head_size, {head_size}.")
        self.head_size = head_size
        self.rotary_dim = rotary_dim
        self.is_neox_style = is_neox_style
        frequencies = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
        angles = torch.outer(torch.arange(max_position, dtype=torch.float32), frequencies)
        table = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype or torch.get_default_dtype())
        self.register_buffer("cos_sin_cache", table, persistent=False)

    def forward_native(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [...], query and key [..., heads, head_size] -> both turned; nothing is changed in place."""
        cos, sin = torch.nn.functional.embedding(positions, self.cos_sin_cache).unsqueeze(-2).chunk(2, dim=-1)
        return self._turned(query, cos, sin), self._turned(key, cos, sin)

    def _turned(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turning, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        if self.is_neox_style:
            a, b = turning.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)
        a, b = turning[..., 0::2], turning[..., 1::2]
        paired = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        return torch.cat((paired, rest), dim=-1)
