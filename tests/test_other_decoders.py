"""Decoders beside those of docs/models.md, each for a trait that others may share: one graph, equal to eager."""

from __future__ import annotations

import warnings

import pytest
import torch

from compile_policy_transformers.matrix import _cells
from compile_policy_transformers.matrix_requests import prompts_of
from compile_policy_transformers.tiny import tiny_model

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
