"""Decoders of block diffusion: one graph for every step of denoising, canvas after canvas, equal to eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import compile_policy as cp
from compile_policy.errors import NotCompilable
from compile_policy_transformers import compat
from compile_policy_transformers.canvas import CanvasBinder, reads_a_canvas
from compile_policy_transformers.matrix import _Noted
from compile_policy_transformers.tiny import tiny_inputs, tiny_model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("diffusion_gemma")


def _decoder(model: PreTrainedModel) -> Any:
    return next(c for c in cp.report(model).components if c.role == "decoder")


def _generated(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Tokens, and the logits of every step of denoising."""
    noted = _Noted()
    torch.manual_seed(0)
    out = model.generate(
        **inputs, **options, max_new_tokens=16, max_denoising_steps=3, logits_processor=LogitsProcessorList([noted])
    )
    return getattr(out, "sequences", out), noted.logits


@pytest.mark.parametrize("kind", ["dynamic", pytest.param("static", marks=pytest.mark.slow)])
def test_generate(model: PreTrainedModel, kind: str) -> None:
    """Two canvases, rows with padding, with and without a picture, beyond the window: one graph a kind of cache."""
    assert model.config.canvas_length == 8 and model.config.get_text_config().sliding_window == 8
    options = {"cache_implementation": "static"} if kind == "static" else {}
    requests = [
        tiny_inputs(model, text_len=5),
        tiny_inputs(model, text_len=14, batch=2, seed=1),
        tiny_inputs(model, text_len=9, images=[(56, 56)], seed=2),
    ]
    for inputs in requests:
        inputs.pop("decoder_input_ids")
    want = [_generated(model, inputs, **options, disable_compile=True) for inputs in requests]
    cp.apply(model, cp.CompilationConfig(backend="eager"))
    try:
        for inputs, (tokens, logits) in zip(requests, want, strict=True):
            got, seen = _generated(model, inputs, **options)
            assert torch.equal(got, tokens) and len(seen) == len(logits) == 6
            torch.testing.assert_close(seen, logits, atol=1e-4, rtol=1e-3)
        row = _decoder(model)
        assert (row.graphs, row.eager_calls, row.calls) == (1, 0, 18)
        assert not hasattr(model, "_compiled_encoder"), "generate compiled the model by itself"
    finally:
        cp.remove(model)


def test_what_is_believed_counts(model: PreTrainedModel) -> None:
    """Logits of the step before change the answer, in the rows that the mask names; all in one graph."""
    inputs = tiny_inputs(model, text_len=6, batch=2)
    believed = torch.randn(2, inputs["decoder_input_ids"].shape[1], model.config.get_text_config().vocab_size) * 3
    first = torch.tensor([True, False])
    calls = [
        {},
        {"self_conditioning_logits": believed},
        {"self_conditioning_logits": believed, "self_conditioning_mask": first},
    ]
    with torch.no_grad():
        want = [model(**inputs, **call).logits for call in calls]
        cp.apply(model, cp.CompilationConfig(backend="eager"))
        try:
            got = [model(**inputs, **call).logits for call in calls]
            assert (_decoder(model).graphs, _decoder(model).eager_calls) == (1, 0)
        finally:
            cp.remove(model)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(want[0], want[1], atol=1e-2)
    torch.testing.assert_close(want[2][0], want[1][0])
    torch.testing.assert_close(want[2][1], want[0][1])


def test_generate_may_compile_again(model: PreTrainedModel) -> None:
    """Only while the policy is on is the model's own compile turned off."""
    name = compat._COMPILES
    assert hasattr(type(model), name), "Transformers has it under another name"
    cp.apply(model, cp.CompilationConfig(backend="eager"))
    assert getattr(model, name)("a", "b") == (model.model.encoder, model.forward, "a", "b")
    cp.remove(model)
    assert getattr(model, name).__func__ is getattr(type(model), name)


def test_canvas_decoders_are_told_by_their_arguments(model: PreTrainedModel) -> None:
    assert reads_a_canvas(model.model.decoder) and not reads_a_canvas(model.model.encoder.language_model)
    binder = CanvasBinder(model.model.decoder)
    ids = torch.zeros(1, 3, dtype=torch.long)
    odd = DynamicCache()
    odd.layers = [type("Odd", (DynamicLayer,), {"update": lambda self, *a: a})() for _ in range(2)]
    for cache in (DynamicCache(), DynamicCache(config=model.config.get_text_config()), odd, None):
        with pytest.raises(NotCompilable):
            binder.bind(model.model.decoder, (ids,), {"past_key_values": cache})
