"""Models that hear while they write: sound runs beside the text, in forward and in `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import compile_policy as cp
from compile_policy_transformers import decoder_rules
from compile_policy_transformers.tiny import generation_inputs, tiny_inputs, tiny_model

TYPES = ["voxtral_realtime", pytest.param("kyutai_speech_to_text", marks=pytest.mark.slow)]
NEW = 4


def _run(model: PreTrainedModel, requests: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Logits of a forward without a cache, and of what `generate` makes of the same with both kinds of cache."""
    out = []
    for inputs in requests:
        out.append(model(**inputs, use_cache=False).logits)
        for kind in ({}, {"cache_implementation": "static"}):
            generate: Any = model.generate
            asked = {
                "max_new_tokens": NEW,
                "min_new_tokens": NEW,
                "output_logits": True,
                "return_dict_in_generate": True,
            }
            made = generate(**generation_inputs(model, inputs, NEW), **kind, **asked)
            assert len(made.logits) == NEW
            out.append(torch.stack(made.logits))
    return out


def _graphs(model: PreTrainedModel) -> tuple[int, int]:
    row = next(c for c in cp.report(model).components if c.role == "decoder")
    return row.graphs, row.eager_calls


@pytest.mark.parametrize("model_type", TYPES)
def test_one_row_and_several(model_type: str) -> None:
    """Beyond the window too, with padding: one graph without and one with each kind of cache, equal to eager."""
    model = tiny_model(model_type)
    requests = [tiny_inputs(model, text_len=11), tiny_inputs(model, text_len=14, batch=2, seed=1)]
    with torch.no_grad():
        want = _run(model, requests)
        cp.apply(model, cp.CompilationConfig(backend="eager"))
        got = _run(model, requests)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if i == 3:  # the forward of rows with padding
            a, b = (t[requests[1]["attention_mask"].bool()] for t in (a, b))
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert _graphs(model) == (3, 0)


@pytest.mark.parametrize("model_type", ["voxtral_realtime", "kyutai_speech_to_text"])
def test_sound_counts(model_type: str) -> None:
    """Other sound gives other logits, so that a comparison would notice one that is left out."""
    model = tiny_model(model_type)
    inputs = tiny_inputs(model, text_len=7)
    name, other = "input_ids", inputs["input_ids"].clone()
    if model_type == "voxtral_realtime":
        name, other = "input_features", -inputs["input_features"]
    else:
        other[..., 1:] = (other[..., 1:] + 1) % 100
    with torch.no_grad():
        a, b = model(**inputs).logits, model(**{**inputs, name: other}).logits
    assert not torch.allclose(a, b, atol=1e-2)


def test_an_argument_alike_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its row in the rules, one row of voxtral_realtime and several are two graphs."""
    left = tuple(r for r in decoder_rules.RULES if r.model_type != "voxtral_realtime_text")
    assert len(left) == len(decoder_rules.RULES) - 1
    model = tiny_model("voxtral_realtime")
    monkeypatch.setattr(decoder_rules, "RULES", left)
    cp.apply(model, cp.CompilationConfig(backend="eager"))
    with torch.no_grad():
        for batch in (1, 2):
            model(**tiny_inputs(model, text_len=6, batch=batch), use_cache=False)
    assert _graphs(model)[0] == 2
