"""Deep decoders of several kinds of layers: fewer layers are traced than there are, and every token is eager's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

import compile_policy
from compile_policy import CompilationConfig
from compile_policy.region import region_of
from compile_policy_transformers import tiny_inputs
from compile_policy_transformers.tiny import model as tiny
from compile_policy_transformers.tiny import tiny_config

LAYERS = 12


def deep(model_type: str) -> PreTrainedModel:
    """A tiny model with as many layers, in the order of kinds that the architecture has by default."""
    config: Any = tiny_config(model_type)
    text = config.get_text_config()
    default = AutoConfig.for_model(model_type, **tiny.FILL_IN.get(model_type, {})).get_text_config()
    held, text.num_hidden_layers = text.num_hidden_layers, LAYERS
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == held and name != "architectures":
            usual = getattr(default, name, None) or value
            setattr(text, name, [usual[i % len(usual)] for i in range(LAYERS)])
    torch.manual_seed(0)
    model: PreTrainedModel = tiny._model_class(model_type)(config).eval()
    tiny._draw_weights(model, 0)
    tiny._make_greedy(model.generation_config)
    return model


@pytest.mark.parametrize(
    ("model_type", "traced"),
    [
        pytest.param(
            "gemma3", 7, marks=pytest.mark.slow
        ),  # five sliding layers, a full one, and the sliding one behind that
        ("qwen3_vl", 3),  # pictures are added behind the first layers
        pytest.param("qwen2_5_vl", 2, marks=pytest.mark.slow),
        ("exaone4_5", 5),  # three sliding layers and a full one
    ],
)
def test_fewer_layers_are_traced(model_type: str, traced: int) -> None:
    model = deep(model_type)
    requests = [tiny_inputs(model, text_len=12, images=[(64, 64)]), tiny_inputs(model, text_len=14, images=[])]
    caches: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}]

    def answers() -> list[Any]:
        torch.manual_seed(0)
        return [model.generate(**r, **c, max_new_tokens=6).tolist() for c in caches for r in requests]

    wanted = answers()
    compile_policy.apply(model, config=CompilationConfig(backend="eager"))
    assert answers() == wanted
    regions = [r for m in model.modules() if (r := region_of(m)) is not None and r.role == "decoder"]
    (region,) = regions
    assert region.graphs == len(caches) and region.eager_calls == 0
    depths = {e.graph.depth for found in region.entries.values() for e in found}
    assert depths == {f"{traced} of {LAYERS} layers were traced, which stand for the others"}
