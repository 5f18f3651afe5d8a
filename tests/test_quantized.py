"""Quantized weights: what the quantizer allows is compiled and equal, the rest runs eager with its reason.

torchao is no dependency; `pip install torchao` runs the tests of it.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compile_policy import CompilationConfig, apply, eager
from compile_policy.applied import regions
from compile_policy.reference import QUANTIZED, TOLERANCE, tolerances
from compile_policy_transformers import tiny_inputs, tiny_model


class Rounded(nn.Parameter):
    """A parameter class of a quantizer."""


def test_tolerances_know_quantized_weights() -> None:
    """Wider for tensors of another class and for bytes, that of its products for floating point and flags."""
    plain = nn.Linear(2, 2)
    assert tolerances(plain) == {**TOLERANCE, torch.float64: TOLERANCE[torch.float32]}
    assert tolerances(nn.Linear(2, 2).double()) == TOLERANCE
    other, whole = nn.Linear(2, 2), nn.Linear(2, 2)
    other.weight = Rounded(torch.zeros(2, 2))
    whole.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    for module in (other, whole):
        assert tolerances(module)[torch.float32] == QUANTIZED
        assert tolerances(module)[torch.bfloat16] == TOLERANCE[torch.bfloat16]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "graphs"), [("Int8WeightOnlyConfig", 1), ("Int8DynamicActivationInt8WeightConfig", 2)]
)
def test_torchao(name: str, graphs: int) -> None:
    """The same tokens; quantizing a compiled model makes another graph, never an old one.

    torchao multiplies a single row of rounded activations in another way: a graph of its own.
    """
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model("llama")
    inputs = tiny_inputs(model, text_len=9, batch=2)
    apply(model, CompilationConfig(backend="eager"))
    plain = model(**inputs, use_cache=True).logits
    quantization.quantize_(model.model, getattr(quantization, name)())
    with eager(model):
        want, tokens = model(**inputs, use_cache=True).logits, model.generate(**inputs, max_new_tokens=6)
    got = model(**inputs, use_cache=True).logits
    (region,) = regions(model)
    assert not torch.allclose(plain, want, atol=1e-3)  # the control: quantizing changes something
    assert torch.allclose(got, want, atol=5e-2 * want.abs().max().item())
    assert torch.equal(model.generate(**inputs, max_new_tokens=6), tokens)
    assert (region.graphs, region.eager_calls) == (1 + graphs, 0)
