"""Decoders beside those of docs/models.md, each for a trait that others may share: one graph, equal to eager."""

from __future__ import annotations

import warnings

import pytest
import torch

from compile_policy_transformers.attention import ADDITIVE, DECODER
from compile_policy_transformers.base import find_components
from compile_policy_transformers.components import meta_model
from compile_policy_transformers.decoder_masks import DecoderMasks
from compile_policy_transformers.matrix import _cells
from compile_policy_transformers.matrix_requests import prompts_of
from compile_policy_transformers.tiny import tiny_config, tiny_model

TRAITS = (
    ("falcon", "static"),  # attention written out, and a prepared mask that is boolean
    ("biogpt", "none"),  # counts tokens, where its embedding of positions would count along the padding mask
    ("opt", "none"),  # has such an embedding count
    ("gpt_neox_japanese", "dynamic"),  # a copy that asks whether 16 * s is 16
    ("diffllama", "dynamic"),  # torch.rms_norm of four dims asks whether s is more than 1
    ("falcon_mamba", "dynamic"),  # recurrent layers alone, which are handed the padding as it is given
    ("ctrl", "none"),  # assigns a buffer to itself
    pytest.param("hy_v4", "dynamic", marks=pytest.mark.slow),  # layers that use the choice of another's indexer
)


@pytest.mark.parametrize(("model_type", "cache"), TRAITS)
def test_one_graph(model_type: str, cache: str) -> None:
    model = tiny_model(model_type)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        cell = _cells(model, prompts_of(model), cache, {"decoder": ("decoder",)})["decoder"]
    assert (cell.state, cell.graphs) == ("ok", 1), cell


@pytest.mark.parametrize(("model_type", "masks"), [("deepseek_v4", ADDITIVE), ("gpt_oss", DECODER)])
def test_masks_that_are_lengthened_are_numbers(model_type: str, masks: str) -> None:
    """A boolean mask that is put before a bias, closed at minus infinity, would open what the bias closes."""
    decoder = next(f.module for f in find_components(meta_model(tiny_config(model_type))) if f.role == "decoder")
    assert DecoderMasks(decoder).implementation == masks


@pytest.mark.slow
def test_states_of_windows_without_a_cache() -> None:
    """DeepSeek V4 compresses whole windows: a graph where there are some, and one where there are none."""
    model = tiny_model("deepseek_v4")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        cell = _cells(model, prompts_of(model), "none", {"decoder": ("decoder",)})["decoder"]
        cached = _cells(model, prompts_of(model)[:1], "dynamic", {"decoder": ("decoder",)})["decoder"]
    assert (cell.state, cell.eager_calls) == ("graphs", 0), cell
    assert cached.state == "eager" and "DeepseekV4HCACache (modeling_deepseek_v4.py:" in cached.reason, cached
