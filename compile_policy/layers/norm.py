"""Root mean square normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from compile_policy.layers.custom_op import CustomOp
from compile_policy.layers.records import LayerError


@CustomOp.register("rms_norm")
class RMSNorm(CustomOp):
    """x [..., hidden_size] -> ``weight * x / sqrt(mean(x^2) + eps)``, computed in float32.

    Called with ``residual`` it adds that first and returns (normalised, sum), as vLLM's does; nothing is changed in
    place.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        dtype: torch.dtype | None = None,
        *,
        enforce_enable: bool = False,
        compile_native: bool = False,
    ) -> None:
        super().__init__(enforce_enable=enforce_enable, compile_native=compile_native)
        self.hidden_size = hidden_size
        self.variance_epsilon = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype))

    def forward_native(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        total = x if residual is None else x + residual
        wide = total.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        out = self.weight * wide.to(total.dtype)
        return out if residual is None else (out, total)

    def forward_cuda(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """torch's own fused kernel; in half precision it rounds once where the native form rounds twice."""
        if x.dtype != self.weight.dtype:
            return self.forward_native(x, residual)
        total = x if residual is None else x + residual
        out = F.rms_norm(total, (self.hidden_size,), self.weight, self.variance_epsilon)
        return out if residual is None else (out, total)

    @classmethod
    def from_layer(cls, layer: nn.Module) -> nn.Module:
        """Take the place of another implementation, and its weight (the same parameter).

        Raises:
            LayerError: ``layer`` computes something else (Gemma's norm, for one, multiplies by 1 + weight), or has no
            data
                to find out.
        """
        weight = getattr(layer, "weight", None)
        eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
        if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(eps, float):
            raise LayerError(f"{type(layer).__name__} has no weight and epsilon of a root mean square norm.")
        new: nn.Module = cls(weight.shape[0], eps, weight.dtype)
        new.weight = weight
        _prove_equal(layer, new, weight)
        return new

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.variance_epsilon}"


@torch.no_grad()
def _prove_equal(old: nn.Module, new: nn.Module, weight: torch.Tensor) -> None:
    if weight.is_meta:
        raise LayerError("A norm without data cannot be compared with its replacement.", remedy="Load the model first.")
    x = torch.linspace(-3, 2, 4 * weight.numel(), dtype=weight.dtype, device=weight.device).view(4, -1)
    try:
        torch.testing.assert_close(new(x), old(x))  # tolerances that fit the dtype
    except AssertionError:
        raise LayerError(f"{type(old).__name__} computes something else than {type(new).__name__}.") from None
