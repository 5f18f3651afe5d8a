"""Models of which a part answers: an omni model's thinker has the forward, and the whole lets it generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import compile_policy as cp
from compile_policy_transformers import compat
from compile_policy_transformers.components import answering
from compile_policy_transformers.tiny import tiny_inputs, tiny_model

TYPES = ["qwen2_5_omni", pytest.param("qwen3_omni_moe", marks=pytest.mark.slow)]


@pytest.mark.parametrize("model_type", TYPES)
def test_text_out_of_the_whole_model(model_type: str) -> None:
    """As a user asks for text: pictures, video and sound go in, equal to eager, one graph of the thinker's decoder."""
    model: Any = tiny_model(model_type)
    if hasattr(model, "speaker_map"):
        model.speaker_map["Chelsie"] = {}  # looked up, though nothing is spoken
    assert answering(model) is model.thinker
    asked = {"generation_mode": "text", "thinker_max_new_tokens": 4}
    requests = [
        tiny_inputs(model, text_len=9, images=[(56, 56), (56, 84)], batch=2),
        tiny_inputs(model, text_len=11, videos=[(4, 56, 84)], seed=1),
        tiny_inputs(model, text_len=8, sounds=[40, 20], seed=2),
    ]
    if model_type == "qwen3_omni_moe":
        asked["return_audio"] = False
    with torch.no_grad():
        want = [_tokens(model.generate(**inputs, **asked)) for inputs in requests]
        assert not torch.equal(want[0][0, -4:], want[0][1, -4:])
        cp.apply(model, cp.CompilationConfig(backend="eager"))
        got = [_tokens(model.generate(**inputs, **asked)) for inputs in requests]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    row = next(c for c in cp.report(model).components if c.role == "decoder")
    assert row.qualname.startswith("thinker.model") and (row.graphs, row.eager_calls, row.calls) == (1, 0, 12)


def _tokens(out: Any) -> torch.Tensor:
    tokens: torch.Tensor = getattr(out, "sequences", out)
    return tokens


def test_parts_that_generate_compile_nothing_by_themselves() -> None:
    """`generate` of a part decides for itself whether to compile: while the policy is on, it does not."""
    model = tiny_model("blip-2")
    cp.apply(model, cp.CompilationConfig(backend="eager"))
    parts = [part for part in model.modules() if hasattr(part, compat._MAY_COMPILE)]
    assert len(parts) > 1 and not any(getattr(part, compat._MAY_COMPILE)({}, None) for part in parts)
    cp.remove(model)
    assert not any(compat._MAY_COMPILE in vars(part) for part in parts)
