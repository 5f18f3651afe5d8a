"""Caches of causal convolutions: chunks of sound, first and later, short and long, in one graph."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import compile_policy as cp
from compile_policy_transformers.base import find_components
from compile_policy_transformers.padding_caches import PaddingCaches
from compile_policy_transformers.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::compile_policy.errors.PolicyWarning")


def _applied(model_type: str) -> tuple[Any, Any]:
    model = tiny_model(model_type)
    tower = next(f.module for f in find_components(model) if f.role == "encoder[audio]")
    cp.apply(model, cp.CompilationConfig(backend="eager", compile_mm_encoder=True))
    return model, tower


def _row(model: Any) -> Any:
    return next(row for row in cp.report(model).components if row.role == "encoder[audio]")


def test_chunks_one_after_another() -> None:
    """Latents and the states left behind are eager's, over chunks shorter than the padding too; one graph."""
    model, tower = _applied("vibevoice_asr")
    ratio = 40 // tower.forward(torch.randn(1, 1, 40)).latents.shape[1]
    with torch.no_grad():
        for pieces, counts in ((1, (9, 1, 2, 5)), (3, (1, 1, 8))):
            mine = theirs = None
            for count in counts:
                chunk = torch.randn(pieces, 1, count * ratio)
                got = tower(chunk, padding_cache=mine, use_cache=True)
                with cp.eager(model):
                    want = tower(chunk, padding_cache=theirs, use_cache=True)
                assert mine is None or got.padding_cache is mine
                mine, theirs = got.padding_cache, want.padding_cache
                torch.testing.assert_close(got.latents, want.latents)
                assert type(mine) is type(theirs) and mine.layers.keys() == theirs.layers.keys()
                for name, layer in theirs.layers.items():
                    torch.testing.assert_close(mine.layers[name].cache, layer.cache)
        plain = torch.randn(2, 1, 5 * ratio)
        assert tower(plain).padding_cache is None
    row = _row(model)
    assert (row.fallback, row.graphs, row.eager_calls) == (None, 2, 0)  # with a cache, and without


def test_a_cache_that_lacks_states_runs_eager() -> None:
    """A given cache from somewhere else is filled by eager."""
    model, tower = _applied("vibevoice_asr")
    with torch.no_grad():
        cache = PaddingCaches(tower).cls()  # type: ignore[misc]
        tower(torch.randn(1, 1, 40), padding_cache=cache, use_cache=True)
    assert len(cache.layers) == len(PaddingCaches(tower).convolutions)
    assert "has no state" in str(_row(model).fallback)


def test_caches_that_behave_otherwise_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a class does is tried, not what it is called."""
    tower = next(f.module for f in find_components(tiny_model("vibevoice_asr")) if f.role == "encoder[audio]")
    cls: Any = PaddingCaches(tower).cls
    assert cls is not None
    update = cls.update

    class Turned(cls):  # type: ignore[misc]
        def update(self, hidden_states: Any, cache_key: Any, conv_module: Any) -> Any:
            return update(self, hidden_states.flip(-1), cache_key, conv_module)

    monkeypatch.setattr(sys.modules[type(tower).__module__], cls.__name__, Turned)
    assert PaddingCaches(tower).cls is None
