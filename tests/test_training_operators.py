"""Gradients of the policy's own operators."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

import compile_policy
from compile_policy import CompilationConfig
from compile_policy_transformers import packed_attention, tiny_inputs, tiny_model
from compile_policy_transformers.packed_attention import varlen_attention
from compile_policy_transformers.picture_convolution import convolve_pictures


def packed(lengths: list[int], kv_heads: int = 4, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    shapes = [(1, 4, total, 6), (1, kv_heads, total, 6), (1, kv_heads, total, 5)]
    made = [torch.randn(s, generator=generator, dtype=dtype).requires_grad_(True) for s in shapes]
    return (*made, torch.tensor([0, *accumulate(lengths)]))


@pytest.mark.parametrize(("lengths", "kv_heads"), [([3, 3, 5], 4), ([4], 2), ([1, 0, 2], 1), ([0], 4)])
def test_gradients_of_packed_attention(lengths: list[int], kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "BLOCK", 2)  # several blocks of queries
    query, key, value, bounds = packed(lengths, kv_heads)
    inputs = (query, key, value, bounds, 0.3)
    torch.library.opcheck(varlen_attention, inputs)
    assert torch.autograd.gradcheck(lambda q, k, v: varlen_attention(q, k, v, bounds, 0.3), (query, key, value))


def test_gradients_of_packed_attention_in_bfloat16_are_those_of_sdpa() -> None:
    query, key, value, bounds = packed([5, 5], 2, torch.bfloat16)
    out = varlen_attention(query, key, value, bounds, 0.3)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    got = torch.autograd.grad(out, (query, key, value), grad)
    parts = [
        F.scaled_dot_product_attention(*(x[:, :, i : i + 5] for x in (query, key, value)), scale=0.3, enable_gqa=True)
        for i in (0, 5)
    ]
    want = torch.autograd.grad(torch.cat(parts, 2).transpose(1, 2), (query, key, value), grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=3e-2, rtol=3e-2)


def test_second_derivatives_of_packed_attention_are_refused() -> None:
    query, key, value, bounds = packed([3])
    out = varlen_attention(query, key, value, bounds, 0.3)
    (first,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        first.sum().backward()


def test_gradients_of_convolved_pictures() -> None:
    generator = torch.Generator().manual_seed(0)
    grid = torch.tensor([[1, 4, 2], [2, 2, 4]])
    states = torch.randn(24, 3, generator=generator, dtype=torch.float64).requires_grad_(True)
    weight = torch.randn(3, 1, 3, 3, generator=generator, dtype=torch.float64).requires_grad_(True)
    torch.library.opcheck(convolve_pictures, (states, weight, grid, 2))
    assert torch.autograd.gradcheck(lambda s, w: convolve_pictures(s, w, grid, 2), (states, weight))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_gradients_of_pixels_go_through_a_packed_tower(backend: str) -> None:
    model = tiny_model("qwen2_5_vl").requires_grad_(False)
    inputs = tiny_inputs(model, text_len=7, images=[(64, 64)])

    def gradient() -> torch.Tensor:
        pixels = inputs["pixel_values"].clone().requires_grad_(True)
        model(**{**inputs, "pixel_values": pixels}).logits[:, -1].logsumexp(-1).sum().backward()
        assert pixels.grad is not None
        return pixels.grad

    want = gradient()
    compile_policy.apply(model, CompilationConfig(backend=backend, cache_dir=False, compile_mm_encoder=True))
    torch.testing.assert_close(gradient(), want, atol=1e-5, rtol=1e-3)
    found = [c for c in compile_policy.report(model).components if c.decision == "compile"]
    assert [(c.graphs, c.eager_calls, c.fallback) for c in found] == [(1, 0, None), (1, 0, None)]
