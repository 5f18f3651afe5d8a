"""Speculative decoding on sliding caches: a layer that records its past goes through the ordinary graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import compile_policy as cp
from compile_policy.plan import ComponentReport
from compile_policy_transformers.tiny import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])


def _decoder(model: Any) -> ComponentReport:
    (found,) = [c for c in cp.report(model).components if c.role == "decoder"]
    return found


def _model(name: str, window: int = 4) -> Any:
    model = tiny_model(name)
    config = model.config.get_text_config()
    config.sliding_window = window
    for module in model.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = window
    return model.eval()


@pytest.mark.parametrize("how", ["prompt lookup", "assisted"])
@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "exaone4_5"])
def test_speculative_decoding_is_compiled(name: str, how: str) -> None:
    """No target call is eager, the graph is that of ordinary decoding, and tokens are eager's beyond the window."""
    model = _model(name)
    config: Any = {"prompt_lookup_num_tokens": 3}
    if how == "assisted":
        config = {"assistant_model": _model(name)}
    want = model.generate(IDS, max_new_tokens=10, do_sample=False, **config)
    cp.apply(model, cp.CompilationConfig(backend="eager", cache_dir=False))
    assert torch.equal(model.generate(IDS, max_new_tokens=10, do_sample=False), want)
    plain = _decoder(model).graphs
    assert torch.equal(model.generate(IDS, max_new_tokens=10, do_sample=False, **config), want)
    report = _decoder(model)
    assert (report.graphs, report.eager_calls, report.fallback) == (plain, 0, None)


@pytest.mark.parametrize("crop", [True, False])
def test_the_recorded_past_is_eagers(crop: bool) -> None:
    """States, lengths and results, with calls of several tokens, rollbacks, and calls that follow without one."""
    model = _model("gemma2").model
    caches: list[Any] = []
    for compiled in (False, True):
        if compiled:
            cp.apply(model, cp.CompilationConfig(backend="eager", cache_dir=False))
        with torch.no_grad():
            cache = model(IDS[:, :7], use_cache=True).past_key_values
            cache.activate_past_recording()
            results = []
            for step, tokens in enumerate((3, 1, 4, 2, 1)):
                results.append(model(IDS[:, :tokens] + step, past_key_values=cache).last_hidden_state)
                if crop:
                    cache.crop(-(step % 2))
        caches.append((cache, results))
    (stock, want), (mine, got) = caches
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(mine.layers, stock.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys)
        torch.testing.assert_close(a.values, b.values)
        assert a.get_seq_length() == b.get_seq_length()
    report = cp.report(model).components[0]
    assert (report.graphs, report.eager_calls, report.fallback) == (1, 0, None)
