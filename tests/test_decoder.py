"""A model's own `generate` under the policy: eager's tokens, and one graph per kind of cache for every request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch._dynamo
from falling import falls_back
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

import compile_policy as cp
from compile_policy.plan import ComponentReport
from compile_policy_transformers.tiny import tiny_inputs, tiny_model

TEXT = frozenset({"llama", "qwen3", "gemma2", "mistral"})
FAMILIES = ("llama", "qwen3", "qwen2_5_vl", "qwen3_vl", "llava", "gemma3", "exaone4_5")
MORE = ("gemma2", "mistral", "glm4v", "qwen2_vl", "glm_ocr")
ALL = [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
CACHES: tuple[str | None, ...] = (None, "static")
NEW_TOKENS = 8


def _requests(model: PreTrainedModel) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, inputs, arguments of generate): what users mix, in one trace."""
    text = model.config.model_type in TEXT
    one, two, three = [(56, 84)], [(56, 84), (56, 56)], [(56, 56), (84, 56), (56, 112)]
    yield "text only", tiny_inputs(model, text_len=9, seed=1), {}
    if not text:
        yield "one image", tiny_inputs(model, text_len=12, images=one, seed=2), {}
        yield "several images", tiny_inputs(model, text_len=15, images=three, seed=3), {}
    yield "left padding", tiny_inputs(model, text_len=14, images=[] if text else two, batch=3, seed=4), {}
    short = tiny_inputs(model, text_len=2, seed=5)
    yield "one token", {name: value[:, -1:] for name, value in short.items()}, {}
    yield "sampling", tiny_inputs(model, text_len=11, seed=6), {"do_sample": True, "top_k": 20}
    yield "beams", tiny_inputs(model, text_len=10, images=[] if text else one, seed=7), {"num_beams": 3}
    several = {"do_sample": True, "num_return_sequences": 2}
    yield "two answers", tiny_inputs(model, text_len=5, images=[] if text else one, seed=8), several


def _generate(model: PreTrainedModel, inputs: Mapping[str, Any], cache: str | None, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    if cache is not None:
        kwargs["cache_implementation"] = cache
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, **kwargs)


def _decoder(model: PreTrainedModel) -> ComponentReport:
    return next(c for c in cp.report(model).components if c.role == "decoder")


def _apply(model: PreTrainedModel, backend: str = "eager") -> PreTrainedModel:
    torch._dynamo.reset()
    counters.clear()
    return cp.apply(model, cp.CompilationConfig(backend=backend))


def _assert_graphs(model: PreTrainedModel, count: int) -> None:
    """The report, its dictionary and Dynamo's own counter agree on the number of graphs; nothing ran eager."""
    row = _decoder(model)
    listed = next(c for c in cp.report(model).to_dict()["components"] if c["role"] == "decoder")
    assert row.fallback is None and row.eager_calls == 0
    assert (row.graphs, listed["graphs"], counters["stats"]["unique_graphs"]) == (count, count, count)
    assert not counters["graph_break"]


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("model_type", ALL)
def test_one_graph_for_mixed_requests(model_type: str, cache: str | None) -> None:
    """Text, pictures, batches, padding, one token, sampling, beams: eager's tokens from exactly one graph."""
    model = tiny_model(model_type)
    want = {name: _generate(model, inputs, cache, **how) for name, inputs, how in _requests(model)}
    _apply(model)
    for name, inputs, how in _requests(model):
        got = _generate(model, inputs, cache, **how)
        assert torch.equal(got, want[name]), name
        _assert_graphs(model, 1)
    assert _decoder(model).calls == len(want) * NEW_TOKENS


@pytest.mark.parametrize("model_type", ALL)
def test_equality_bites(model_type: str) -> None:
    """The tokens that are compared depend on the padding mask, on the pictures and on the sampling seed."""
    model = tiny_model(model_type)
    for name, inputs, how in _requests(model):
        want = _generate(model, inputs, None, **how)
        if name == "left padding":
            unmasked = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
            assert not torch.equal(_generate(model, unmasked, None), want)
        if name == "several images":
            blank = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
            assert not torch.equal(_generate(model, blank, None), want)
        if name == "sampling":
            assert not torch.equal(_generate(model, inputs, None), want)


@pytest.mark.parametrize("model_type", ["llama", "qwen2_5_vl", "gemma3"])
def test_hidden_states_and_no_cache(model_type: str) -> None:
    """Hidden states are another result and no cache is another kind of cache: one graph each, values as eager's."""
    model = tiny_model(model_type)
    images = [] if model_type in TEXT else [(56, 84)]
    inputs = tiny_inputs(model, text_len=10, images=images, batch=2, seed=9)
    hidden = {"output_hidden_states": True, "return_dict_in_generate": True, "output_logits": True}
    want, want_plain = _generate(model, inputs, None, **hidden), _generate(model, inputs, None, use_cache=False)
    _apply(model)
    got = _generate(model, inputs, None, **hidden)
    _assert_graphs(model, 1)
    assert torch.equal(got.sequences, want.sequences)
    padding = inputs["attention_mask"].bool()
    for step, (mine, stock) in enumerate(zip(got.hidden_states, want.hidden_states, strict=True)):
        assert len(mine) == len(stock)
        for a, b in zip(mine, stock, strict=True):
            real = padding if step == 0 else slice(None)
            torch.testing.assert_close(a[real], b[real], atol=1e-4, rtol=1e-3)
    assert type(got.past_key_values) is type(want.past_key_values)
    assert torch.equal(_generate(model, inputs, None, use_cache=False), want_plain)
    _assert_graphs(model, 2)


def _forms(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same call in the forms that a caller may choose."""
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    yield "ids", dict(inputs)
    yield "no mask", {"input_ids": ids}
    yield "no cache argument", {"input_ids": ids, "use_cache": True}
    yield "positions", {"input_ids": ids, "position_ids": torch.arange(length)[None]}
    yield "embeddings", {"inputs_embeds": model.get_input_embeddings()(ids)}
    yield "dynamic cache", {**inputs, "past_key_values": DynamicCache(config=model.config.get_text_config())}
    yield "some logits", {"input_ids": ids, "logits_to_keep": 2}
    yield "tuple", {"input_ids": ids, "return_dict": False}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_forms_of_a_direct_call(model_type: str) -> None:
    """Mask and positions given or omitted, ids or embeddings, with and without a cache object: one graph, eager's
    logits."""
    model = tiny_model(model_type)
    inputs = tiny_inputs(model, text_len=12, batch=2, seed=3)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    with torch.no_grad():
        want = {name: model(**call) for name, call in _forms(model, inputs)}
        _apply(model)
        for name, call in _forms(model, inputs):
            got = model(**call)
            assert type(got) is type(want[name])
            torch.testing.assert_close(got[0], want[name][0], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    _assert_graphs(model, 1)


def test_prepared_masks() -> None:
    """Masks prepared by the caller, boolean or additive, are used as they are."""
    model = tiny_model("llama")
    ids = tiny_inputs(model, text_len=7, batch=2)["input_ids"]
    visible = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    visible[1, :, 4:, 1] = False
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    masks = {"boolean": visible, "additive": additive}
    calls = {name: {"input_ids": ids, "attention_mask": mask, "use_cache": False} for name, mask in masks.items()}
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        want = {name: model(**call).logits for name, call in calls.items()}
        _apply(model)
        for name, call in calls.items():
            got = model(**call).logits
            torch.testing.assert_close(got, want[name], atol=1e-4, rtol=1e-3)
            assert not torch.allclose(got, plain, atol=1e-2)
    assert _decoder(model).eager_calls == 0


def test_both_caches_of_one_model() -> None:
    """A model that is used with both kinds of cache in turn has two graphs, however often they alternate."""
    model = tiny_model("gemma3")
    inputs = tiny_inputs(model, text_len=16, images=[(56, 56)], batch=2)
    want = _generate(model, inputs, None)
    _apply(model)
    for _ in range(2):
        for cache in CACHES:
            assert torch.equal(_generate(model, inputs, cache), want)
    _assert_graphs(model, 2)


def test_continued_chat() -> None:
    """A cache kept from one answer serves the next question, as in eager."""
    model = tiny_model("qwen2_5_vl")
    first = tiny_inputs(model, text_len=9, images=[(56, 84)])

    def chat() -> torch.Tensor:
        cache = DynamicCache(config=model.config.get_text_config())
        answer = model.generate(**first, past_key_values=cache, max_new_tokens=5)
        more = torch.cat([answer, torch.full((1, 4), 17)], dim=1)
        again = {"input_ids": more, "attention_mask": torch.ones_like(more)}  # the pictures are in the cache
        return model.generate(**again, past_key_values=cache, max_new_tokens=5)

    want = chat()
    _apply(model)
    assert torch.equal(chat(), want)
    _assert_graphs(model, 1)


def test_static_cache_of_the_caller() -> None:
    """A StaticCache that the caller made, reset between two requests, serves both from one graph."""
    model = tiny_model("llama")
    cache = StaticCache(config=model.config, max_cache_len=40)
    requests = [tiny_inputs(model, text_len=n, seed=n) for n in (7, 12)]
    want = [_generate(model, inputs, None) for inputs in requests]
    _apply(model)
    for inputs, tokens in zip(requests, want, strict=True):
        cache.reset()
        assert torch.equal(_generate(model, inputs, None, past_key_values=cache), tokens)
    _assert_graphs(model, 1)


@pytest.mark.parametrize(
    ("model_type", "cache"),
    [("qwen2_5_vl", None), pytest.param("gemma3", "static", marks=pytest.mark.slow)]
    + [pytest.param(name, c, marks=pytest.mark.slow) for name in ("llama", "qwen3_vl", "llava") for c in CACHES],
)
def test_inductor(model_type: str, cache: str | None) -> None:
    """The same holds for the kernels of Inductor."""
    model = tiny_model(model_type)
    want = {name: _generate(model, inputs, cache, **how) for name, inputs, how in _requests(model)}
    _apply(model, "inductor")
    for name, inputs, how in _requests(model):
        assert torch.equal(_generate(model, inputs, cache, **how), want[name]), name
    _assert_graphs(model, 1)


def test_bidirectional_prompt() -> None:
    """Without a picture PaliGemma sees its whole prompt at once, though nobody gives it a mask that says so."""
    model = tiny_model("paligemma")
    want = {name: _generate(model, inputs, None, **how) for name, inputs, how in _requests(model)}
    inputs = tiny_inputs(model, text_len=9)
    hidden = model(**inputs).logits
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, -1] += 1
    assert not torch.allclose(model(**changed).logits[0, 0], hidden[0, 0])  # the first token sees the last one
    _apply(model)
    for name, inputs, how in _requests(model):
        assert torch.equal(_generate(model, inputs, None, **how), want[name]), name
    _assert_graphs(model, 1)
    assert _decoder(model).eager_calls == 0


def test_unknown_cache_layers() -> None:
    """A cache that the policy cannot pass to a graph runs eager with a reason that names its layer."""

    class OwnLayer(DynamicLayer):
        """A layer of somebody's own, which computes with states."""

        def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = super().update(*args, **kwargs)
            return keys * 2, values

    model = tiny_model("llama")
    inputs = tiny_inputs(model, text_len=9)

    def answer() -> torch.Tensor:
        cache = DynamicCache()
        cache.layer_class_to_replicate = OwnLayer
        return model(**inputs, past_key_values=cache).logits

    want = answer()
    _apply(model)
    with falls_back("OwnLayer"):
        assert torch.equal(answer(), want)
    row = _decoder(model)
    assert row.fallback is not None and "OwnLayer" in row.fallback
    assert (row.graphs, row.eager_calls) == (0, 1)
