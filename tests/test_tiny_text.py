"""Every causal language model of the installed Transformers is built tiny, runs and generates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from compile_policy_transformers import compat
from compile_policy_transformers.components import TASKS
from compile_policy_transformers.tiny import generation_inputs, tiny_inputs, tiny_model

TEXT = tuple(
    compat.model_class_names("CAUSAL_LM").keys()
    - {model_type for task in TASKS if task != "CAUSAL_LM" for model_type in compat.model_class_names(task)}
)
#: Model type -> what Transformers raises for its own default configuration, and why.
NOT_BUILT = {
    # drafts for another model with that one's keys; the check that every key has a layer that makes it refuses it
    "gemma4_assistant": "hidden_size_per_layer_input must be 0",
    "gemma4_unified_assistant": "layer types producing a cache is different",
}
NO_MASK = {"cpmant", "rwkv", "xlstm"}  # they read no padding mask
BOTH_WAYS = {"cpmant", "xlm", "xlnet"}  # forward alone sees later tokens; generate asks for the next one otherwise
MOST = 1_000_000  # parameters


@torch.no_grad()
def _logits(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)  # reformer draws its hashes
    logits: torch.Tensor = model(**inputs).logits
    return logits


def _check(model_type: str) -> None:
    """It is small, masks padding, sees no later token, and `generate` writes two tokens."""
    model = tiny_model(model_type)
    assert sum(p.numel() for p in model.parameters()) < MOST
    inputs = tiny_inputs(model, text_len=14, batch=2)
    logits = _logits(model, inputs)
    assert torch.isfinite(logits).all()
    if model_type not in NO_MASK:
        mask = inputs["attention_mask"]
        unmasked = _logits(model, {**inputs, "attention_mask": torch.ones_like(mask)})
        assert (unmasked - logits)[-1][mask[-1].bool()].abs().max() > 0.1 * logits.std()
    if model_type not in BOTH_WAYS:
        later = {**inputs, "input_ids": inputs["input_ids"].clone()}
        later["input_ids"][:, -1] = (later["input_ids"][:, -1] + 7) % 250 + 3
        changed = (_logits(model, later) - logits)[0].abs().amax(-1) / logits.std()  # a row without padding
        assert changed[:-1].max() < 1e-3 < changed[-1]
    tokens = model.generate(**generation_inputs(model, inputs, 2), max_new_tokens=2, min_new_tokens=2)
    assert tokens.numel() == inputs["input_ids"].numel() + 2 * len(inputs["input_ids"]) or tokens.ndim == 3


@pytest.mark.parametrize("model_type", ["bert", "gptj", "granitemoehybrid", "musicgen"])
def test_causal_language_models(model_type: str) -> None:
    """An encoder by default, rotated in part, wider inside its layers, a decoder under the name of a larger model."""
    _check(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(TEXT) - NOT_BUILT.keys()))
def test_every_causal_language_model(model_type: str) -> None:
    """Beside those that take pictures or sound, too."""
    _check(model_type)


@pytest.mark.parametrize("model_type", NOT_BUILT)
def test_what_transformers_cannot_build(model_type: str) -> None:
    """These leave the table when a later version of Transformers builds its own default."""
    with pytest.raises(Exception, match=NOT_BUILT[model_type]):
        tiny_model(model_type)


@pytest.mark.parametrize("model_type", ["gemma3_text", "llama4_text"])
def test_the_text_of_a_model_that_sees_takes_no_pictures(model_type: str) -> None:
    """Though its class repeats what the architecture sees as a whole."""
    model = tiny_model(model_type)
    assert "image" in model.input_modalities
    with pytest.raises(ValueError, match="takes no images"):
        tiny_inputs(model, text_len=8, images=[(56, 56)])
