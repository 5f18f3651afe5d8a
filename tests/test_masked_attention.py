"""A long prompt without padding is attended to causally, without a dense mask, by the graph that serves every other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calling_decoders import small_config
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaForCausalLM, StaticCache

import compile_policy
from compile_policy import CompilationConfig
from compile_policy.masked_attention import causal_mark, dense, is_causal_mark, masked_attention
from compile_policy.region import Region, region_of
from compile_policy_transformers import tiny_model
from compile_policy_transformers.attention import MARKED_FROM

LONG = MARKED_FROM + 9


def _states(queries: int, keys: int, kv_heads: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, queries, 8, generator=generator)
    key, value = (torch.randn(2, kv_heads, keys, 8, generator=generator) for _ in range(2))
    return query, key, value


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (5, 9), (1, 4), (130, 200)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_mark_means_the_causal_mask(queries: int, keys: int, kv_heads: int) -> None:
    """The mark gives what the dense mask gives, grouped heads and empty slots behind the prompt included."""
    states = _states(queries, keys, kv_heads)
    mark = causal_mark(2, queries, keys)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril().expand(2, 1, queries, keys)
    expected = scaled_dot_product_attention(*states, attn_mask=mask, enable_gqa=kv_heads != 4).transpose(1, 2)
    assert torch.equal(dense(mark), mask)
    for given in (mark, mask.contiguous()):
        torch.testing.assert_close(masked_attention(*states, given, None), expected)
    everything = torch.ones(2, 1, queries, keys, dtype=torch.bool)
    if queries > 1 or keys > 1:  # a control: the mask matters
        assert not torch.allclose(masked_attention(*states, everything, None), expected)


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(1, 1, 4, 4, dtype=torch.bool),
        torch.ones(1, 1, 1, 4, dtype=torch.bool).expand(2, 1, 3, 4),
        torch.zeros(1, 1, 1, 1).expand(1, 1, 4, 4),
        torch.zeros(3, dtype=torch.bool)[:1].expand(1, 1, 4, 4),
        torch.zeros(1, 1, 1, 1, dtype=torch.bool),
        torch.ones((), dtype=torch.bool).expand(2, 1, 4, 4),
        torch.zeros(64 + 17, dtype=torch.bool)[:64].view(1, 1, 8, 8),
    ],
    ids=["closed", "expanded rows", "numbers", "part of a tensor", "one element", "all open", "as large"],
)
def test_no_other_mask_is_a_mark(mask: torch.Tensor) -> None:
    assert not is_causal_mark(mask)
    assert dense(mask) is mask


def test_the_operator_is_sound() -> None:
    """Its schema, its shapes under fake tensors, and its dispatch are what torch expects of an operator."""
    operator = torch.ops.compile_policy.masked_attention.default
    tests = ("test_schema", "test_faketensor")
    for mask in (torch.ones(2, 1, 5, 7, dtype=torch.bool), causal_mark(2, 5, 7)):
        torch.library.opcheck(operator, (*_states(5, 7), mask, 0.5), test_utils=tests)


def _applied(model: Any, **config: Any) -> Region:
    compile_policy.apply(model, CompilationConfig(cache_dir=False, **config))
    region = region_of(model.get_decoder())
    assert region is not None
    return region


def _marked(region: Region, *args: Any, **kwargs: Any) -> bool:
    return bool(region.bind(args, kwargs).marks)


def test_which_calls_are_marked() -> None:
    """Prompts that Transformers would leave to ``is_causal``, from a length on; padding, packing and a past are not."""
    region = _applied(LlamaForCausalLM(small_config()).eval(), backend="eager")
    ids = torch.randint(3, 60, (2, LONG))
    padded = torch.ones_like(ids)
    packed = torch.cat([torch.arange(50), torch.arange(LONG - 50)])[None].expand(2, -1)
    with torch.no_grad():
        assert _marked(region, ids)
        assert _marked(region, ids, attention_mask=padded)
        assert _marked(region, ids, past_key_values=StaticCache(config=small_config(), max_cache_len=LONG + 20))
        assert not _marked(region, ids[:, : MARKED_FROM - 1])
        padded[0, :3] = 0
        assert not _marked(region, ids, attention_mask=padded)
        assert not _marked(region, ids, position_ids=packed, use_cache=False)
        past = region.module(ids[:, :7], use_cache=True).past_key_values
        assert not _marked(region, ids, past_key_values=past)
    assert not _marked(region, ids)  # gradients are wanted


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral", "qwen2_5_vl", "bloom"])
def test_a_marked_prompt_equals_eager(kind: str) -> None:
    """Also where a window ends within the prompt, and where the decoder makes more of its mask."""
    model = tiny_model(kind).eval()
    ids = torch.randint(5, 40, (2, LONG))
    padded = torch.ones_like(ids)
    padded[0, :4] = 0
    text = model.get_decoder()
    with torch.no_grad():
        calls: list[dict[str, Any]] = [{}, {"attention_mask": padded}]
        expected = [text(ids, **call).last_hidden_state for call in calls]
        region = _applied(model, backend="eager")
        for call, want in zip(calls, expected, strict=True):
            rows = call.get("attention_mask", torch.ones_like(ids)).bool()
            got = text(ids, **call).last_hidden_state
            torch.testing.assert_close(got[rows], want[rows], atol=1e-4, rtol=1e-4)
    assert (region.graphs, region.eager_calls) == (1, 0)


def test_one_package_serves_marks_and_masks() -> None:
    """Through Inductor: a marked prompt, a padded one and decoding are one graph, which reads the mark as it is."""
    model = LlamaForCausalLM(small_config(1)).eval()
    ids = torch.randint(3, 60, (2, LONG))
    padded = torch.ones_like(ids)
    padded[1, :5] = 0
    calls: list[dict[str, Any]] = [
        {"attention_mask": torch.ones_like(ids)},
        {"attention_mask": padded},
    ]
    expected = [model.generate(ids, max_new_tokens=4, do_sample=False, **call) for call in calls]
    region = _applied(model)
    for call, want in zip(calls, expected, strict=True):
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, **call), want)
    (entry,) = (entry for found in region.entries.values() for entry in found)
    with torch.no_grad():
        call = region.bind((ids,), {})
    assert set(call.marks) == entry.graph.marks != set()
    assert (region.graphs, region.eager_calls, entry.graph.road) == (1, 0, "ahead")
