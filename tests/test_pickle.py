"""A model under the policy can be pickled and copied, and neither has anything of the policy in it."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import compile_policy as cp
from compile_policy.region import region_of
from compile_policy_transformers import tiny_model


@pytest.mark.parametrize("name", ["llama", "lfm3_vl", "diffusion_gemma"])
def test_pickles_and_copies_are_plain_models(name: str) -> None:
    """No name of this package is in the bytes; lists of layers are plain lists, `generate` decides for itself again."""
    model = tiny_model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = name == "lfm3_vl"
        cp.apply(model, cp.CompilationConfig(backend="eager", cache_dir=False, compile_mm_encoder=wanted))
    assert any(region_of(m) for m in model.modules())
    data = pickle.dumps(model)
    assert b"compile_policy" not in data
    for other in (pickle.loads(data), copy.deepcopy(model)):
        assert type(other) is type(model) and not any(region_of(m) for m in other.modules())
        assert not any(type(m).__module__.startswith("compile_policy") for m in other.modules())
        assert all(isinstance(m, nn.Module) for m in other.modules())
        if hasattr(other, "_valid_auto_compile_criteria"):
            found = other._valid_auto_compile_criteria
            assert found.__func__ is type(other)._valid_auto_compile_criteria and found.__self__ is other
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, theirs)
