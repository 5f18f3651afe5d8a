"""Compile the instances of any module class: one decorator, one graph for every batch and length.

python examples/decorate_a_class.py
"""

from __future__ import annotations

import torch
from torch import nn

import compile_policy as cp


@cp.support_torch_compile(dynamic_arg_dims={"x": {0: "batch", 1: "tokens"}, "mask": {0: "batch", 1: "tokens"}})
class Block(nn.Module):
    """A gated feed-forward layer that leaves masked tokens as they are."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x + mask.unsqueeze(-1) * self.down(torch.relu(self.gate(x)) * self.up(x))


@torch.no_grad()
def main(backend: str = "inductor") -> None:
    with cp.use_config(cp.CompilationConfig(backend=backend)):
        block = Block(16).eval()
    for batch, tokens in ((1, 1), (2, 7), (5, 3)):
        x, mask = torch.randn(batch, tokens, 16), torch.ones(batch, tokens)
        with cp.eager(block):
            expected = block(x, mask)
        print(f"{batch} x {tokens}: equal to eager:", torch.allclose(block(x, mask), expected, atol=1e-5))
    print("graphs:", cp.report(block).components[0].graphs)


if __name__ == "__main__":
    main()
