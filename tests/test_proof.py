"""Every form of call is proved once against the component's own forward, on copies."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from falling import falls_back
from transformers import DynamicCache, PreTrainedModel

from compile_policy import CompilationConfig, apply
from compile_policy.applied import regions
from compile_policy.errors import PolicyWarning
from compile_policy.proof import form_of, misfit
from compile_policy_transformers import tiny_inputs, tiny_model
from compile_policy_transformers.cache_argument import cache_name
from compile_policy_transformers.components import qualname


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def padded(model: PreTrainedModel) -> dict[str, Any]:
    return tiny_inputs(model, text_len=9, batch=2)


def applied(model: PreTrainedModel) -> Any:
    apply(model, CompilationConfig(backend="eager"))
    (region,) = regions(model)
    return region


def misread(region: Any) -> None:
    """A binder that makes something else of a call with padding: it leaves the mask out."""
    bind = region.binder.bind
    region.binder.bind = lambda module, args, kwargs: bind(module, args, {**kwargs, "attention_mask": None})


@torch.no_grad()
def test_a_form_that_the_binder_misreads_runs_eager(llama: PreTrainedModel) -> None:
    """Equal to eager all the same, with the reason."""
    inputs = padded(llama)
    want = llama(**inputs, use_cache=False).logits
    region = applied(llama)
    misread(region)
    with falls_back("does not fit calls of this form"):
        assert torch.equal(llama(**inputs, use_cache=False).logits, want)
    assert region.eager_calls == 1
    assert "does not fit calls of this form" in str(region.fallback)


@torch.no_grad()
def test_without_the_proof_it_would_be_wrong(llama: PreTrainedModel) -> None:
    """The control: unproved, the padded row comes out wrong."""
    inputs = padded(llama)
    want = llama(**inputs, use_cache=False).logits
    region = applied(llama)
    misread(region)
    region.forms = None
    assert (llama(**inputs, use_cache=False).logits - want)[1, -1].abs().max() > 0.1


@torch.no_grad()
def test_another_form_of_the_same_entry_stays_compiled(llama: PreTrainedModel) -> None:
    """Without padding, the same graph serves."""
    inputs = tiny_inputs(llama, text_len=9)
    want = llama(**inputs, use_cache=False).logits
    region = applied(llama)
    misread(region)
    with falls_back("does not fit calls of this form"):
        llama(**padded(llama), use_cache=False)
    assert torch.allclose(llama(**inputs, use_cache=False).logits, want, atol=1e-5)
    assert (region.graphs, region.eager_calls) == (1, 1)


@torch.no_grad()
def test_a_form_is_looked_at_once() -> None:
    """One eager run a form: not one for every call, whatever its sizes."""
    model = tiny_model("llama")
    region = applied(model)
    runs: list[int] = []
    plain = type(model.model).forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return plain(model.model, *args, **kwargs)

    for length in (4, 5, 6):
        model(**tiny_inputs(model, text_len=length), use_cache=False)
    known = dict(region.proved)
    model.model.forward = counting
    try:
        region.fingerprint.current = lambda *, look_again: region.fingerprint.number  # the patch is no new structure
        model(**tiny_inputs(model, text_len=7), use_cache=False)
    finally:
        del model.model.forward
    assert runs == []
    assert region.proved == known and len(known) == 1


def windowless(region: Any) -> None:
    """A binder that forgets the window: nothing differs before a sequence is longer than that."""
    config = copy.deepcopy(region.binder.masks.dense_config)
    config.sliding_window = 500
    region.binder.masks.dense_config = config


@torch.no_grad()
@pytest.mark.parametrize("proving", [True, False], ids=["proved", "control"])
def test_a_sequence_beyond_the_window_is_another_form(proving: bool) -> None:
    """What a short prompt proved says nothing about a long one."""
    model = tiny_model("mistral")  # a window of 8
    short, long = tiny_inputs(model, text_len=6), tiny_inputs(model, text_len=13)
    want = model(**long, use_cache=False).logits
    region = applied(model)
    windowless(region)
    if not proving:
        region.forms = None
    model(**short, use_cache=False)
    assert region.eager_calls == 0
    with falls_back("does not fit calls of this form") if proving else nullcontext():
        got = model(**long, use_cache=False).logits
    assert torch.allclose(got, want, atol=1e-4) == proving
    assert region.eager_calls == int(proving)


@torch.no_grad()
def test_the_step_that_passes_the_window_is_proved_and_the_next_are_not() -> None:
    """Prompt, first steps, steps beyond the window: three forms, whatever the length."""
    model = tiny_model("mistral")
    region = applied(model)
    for length, tokens in ((5, 12), (6, 9)):
        model.generate(**tiny_inputs(model, text_len=length), max_new_tokens=tokens, do_sample=False)
    assert len(region.proved) == 3 and not any(region.proved.values()) and region.graphs == 1


@torch.no_grad()
def test_the_callers_cache_and_random_state_are_untouched() -> None:
    """`misfit` works on copies."""
    model = tiny_model("llama")
    decoder = model.model
    cache = DynamicCache(config=model.config)
    embeds = torch.randn(2, 5, model.config.hidden_size)
    decoder(inputs_embeds=embeds, **{cache_name(decoder.forward): cache})
    held = copy.deepcopy(cache)
    state = torch.get_rng_state()
    kwargs = {"inputs_embeds": embeds[:, :1], cache_name(decoder.forward): cache}
    assert misfit(decoder, (), kwargs, lambda a, k, *_: decoder.forward(*a, **k)) == ""
    assert "differs from eager" in misfit(
        decoder, (), kwargs, lambda a, k, *_: decoder.forward(*a, **{**k, "inputs_embeds": k["inputs_embeds"] * 1.1})
    )
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, held.layers, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_a_cache_that_would_be_left_wrong_is_seen() -> None:
    """A run with the right result and a wrong state is no fit."""
    model = tiny_model("llama")
    decoder = model.model
    kwargs = {
        "inputs_embeds": torch.randn(1, 3, model.config.hidden_size),
        cache_name(decoder.forward): DynamicCache(config=model.config),
    }

    def run(args: Any, given: dict[str, Any], *_: Any) -> Any:
        result = decoder.forward(*args, **given)
        given[cache_name(decoder.forward)].layers[0].keys.mul_(1.5)
        return result

    assert "keys" in misfit(decoder, (), kwargs, run)


def test_forms_tell_kinds_and_not_sizes() -> None:
    """Another size is the same form; another rank, a missing argument or another flag is not."""
    form = form_of({"x": torch.ones(2, 3), "flag": True, "gone": None})
    assert form == form_of({"flag": True, "x": torch.ones(5, 1)})
    assert form != form_of({"x": torch.ones(2), "flag": True})
    assert form != form_of({"x": torch.ones(2, 3), "flag": False})
    assert form != form_of({"x": torch.ones(2, 3)})


@torch.no_grad()
def test_hidden_states_are_recorded_once() -> None:
    """Compiling a tower whose inner model has its output hooks leaves no second set (Transformers would)."""
    model = tiny_model("deepseek_vl_hybrid")
    inputs = tiny_inputs(model, text_len=8, images=[(64, 64)])
    want = model(**inputs).logits  # installs the inner model's hooks
    with pytest.warns(PolicyWarning, match="experimental"):
        apply(model, CompilationConfig(backend="eager", compile_mm_encoder=True))
    assert torch.allclose(model(**inputs).logits, want, atol=1e-4)
    tower = next(r.module for r in regions(model) if "high_res" in (qualname(model, r.module) or ""))
    pixels = inputs["high_res_pixel_values"]
    assert len(tower.forward(pixels, output_hidden_states=True).hidden_states) == 3


@torch.no_grad()
def test_a_binder_that_fails_is_no_failure_of_the_call() -> None:
    """A call that cannot be made canonical runs eager, with the reason."""
    model = tiny_model("llama")
    inputs = tiny_inputs(model, text_len=4)
    want = model(**inputs).logits
    region = applied(model)

    def bind(*_: Any) -> Any:
        raise KeyError("somewhere inside")

    region.binder.bind = bind
    with falls_back("it failed while the call was made canonical: KeyError"):
        assert torch.equal(model(**inputs).logits, want)
    assert "it failed while the call was made canonical: KeyError" in str(region.fallback)


def test_a_training_step_returns_what_eager_returns() -> None:
    """A decoder in training makes a cache unless it recomputes activations; gradients are equal, none of it eager."""
    for recomputing in (False, True):
        model = tiny_model("llama").train()
        if recomputing:
            model.gradient_checkpointing_enable()
        inputs = padded(model)
        want = model(**inputs, labels=inputs["input_ids"])
        want.loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        region = applied(model)
        got = model(**inputs, labels=inputs["input_ids"])
        got.loss.backward()
        assert (got.past_key_values is None) == (want.past_key_values is None) == recomputing
        mine = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(mine, gradients, strict=True))
        assert (region.graphs, region.eager_calls) == (1, 0)


@torch.no_grad()
def test_positions_that_follow_from_the_mask() -> None:
    """A decoder of OPT's kind counts positions along the padding mask: compiled, and equal."""
    model = tiny_model("opt")
    inputs = padded(model)
    want = model(**inputs, use_cache=False).logits
    region = applied(model)
    assert torch.allclose(model(**inputs, use_cache=False).logits, want, atol=1e-5)
    assert (region.graphs, region.eager_calls) == (1, 0)
