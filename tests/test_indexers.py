"""Qwen4-Exp: tokens chosen by an operator as the stock indexer chooses them, positions and ids in the cache."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

import compile_policy as cp
from compile_policy_transformers import indexers
from compile_policy_transformers.indexers import select_tokens, selecting, selecting_indexers
from compile_policy_transformers.known_code import fingerprint
from compile_policy_transformers.tiny import tiny_inputs, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::compile_policy.errors.PolicyWarning")


@pytest.fixture(scope="module")
def stock() -> PreTrainedModel:
    return tiny_model("qwen4_exp")


@pytest.fixture
def model(stock: PreTrainedModel) -> Iterator[PreTrainedModel]:
    torch._dynamo.reset()
    yield copy.deepcopy(stock)


def _indexer(model: PreTrainedModel) -> Any:
    (found,) = selecting_indexers(model.model.language_model)
    return found


def _masks(seed: int, batch: int, queries: int, slots: int) -> torch.Tensor:
    """Causal with padding; then anything: sequences in one row, tokens that see the future, ones that see nothing."""
    generator = torch.Generator().manual_seed(seed)
    if seed % 2:
        return torch.rand(batch, 1, queries, slots, generator=generator) < 0.7 * seed / 7
    mask = torch.ones(queries, slots, dtype=torch.bool).tril(slots - queries).repeat(batch, 1, 1, 1)
    mask[0, ..., : seed + 1] = False
    return mask


@pytest.mark.parametrize("seed", range(8))
def test_chosen_as_stock_does(stock: PreTrainedModel, seed: int) -> None:
    """The very same tokens, for masks of any form: causal, padded, or without any order."""
    indexer = _indexer(stock)
    batch, queries, slots = 2, (1, 5, 19)[seed % 3], 19
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, queries, indexer.index_qk_proj.in_features, generator=generator)
    angles = torch.rand(batch, slots, 16, generator=generator)
    cos, sin, mask = angles.cos(), angles.sin(), _masks(seed, batch, queries, slots)
    before = torch.randn(batch, slots - queries, indexer.index_head_dim, generator=generator)

    class Cache:
        def update_indexer(self, keys: torch.Tensor, layer: int) -> torch.Tensor:
            self.all = torch.cat([before, keys], dim=1)
            return self.all

    cache: Any = Cache()
    with torch.no_grad():
        want = indexer(hidden, (cos, sin), mask, cache)
        heads, width = indexer.index_n_heads, indexer.index_head_dim
        query = indexer.q_layernorm(indexer.index_qk_proj(hidden)[..., : heads * width].unflatten(-1, (heads, width)))
        query = indexers._rotated(query, cos[:, -queries:, None], sin[:, -queries:, None])
        norm = indexer.k_layernorm
        got = select_tokens(
            query, cache.all, mask[:, 0], cos, sin, norm.weight, norm.eps, indexer.compress_ratio, indexer.block_topk
        )
    assert torch.equal(got[:, None], want)
    assert seed % 2 or not torch.equal(want, mask) or queries < 5  # something was left out


def _calls(decoder: nn.Module, cache: Any, embeds: torch.Tensor, cuts: list[int]) -> list[torch.Tensor]:
    """The last hidden states of a sequence that comes in pieces."""
    with torch.no_grad():
        return [
            decoder(inputs_embeds=part, past_key_values=cache, use_cache=True).last_hidden_state
            for part in embeds.split(cuts, dim=1)
        ]


def test_positions_and_ids_stay_in_the_cache(model: PreTrainedModel) -> None:
    """One graph over prompts, turns and single tokens of dynamic caches; a static one that is used again after a
    reset begins anew. The embeddings alone are enough to know the ids."""
    decoder = model.model.language_model
    ids = torch.randint(3, 250, (2, 23), generator=torch.Generator().manual_seed(0))
    embeds = decoder.embed_tokens(ids).detach()
    cuts = [12, 1, 1, 5, 1, 3]
    eager = DynamicCache(config=decoder.config)
    want = _calls(decoder, eager, embeds, cuts)
    other = _calls(decoder, DynamicCache(config=decoder.config), embeds.flip(1), cuts)
    cp.apply(model, cp.CompilationConfig(backend="eager"))
    mine = DynamicCache(config=decoder.config)
    torch.testing.assert_close(_calls(decoder, mine, embeds, cuts), want, atol=1e-4, rtol=1e-3)
    where = decoder.config.layer_types.index("indexed_attention")
    assert torch.equal(mine.layers[where].indexer_position_ids, eager.layers[where].indexer_position_ids)
    assert torch.equal(mine.layers[0].conv_states[2], ids[:, -2:])
    static = StaticCache(config=decoder.config, max_cache_len=32)
    torch.testing.assert_close(_calls(decoder, static, embeds, cuts), want, atol=1e-4, rtol=1e-3)
    static.reset()
    torch.testing.assert_close(_calls(decoder, static, embeds.flip(1), cuts), other, atol=1e-4, rtol=1e-3)
    row = next(c for c in cp.report(model).components if c.role == "decoder")
    assert (row.graphs, row.eager_calls, row.fallback) == (2, 0, None)  # one for each kind of cache


@pytest.mark.slow
def test_beams(model: PreTrainedModel) -> None:
    """What the cache holds is reordered with the beams."""
    inputs = tiny_inputs(model, text_len=9)
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 3}
    want = model.generate(**inputs, **options)
    cp.apply(model, cp.CompilationConfig(backend="eager"))
    assert torch.equal(model.generate(**inputs, **options), want)
    row = next(c for c in cp.report(model).components if c.role == "decoder")
    assert (row.graphs, row.eager_calls) == (1, 0)


def test_an_indexer_of_other_code(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left as it is; the decoder runs eager, and the line is named."""
    inputs = tiny_inputs(model, text_len=9)
    with torch.no_grad():
        want = model(**inputs).logits
    monkeypatch.setattr(indexers, "_FORWARD", "another")
    assert selecting_indexers(model.model.language_model) == []
    cp.apply(model, cp.CompilationConfig(backend="eager"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(model(**inputs).logits, want)
    row = next(c for c in cp.report(model).components if c.role == "decoder")
    assert row.eager_calls == 1 and "modeling_qwen4_exp.py:" in str(row.fallback)


def test_changed_indexers_are_left_alone(stock: PreTrainedModel) -> None:
    """A norm with a hook, or of a class of somebody's own, is not left out; nothing stays behind after a trace."""
    decoder = stock.model.language_model
    indexer = _indexer(stock)
    with selecting([indexer]):
        assert "forward" in vars(indexer)
    assert "forward" not in vars(indexer)
    handle = indexer.k_layernorm.register_forward_hook(lambda *_: None)
    assert selecting_indexers(decoder) == []
    handle.remove()
    norm = indexer.k_layernorm
    try:
        indexer.k_layernorm = nn.RMSNorm(16)
        assert selecting_indexers(decoder) == []
    finally:
        indexer.k_layernorm = norm
    assert selecting_indexers(decoder) == [indexer]


def test_fingerprints_are_of_the_code_alone() -> None:
    """Comments, docstrings, annotations and names of functions do not count; what is done does."""

    def one(x: int) -> int:
        """Twice."""
        return 2 * x  # so it is

    def two(x):  # type: ignore[no-untyped-def]
        return 2 * x

    def three(x: int) -> int:
        return 3 * x

    assert fingerprint(one) == fingerprint(two) != fingerprint(three)
    assert fingerprint(len) == fingerprint(None) == ""


def test_gradients_go_back_where_a_cache_is_written(model: PreTrainedModel) -> None:
    """A step of training that leaves the cache on, as models do by default, gets eager's gradients."""
    inputs = tiny_inputs(model, text_len=6)
    model.train()

    def gradients(use_cache: bool) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"], use_cache=use_cache).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want = gradients(True)
    cp.apply(model, cp.CompilationConfig(backend="eager"))
    torch.testing.assert_close(gradients(True), want)
    row = next(c for c in cp.report(model).components if c.role == "decoder")
    assert (row.graphs, row.eager_calls) == (0, 1) and "in place" in str(row.fallback)
    torch.testing.assert_close(gradients(False), want, atol=1e-4, rtol=1e-3)
    assert next(c for c in cp.report(model).components if c.role == "decoder").graphs == 1


@pytest.mark.slow
def test_through_inductor(model: PreTrainedModel) -> None:
    requests = [tiny_inputs(model, text_len=n, images=p, seed=n) for n, p in ((9, ()), (21, [(56, 84)]))]
    options: dict[str, Any] = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    want = [model.generate(**r, **options) for r in requests]
    cp.apply(model, cp.CompilationConfig())
    for request, expected in zip(requests, want, strict=True):
        got = model.generate(**request, **options)
        assert torch.equal(got.sequences, expected.sequences)
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-3, rtol=1e-3)
    row = next(c for c in cp.report(model).components if c.role == "decoder")
    assert (row.graphs, row.eager_calls, row.fallback) == (1, 0, None)
