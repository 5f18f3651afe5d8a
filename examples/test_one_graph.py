"""For authors of models: tests that fail when a component needs a second graph, and say why.

pytest -p pytest_compile_policy examples/test_one_graph.py      (where the package is installed, plain pytest)
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compile_policy.testing import assert_compiles_once, capture


class Gated(nn.Module):
    """What is tested: `python examples/test_one_graph.py` shows the message for a loop that reads a tensor."""

    def __init__(self, loops: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.loops = nn.Linear(8, 8), nn.Linear(8, 8), loops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while self.loops and x.norm() > 1:
            x = x / 2
        return torch.relu(self.gate(x)) * self.up(x)


def test_every_batch_is_one_graph() -> None:
    assert_compiles_once(Gated(), [torch.randn(batch, 8) for batch in (1, 2, 7)])


def test_what_is_in_the_graph() -> None:
    graph = capture(Gated(), torch.randn(3, 8))
    assert [op.rsplit(".")[-1] for op in graph.ops].count("linear") == 2
    assert graph.conditions == ()


@pytest.mark.max_graphs(1)
def test_a_model_of_transformers() -> None:
    from compile_policy_transformers import tiny_inputs, tiny_model

    model = tiny_model("llama")
    inputs = tiny_inputs(model, text_len=6, images=[])
    assert_compiles_once(model, inputs, component="decoder", call=lambda m, i: m.generate(**i, max_new_tokens=4))


def main() -> None:
    try:
        assert_compiles_once(Gated(loops=True), torch.randn(3, 8))
    except AssertionError as error:
        print(error)


if __name__ == "__main__":
    main()
