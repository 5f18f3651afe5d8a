"""The policy's two attention functions compute what plain SDPA computes, in every form a model asks for."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from compile_policy_transformers import attention
from compile_policy_transformers.tiny import tiny_inputs, tiny_model

CAUSAL: Any = SimpleNamespace(is_causal=True)
FREE: Any = SimpleNamespace(is_causal=False)


def _qkv(
    heads: int = 4, kv_heads: int = 2, queries: int = 5, keys: int = 9, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, queries, 8, generator=generator)
    k = torch.randn(batch, kv_heads, keys, 8, generator=generator)
    return q, k, torch.randn(batch, kv_heads, keys, 6, generator=generator)


def _mask(queries: int = 5, keys: int = 9) -> torch.Tensor:
    """Causal at the end of the keys, and the second row padded on the left by three."""
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(2, 1, -1, -1).clone()
    mask[1, :, :, :3] = False
    return mask


def _plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None = None
) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _as_float(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_dense_equals_sdpa(kv_heads: int, kind: str) -> None:
    """Grouped heads, boolean and additive masks and a scale of one's own give SDPA's result, laid out flat."""
    q, k, v = _qkv(kv_heads=kv_heads)
    mask = _mask() if kind == "bool" else _as_float(_mask())
    got, weights = attention.dense_attention(CAUSAL, q, k, v, mask, scaling=0.3)
    assert weights is None and got.is_contiguous() and got.shape == (2, 5, 4, 6)
    torch.testing.assert_close(got, _plain(q, k, v, mask, 0.3))
    assert not torch.allclose(got, _plain(q, k, v, None, 0.3)), "the mask makes no difference here"


def test_dense_single_token() -> None:
    """One query against a cache is not taken for a causal first row."""
    q, k, v = _qkv(queries=1)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    got, _ = attention.dense_attention(CAUSAL, q, k, v, mask)
    torch.testing.assert_close(got, _plain(q, k, v, None))


def test_dense_without_mask() -> None:
    """Without a mask an encoder attends everywhere; a causal module is refused in a trace, where it would be wrong."""
    q, k, v = _qkv()
    got, _ = attention.dense_attention(FREE, q, k, v, None)
    torch.testing.assert_close(got, _plain(q, k, v, None))
    traced = torch.compile(lambda: attention.dense_attention(CAUSAL, q, k, v, None), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="causal and was called without a mask"):
        traced()


@pytest.mark.parametrize("queries", [1, 9])
def test_a_mask_that_another_thread_left_to_sdpa(queries: int) -> None:
    """A thread that began eager, before this one set out to trace, gets what Transformers' own attention gives it."""
    q, k, v = _qkv(queries=queries, kv_heads=4)
    got, _ = attention.dense_attention(CAUSAL, q, k, v, None)
    want, _ = sdpa_attention_forward(CAUSAL, q, k, v, None)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_dense_softcap_and_sinks(kind: str) -> None:
    """Soft capping and attention sinks equal the formulas written out."""
    q, k, v = _qkv()
    bool_mask = _mask()
    mask = bool_mask if kind == "bool" else _as_float(bool_mask)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    wide_k, wide_v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = torch.tanh(q @ wide_k.transpose(2, 3) * 0.4 / 3.0) * 3.0
    scores = scores.masked_fill(~bool_mask, float("-inf"))
    capped = (scores.softmax(-1) @ wide_v).transpose(1, 2)
    shares = scores.exp() / (scores.exp().sum(-1, keepdim=True) + sinks.exp().reshape(1, -1, 1, 1))
    sunk = (shares @ wide_v).transpose(1, 2)
    got, _ = attention.dense_attention(CAUSAL, q, k, v, mask, scaling=0.4, softcap=3.0)
    torch.testing.assert_close(got, capped)
    got, _ = attention.dense_attention(
        CAUSAL,
        q,
        k,
        v,
        mask,
        scaling=0.4,
        softcap=3.0,
        s_aux=sinks,
    )
    torch.testing.assert_close(got, sunk)
    assert not torch.allclose(sunk, capped, atol=1e-2)


def test_dense_position_bias() -> None:
    """A position bias is added to the scores, under a boolean, an additive and no mask."""
    q, k, v = _qkv(kv_heads=4)
    bias = torch.randn(1, 4, 5, 9, generator=torch.Generator().manual_seed(1))
    for mask in (_mask(), _as_float(_mask()), None):
        total = bias if mask is None else bias + (_as_float(mask) if mask.dtype is torch.bool else mask)
        got, _ = attention.dense_attention(FREE, q, k, v, mask, position_bias=bias)
        torch.testing.assert_close(got, _plain(q, k, v, total))


# Windows of one length, pictures of mixed lengths, a single one, neighbours of equal length, and an empty one.
LENGTHS = [[4, 4, 4], [6, 2, 9, 1], [12], [3, 3, 5, 5, 5, 2], [4, 0, 3, 0]]


def _block_diagonal(lengths: list[int]) -> torch.Tensor:
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return owner[:, None] == owner[None]


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_varlen_equals_block_diagonal_sdpa(lengths: list[int], kv_heads: int) -> None:
    """Packed sequences attend to themselves only, whatever their lengths."""
    total = sum(lengths)
    q, k, v = _qkv(kv_heads=kv_heads, queries=total, keys=total, batch=1)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    got = attention.varlen_attention(q, k, v, bounds, 0.35)
    torch.testing.assert_close(got, _plain(q, k, v, _block_diagonal(lengths), 0.35))
    if len([n for n in lengths if n]) > 1:
        assert not torch.allclose(got, _plain(q, k, v, None, 0.35)), "packing makes no difference here"


@pytest.mark.parametrize("lengths", [[4, 4], [6, 2, 3]], ids=str)
def test_varlen_is_a_lawful_operator(lengths: list[int]) -> None:
    """The operator's schema, its shapes without data and its use under dynamic sizes are consistent."""
    total = sum(lengths)
    q, k, v = _qkv(queries=total, keys=total, batch=1)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(attention.varlen_attention, (q, k, v, bounds, 0.35), test_utils=utils)


def test_encoder_attention_chooses_by_lengths() -> None:
    """With packed lengths the encoder's attention is block-diagonal, without them it is dense."""
    q, k, v = _qkv(queries=9, batch=1)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed, _ = attention.encoder_attention(FREE, q, k, v, None, cu_seq_lens_q=bounds)
    torch.testing.assert_close(packed, _plain(q, k, v, _block_diagonal([4, 5])))
    dense, _ = attention.encoder_attention(FREE, q, k, v, None)
    torch.testing.assert_close(dense, _plain(q, k, v, None))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3"])
def test_whole_model_under_the_policy_attention(model_type: str) -> None:
    """A stock model with the policy's attention chosen by name gives its own logits, soft cap and windows included."""
    model = tiny_model(model_type)
    inputs = tiny_inputs(model, text_len=20, batch=2)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = model(**inputs).logits
        with attention.traced_with(attention.configs_below(model), attention.DECODER):
            got = model(**inputs).logits
    torch.testing.assert_close(got[real], want[real], atol=2e-5, rtol=1e-4)


def test_traced_with_restores() -> None:
    """The implementation is as before after the block, also when the block raises; other choices are left alone."""
    model = tiny_model("llama")
    config = model.config
    with pytest.raises(KeyError), attention.traced_with([config], attention.DECODER):
        assert config._attn_implementation == attention.DECODER
        raise KeyError
    assert config._attn_implementation == "sdpa"
    model.set_attn_implementation("flex_attention")
    with attention.traced_with([config], attention.DECODER):
        assert config._attn_implementation == "flex_attention"


def test_configs_below_are_distinct() -> None:
    """Every configuration below a module is found once."""
    model = tiny_model("qwen2_5_vl")
    found = attention.configs_below(model)
    assert len({id(c) for c in found}) == len(found)
    assert {id(model.config), id(model.config.vision_config), id(model.config.text_config)} <= {id(c) for c in found}
    assert attention.configs_below(nn.Linear(2, 2)) == []


def test_a_scale_made_of_a_size_does_not_fix_the_size() -> None:
    """One graph for channel attention over other numbers of tokens; the same numbers as with SDPA's own scale."""

    def channels(x: torch.Tensor) -> torch.Tensor:
        return attention.dense_attention(nn.Identity(), x, x, x, None, scaling=x.shape[2] ** -0.5)[0]

    graphs: list[Any] = []

    def counting(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch._dynamo.config.patch(specialize_float=True):
        compiled = torch.compile(channels, backend=counting, fullgraph=True, dynamic=True)
        for tokens in (5, 9, 16):
            x = torch.randn(1, 2, tokens, 4)
            torch._dynamo.mark_static(x, (0, 1, 3))
            want = F.scaled_dot_product_attention(x, x, x, scale=tokens**-0.5)
            assert torch.allclose(compiled(x), want.transpose(1, 2), atol=1e-5)
    assert len(graphs) == 1
