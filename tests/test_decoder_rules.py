"""Rows that only name an architecture are needed, and states of an encoder or a picture are there before the graph."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import EncoderDecoderCache

import compile_policy as cp
from compile_policy.errors import NotCompilable
from compile_policy_transformers import decoder_rules
from compile_policy_transformers.components import meta_model
from compile_policy_transformers.cross_states import SeenStates, encoded_states
from compile_policy_transformers.decoder_masks import as_boolean, as_prepared, padding_of, prepared, prepares_own
from compile_policy_transformers.embedded import with_pictures
from compile_policy_transformers.experts import grouped, looping_experts
from compile_policy_transformers.matrix import _cells
from compile_policy_transformers.matrix_requests import prompts_of
from compile_policy_transformers.tiny import tiny_config, tiny_inputs, tiny_model

#: Rule -> an architecture that runs by it.
WITH = {"bloom": "bloom", "udop": "udop", "blip_text_model": "blip", "qwen4_exp_text": "qwen4_exp"}
WITH["voxtral_realtime_text"] = "voxtral_realtime"  # tests/test_streams.py shows what it is for


@pytest.mark.parametrize("rule", [r.model_type for r in decoder_rules.RULES])
def test_rules_are_about_something(rule: str) -> None:
    decoders = meta_model(tiny_config(WITH[rule])).modules()
    assert any(getattr(getattr(m, "config", None), "model_type", None) == rule for m in decoders)


@pytest.mark.parametrize(
    "rule", ["bloom", *(pytest.param(r, marks=pytest.mark.slow) for r in ("udop", "blip_text_model", "qwen4_exp_text"))]
)
def test_rules_are_needed(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its row the decoder runs eager, and answers as eager does."""
    left = tuple(r for r in decoder_rules.RULES if r.model_type != rule)
    assert len(left) == len(decoder_rules.RULES) - 1
    monkeypatch.setattr(decoder_rules, "RULES", left)
    model = tiny_model(WITH[rule])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        cell = _cells(model, prompts_of(model)[:2], "dynamic", {"decoder": ("decoder",)})["decoder"]
    assert cell.state == "eager" and cell.reason, cell


def test_states_of_the_encoder() -> None:
    """One token is enough for the states of an encoder's output, which are those that the whole call computes."""
    model = tiny_model("florence2")
    decoder = model.model.language_model.decoder
    torch.manual_seed(0)
    width = decoder.config.d_model
    values = {"inputs_embeds": torch.randn(2, 4, width), "encoder_hidden_states": torch.randn(2, 5, width)}
    pair = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.no_grad():
        got = encoded_states(decoder, pair, values)
        assert pair.get_seq_length() == 0 and not pair.is_updated
        decoder(**values, past_key_values=pair, use_cache=True)
        assert encoded_states(decoder, pair, values) == {}  # they are there now
    assert set(got) == {i for i, there in pair.is_updated.items() if there} == {0, 1}
    for i, layer in enumerate(pair.cross_attention_cache.layers):
        torch.testing.assert_close(got[i], (layer.keys, layer.values))


def test_layers_that_see_nothing() -> None:
    """A layer that stock code skips, because there is no picture, changes nothing; the cache is left without states."""
    model = tiny_model("mllama")
    decoder = model.model.language_model
    embeds = torch.randn(2, 4, decoder.config.hidden_size)
    seen, cache = SeenStates(decoder), DynamicCache()
    assert seen.layers
    values = {"inputs_embeds": embeds}
    with torch.no_grad():
        given = seen.complete(decoder, values, cache).read
        want = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
        seen.complete(decoder, (alone := {"inputs_embeds": embeds}), None)
        got = decoder(**{k: v for k, v in alone.items() if v is not None}, use_cache=False).last_hidden_state
    assert set(given) == seen.layers and all(not keys.any() and keys.shape[0] == 2 for keys, _ in given.values())
    assert not values["full_text_row_masked_out_mask"].any() and not cache.layers
    torch.testing.assert_close(got, want)


def test_picture_after_text() -> None:
    """A chat that meets its first picture on a cache that has none yet, and goes on without: that turn runs eager."""
    model = tiny_model("mllama")
    first = tiny_inputs(model, text_len=6)
    second = tiny_inputs(model, text_len=5, images=[(56, 56)], seed=2)
    third = tiny_inputs(model, text_len=4, seed=3)

    def chat() -> list[torch.Tensor]:
        cache, out, length = DynamicCache(), [], 0
        for turn in (first, second, third):
            length += turn["input_ids"].shape[1]
            turn = {**turn, "attention_mask": torch.ones(1, length, dtype=torch.long)}
            out.append(model(**turn, past_key_values=cache, use_cache=True).logits)
        return out

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = chat()
        cp.apply(model, cp.CompilationConfig(backend="eager"))
        torch.testing.assert_close(chat(), want, atol=1e-4, rtol=1e-4)
    row = next(c for c in cp.report(model).components if c.role == "decoder")
    # the last turn gives no mask of the picture: stock attention takes that for a causal one
    assert (
        (row.graphs, row.eager_calls) == (1, 1) and row.fallback is not None and "cross_attention_mask" in row.fallback
    )


def test_a_mask_of_its_own() -> None:
    """What kosmos-2 prepares by a method is prepared before the graph: its numbers, for prompts and single tokens."""
    decoder = tiny_model("kosmos-2").text_model.model
    assert prepares_own(decoder) and not prepares_own(tiny_model("llama").model)
    embeds = torch.randn(2, 4, decoder.config.embed_dim)
    padding = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    mask = prepared(decoder, padding, embeds, None)
    open_ = mask[:, 0] == 0
    assert torch.equal(open_[0], torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]).bool())
    assert torch.equal(prepared(decoder, None, embeds[:, :1], None), torch.zeros(2, 1, 1, 1))
    with as_prepared(decoder):
        assert decoder._prepare_decoder_attention_mask(mask, (2, 4), embeds, 0) is mask
    assert decoder._prepare_decoder_attention_mask(padding, (2, 4), embeds, 0).shape == mask.shape


def test_pictures_among_embeddings() -> None:
    """They are put in their places as long as the cache is empty; places are given always."""
    embeds, pictures = torch.zeros(1, 4, 3), torch.ones(1, 2, 3)
    values = {"image_embeds": pictures, "image_embeds_position_mask": torch.tensor([[0, 1, 1, 0]])}
    merged = with_pictures(embeds, values)
    assert merged[0, :, 0].tolist() == [0, 1, 1, 0] and not embeds.any() and "image_embeds" not in values
    assert with_pictures(embeds, (none := {})) is embeds and not none["image_embeds_position_mask"].any()
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3), 0)
    assert with_pictures(embeds, {**values, "image_embeds": pictures, "past_key_values": cache}) is embeds


def test_experts_of_a_loop_run_as_one_operation() -> None:
    """Only those that Transformers' own operation does not serve already; they are as they were afterwards."""
    model = tiny_model("step3p7")
    (experts,) = looping_experts(model)
    assert looping_experts(tiny_model("qwen3_moe")) == []
    before = dict(vars(experts))
    torch.manual_seed(0)
    hidden = torch.randn(7, experts.hidden_dim)
    weights, index = torch.randn(7, experts.num_experts).softmax(-1).topk(2)
    with torch.no_grad():
        want = experts(hidden, index, weights)
        with grouped([experts]):
            assert experts.forward is not before.get("forward") and "forward" in vars(experts)
            torch.testing.assert_close(experts(hidden, index, weights), want)
    assert vars(experts) == before


def test_a_mask_that_comes_back() -> None:
    """udop returns its mask: over the slots of a static cache too it is the caller's, in one graph, equal to eager."""
    model = tiny_model("udop")
    decoder = model.decoder
    config = decoder.config
    torch.manual_seed(0)
    embeds = torch.randn(2, 5, config.d_model)
    encoded = torch.randn(2, 4, config.d_model)
    padding = torch.ones(2, 5)
    padding[1, :2] = 0

    def calls(pair: EncoderDecoderCache) -> list[Any]:
        options = {"encoder_hidden_states": encoded, "past_key_values": pair, "use_cache": True}
        first = decoder(inputs_embeds=embeds[:, :3], attention_mask=padding[:, :3], **options)
        rows = torch.nn.functional.pad(padding[:, :4], (0, 5)).bool()[:, None, None]  # as generate prepares it
        second = decoder(inputs_embeds=embeds[:, 3:4], attention_mask=rows, **options)
        assert first.attention_mask.shape == (2, 3) and second.attention_mask is rows
        return [first, second, decoder(inputs_embeds=embeds[:, 4:], **options)]

    def fresh() -> EncoderDecoderCache:
        return EncoderDecoderCache(
            StaticCache(config=config, max_cache_len=9), StaticCache(config=config, max_cache_len=4)
        )

    with torch.no_grad():
        want = calls(fresh())
        cp.apply(model, cp.CompilationConfig(backend="eager"))
        got = calls(fresh())
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.last_hidden_state, theirs.last_hidden_state, atol=1e-4, rtol=1e-4)
        assert torch.equal(mine.attention_mask, theirs.attention_mask)
    row = next(c for c in cp.report(model).components if c.role == "decoder")
    assert (row.graphs, row.eager_calls) == (1, 0), row.fallback


def test_padding_of_a_prepared_mask() -> None:
    """It is what a causal mask hides beside the future; a mask that hides more is refused."""
    cache = DynamicCache()
    cache.update(torch.zeros(2, 1, 2, 4), torch.zeros(2, 1, 2, 4), 0)
    padding = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()
    causal = torch.ones(3, 5).tril(diagonal=2).bool()
    mask = (padding[:, None] & causal)[:, None]
    assert torch.equal(padding_of(mask, cache), padding)
    assert torch.equal(padding_of(torch.where(mask, 0.0, torch.finfo(torch.float32).min), cache), padding)
    mask[0, 0, 1, 0] = False
    with pytest.raises(NotCompilable, match="more than padding"):
        padding_of(mask, cache)


def test_masks_beside_those_of_an_encoder() -> None:
    """t5gemma2 puts both kinds of masks into one, so that they have to be of one kind: with masks that were prepared as
    numbers too, over a static cache, it is one graph and equal to eager."""
    model: Any = tiny_model("t5gemma2")
    model.set_attn_implementation("eager")  # with any other, stock code leaves out a mask that it needs then
    requests = [tiny_inputs(model, text_len=9), tiny_inputs(model, text_len=12, batch=2, seed=1)]
    asked = {"cache_implementation": "static", "max_new_tokens": 10, "output_logits": True}

    def run() -> list[torch.Tensor]:
        answers = [model.generate(**inputs, **asked, return_dict_in_generate=True) for inputs in requests]
        return [torch.stack(answer.logits) for answer in answers]

    with torch.no_grad():
        want = run()
        cp.apply(model, cp.CompilationConfig(backend="eager"))
        torch.testing.assert_close(run(), want, atol=1e-4, rtol=1e-4)
    row = next(c for c in cp.report(model).components if c.role == "decoder")
    assert (row.graphs, row.eager_calls) == (1, 0), row.fallback


def test_prepared_masks_as_boolean() -> None:
    """Only those that open and close and do nothing else."""
    lowest = torch.finfo(torch.float32).min
    plain, biased = torch.tensor([0.0, lowest]), torch.tensor([0.5, lowest])
    got = as_boolean({"a": plain, "b": biased, "c": None})
    assert got["a"].tolist() == [True, False] and got["b"] is biased and got["c"] is None
