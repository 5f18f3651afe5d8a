"""Linear attention, state spaces and short convolutions: one graph for every length, equal to eager."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from falling import falls_back
from transformers import PreTrainedModel
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from compile_policy.applied import apply, remove, report
from compile_policy.config import CompilationConfig
from compile_policy.plan import ComponentReport
from compile_policy.reference import relative_error
from compile_policy_transformers import cache_masks, recurrence
from compile_policy_transformers.base import find_components
from compile_policy_transformers.decoder import DecoderBinder
from compile_policy_transformers.recurrent_mixers import RecurrentDecoder, is_covered
from compile_policy_transformers.recurrent_rules import RULES, Handed, handed
from compile_policy_transformers.tiny import tiny_config, tiny_inputs, tiny_model

#: Tokens and rows of a request: one token, a chunk of 64 less one, whole, and more; rows differ, so they are padded.
LENGTHS = ((1, 1), (2, 1), (9, 2), (63, 2), (64, 1), (65, 3), (200, 2))
FEW = ((3, 2), (66, 1), (9, 1))


def _requests(model: PreTrainedModel, lengths: Any = LENGTHS) -> Iterator[dict[str, Any]]:
    for tokens, rows in lengths:
        inputs = tiny_inputs(model, text_len=max(tokens, 2), batch=rows, seed=tokens)
        yield {name: value[:, :tokens] for name, value in inputs.items()} if tokens == 1 else inputs
    if getattr(model.config, "vision_config", None) is not None and lengths is LENGTHS:
        yield tiny_inputs(model, text_len=70, images=[(56, 84)], batch=2)


def _logits(model: Any, inputs: dict[str, Any], kind: str) -> list[torch.Tensor]:
    if kind == "none":
        return [model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]]
    options: dict[str, Any] = {"cache_implementation": "static"} if kind == "static" else {}
    out = model.generate(
        **inputs,
        **options,
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return list(out.logits)


def _compared(
    model_type: str, kind: str, lengths: Any = LENGTHS, round_it: Callable[[], Any] = nullcontext
) -> tuple[ComponentReport, float]:
    """What the decoder's region did with all requests, and the largest difference to eager."""
    model = tiny_model(model_type)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        requests = list(_requests(model, lengths))
        expected = [_logits(model, inputs, kind) for inputs in requests]
        apply(model, CompilationConfig(backend="eager"))
        with round_it():
            got = [_logits(model, inputs, kind) for inputs in requests]
        row = next(c for c in report(model).components if c.role == "decoder")
        remove(model)
    pairs = [pair for g, e in zip(got, expected, strict=True) for pair in zip(g, e, strict=True)]
    return row, max(relative_error(g, e) for g, e in pairs)


def _one_graph(model_type: str, kind: str) -> None:
    row, error = _compared(model_type, kind)
    assert (row.graphs, row.eager_calls, row.fallback) == (1, 0, None)
    assert row.calls >= len(LENGTHS) and error < 1e-4
    assert vars(handed) == vars(Handed())  # else no other process would find the entry


@pytest.mark.parametrize(("model_type", "kind"), [("qwen3_5", "dynamic"), ("mamba2", "dynamic")])
def test_one_graph_for_every_length(model_type: str, kind: str) -> None:
    _one_graph(model_type, kind)


SLOW = [(name, kind) for name in ("qwen3_next", "jamba") for kind in ("none", "dynamic", "static")]
SLOW += [("qwen3_5", "none"), ("qwen3_5", "static"), ("mamba2", "none"), ("mamba2", "static")]
SLOW += [(name, "dynamic") for name in ("lfm3_vl", "nemotron_h_omni", "inkling2", "glm5_next", "kimi_linear", "zaya")]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "kind"), SLOW)
def test_one_graph_for_every_length_slow(model_type: str, kind: str) -> None:
    _one_graph(model_type, kind)


# -- the checks bite --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_the_recipe_there_are_more_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal all the same."""
    monkeypatch.setattr(RecurrentDecoder, "tracing", lambda self: nullcontext())
    row, error = _compared("qwen3_next", "dynamic", FEW)
    assert row.graphs > 1 and error < 1e-4


def test_a_state_that_is_lost_is_noticed() -> None:
    """A rule that starts from nothing at every call: no such call is served."""

    @contextmanager
    def forgetful() -> Iterator[None]:
        found = recurrence._function

        def forgetting(module: str, name: str) -> Any:
            function = found(module, name)
            return lambda *args, initial_state=None, **kwargs: function(
                *args, initial_state=torch.zeros_like(initial_state), **kwargs
            )

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recurrence, "_function", forgetting)
            yield

    row, error = _compared("qwen3_next", "dynamic", ((66, 1),), forgetful)
    assert row.eager_calls == row.calls > 0 and "differs from eager" in str(row.fallback)
    assert error < 1e-4


def test_padding_that_is_ignored_is_noticed() -> None:
    @contextmanager
    def blind() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache_masks, "_padded", lambda mask, embeds: torch.ones(embeds.shape[:2], dtype=torch.bool))
            yield

    row, error = _compared("qwen3_next", "none", ((9, 3),), blind)
    assert row.eager_calls > 0 and "does not fit" in str(row.fallback)
    assert error < 1e-4


# -- which mixers -----------------------------------------------------------------------------------------------------


def _decoder(model_type: str) -> torch.nn.Module:
    return next(found.module for found in find_components(tiny_model(model_type)) if found.role == "decoder")


@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba2", "jamba", "lfm3_vl", "kimi_linear"])
def test_mixers_are_known(model_type: str) -> None:
    assert any(is_covered(module) for module in _decoder(model_type).modules())


def test_a_function_with_other_parameters_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = next(module for module in _decoder("qwen3_next").modules() if is_covered(module))

    def newer(query: Any, key: Any, value: Any, gate: Any, **kwargs: Any) -> None: ...

    monkeypatch.setattr(qwen3_next, "torch_chunk_gated_delta_rule", newer)
    assert not is_covered(mixer)


def test_mixers_with_a_forward_of_somebodys_own_are_left_alone() -> None:
    mixer = next(module for module in _decoder("qwen3_next").modules() if is_covered(module))
    mixer.__dict__["forward"] = mixer.forward
    assert not is_covered(mixer)


def test_mixers_are_as_before_after_an_error() -> None:
    decoder = _decoder("mamba2")
    with torch.no_grad(), pytest.raises(KeyboardInterrupt), DecoderBinder(decoder).tracing(decoder):
        assert any("forward" in module.__dict__ for module in decoder.modules())
        raise KeyboardInterrupt
    assert not any("forward" in module.__dict__ for module in decoder.modules())


def test_other_threads_are_not_disturbed() -> None:
    """What they call while a decoder is traced is Transformers' own code."""
    model = tiny_model("mamba2")
    decoder = next(found.module for found in find_components(model) if found.role == "decoder")
    inputs = tiny_inputs(model, text_len=9, batch=2)
    with torch.no_grad():
        expected = model(**inputs).logits
        with RecurrentDecoder(decoder).tracing():
            assert torch.equal(model(**inputs).logits, expected)


def test_with_gradients_mixers_stay_as_they_are() -> None:
    """The operators have no derivative."""
    decoder = _decoder("qwen3_next")
    with torch.enable_grad(), RecurrentDecoder(decoder).tracing():
        assert not any("forward" in module.__dict__ for module in decoder.modules())


# -- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "compiled"), [("qwen3_5", False), ("lfm2", True)])
def test_gradients_come_out_as_eager_has_them(model_type: str, compiled: bool) -> None:
    """A graph that overwrites states which its own gradients need is found out when it is made."""
    model = tiny_model(model_type)
    inputs = tiny_inputs(model, text_len=12)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    apply(model, CompilationConfig(backend="eager"))
    with nullcontext() if compiled else falls_back("requires grad is being used in an in-place operation"):
        got = gradients()
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name])
    (row,) = (c for c in report(model).components if c.role == "decoder")
    assert bool(row.fallback) != compiled
    if row.fallback:
        assert "in-place operation" in row.fallback


def _arguments(rule: str, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[list[Any], list[Any]]:
    """Tensors with their sequence dim, or ``None``, and what follows the state."""
    torch.manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype)

    if rule == "delta_rule":
        module = qwen3_next.__name__
        heads = [drawn(2, tokens, 2, 8), drawn(2, tokens, 2, 8), drawn(2, tokens, 4, 6)]
        names = ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"]
        gates = [-drawn(2, tokens, 4).abs(), drawn(2, tokens, 4).sigmoid()]
        return [*heads, *gates], [True, module, *names]
    if rule == "chunk_scan":
        decay, skip = -drawn(4).abs(), drawn(4)
        tensors = [drawn(2, tokens, 4, 8), drawn(2, tokens, 4), decay, drawn(2, tokens, 2, 5), drawn(2, tokens, 2, 5)]
        module = "transformers.models.mamba2.modeling_mamba2"
        return [*tensors, skip, drawn(4)], [16, True, 0.0, None, module]
    decay, skip = -drawn(6, 5).abs(), drawn(6)
    tensors = [drawn(2, 6, tokens), drawn(2, 6, tokens), decay, drawn(2, 5, tokens), drawn(2, 5, tokens)]
    return [*tensors, skip, drawn(2, 6, tokens), drawn(6)], [
        True,
        False,
        False,
        "transformers.models.mamba.modeling_mamba",
    ]


STATES = {"delta_rule": (2, 4, 8, 6), "chunk_scan": (2, 4, 8, 5), "selective_scan": (2, 6, 5)}
SEQUENCE = {"delta_rule": {0: 1, 1: 1, 2: 1, 3: 1, 4: 1}, "chunk_scan": {0: 1, 1: 1, 3: 1, 4: 1}}
SEQUENCE["selective_scan"] = {0: 2, 1: 2, 3: 2, 4: 2, 6: 2}


@pytest.mark.parametrize("rule", STATES)
@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_kernels_are_right(rule: str, tokens: int, dtype: torch.dtype) -> None:
    tensors, rest = _arguments(rule, tokens, dtype)
    operator = getattr(torch.ops.compile_policy, rule).default
    for state in (None, torch.randn(STATES[rule])):
        torch.library.opcheck(operator, (*tensors, state, *rest), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("rule", STATES)
def test_one_more_token_continues_the_state(rule: str) -> None:
    """70 tokens at once, or 69 and one more: the form for many and the form for one agree."""
    tensors, rest = _arguments(rule, 70)
    operator = getattr(recurrence, rule)
    empty = torch.zeros(STATES[rule])
    whole, after = operator(*tensors, empty, *rest)

    def part(start: int, stop: int) -> list[torch.Tensor]:
        dims = SEQUENCE[rule]
        return [t.narrow(dims[i], start, stop - start) if i in dims else t for i, t in enumerate(tensors)]

    first, state = operator(*part(0, 69), empty, *rest)
    kept = state.clone()
    last, end = operator(*part(69, 70), state, *rest)
    dim = SEQUENCE[rule][0]
    assert relative_error(torch.cat([first, last], dim=dim), whole) < 1e-5
    assert relative_error(end, after) < 1e-5
    assert torch.equal(state, kept), "a state that was given is not written into"
    assert relative_error(operator(*part(69, 70), empty, *rest)[0], last) > 1e-2  # the state matters


def test_every_rule_has_its_functions() -> None:
    """A name in the table that no installed model has would be a dead line."""
    from transformers.models.kimi_linear import modeling_kimi_linear
    from transformers.models.mamba import modeling_mamba
    from transformers.models.mamba2 import modeling_mamba2

    modules = (qwen3_next, modeling_kimi_linear, modeling_mamba2, modeling_mamba)
    assert all(rule.fits(vars(module)) for rule, module in zip(RULES, modules, strict=True))


# -- masks ------------------------------------------------------------------------------------------------------------


def test_sliding_layers_of_a_hybrid_get_a_sliding_mask() -> None:
    """Transformers' table has a causal one for them, which differs beyond the window only."""
    config = tiny_config("inkling2").get_text_config()
    decoder = _decoder("inkling2")
    embeds = torch.zeros(1, config.sliding_window + 3, config.hidden_size)
    masks = DecoderBinder(decoder)._masks(None, embeds, None, None)
    assert masks.keys() == {"full_attention", "linear_attention", "sliding_attention"}
    assert masks["full_attention"][0, 0, -1].sum() == config.sliding_window + 3
    assert masks["sliding_attention"][0, 0, -1].sum() == config.sliding_window


def test_masks_of_recurrent_layers_are_always_there() -> None:
    """Whether there is padding, and how many tokens, makes no other call of it."""
    decoder = _decoder("qwen3_next")
    binder = DecoderBinder(decoder)
    embeds = torch.zeros(2, 5, 64)
    padded = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert torch.equal(binder._masks(padded, embeds, None, None)["linear_attention"], padded.bool())
    for mask, length in ((None, 5), (torch.ones(2, 5, dtype=torch.long), 5), (torch.ones(2, 5), 1)):
        made = binder._masks(mask, embeds[:, :length], None, None)["linear_attention"]
        assert made.dtype is torch.bool and made.shape == (2, length) and bool(made.all())
