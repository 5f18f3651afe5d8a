"""The configuration that says which masks a decoder gets, where blocks have several masks."""

from __future__ import annotations

import pytest

from compile_policy_transformers.cache_masks import mask_config
from compile_policy_transformers.tiny import tiny_config


@pytest.mark.parametrize("model_type", ["falcon_h1", "zamba"])
def test_each_block_has_the_masks_of_its_layers(model_type: str) -> None:
    """Also where the kinds are computed (falcon_h1); the configuration itself stays as it is."""
    config = tiny_config(model_type)
    before = list(config.layer_types)
    made = mask_config(config)
    assert "hybrid" in before and config.layer_types == before
    assert set(made.layer_types) == {"full_attention", "linear_attention"}
    assert made.get_text_config().layer_types == made.layer_types
    assert isinstance(made, type(config)) and made.hidden_size == config.hidden_size
