"""Backward through compiled components: one graph of any size, whose gradients are eager's."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch._inductor.config as inductor_config
from peft import LoraConfig, get_peft_model
from training_steps import apply, assert_equal, decoder, differs, ids, loss_of, small, step, steps

from compile_policy import compat_backward, lowering
from compile_policy.errors import PolicyWarning
from compile_policy.gradients import TOLERANCE, cotangents_of, gradient_difference, gradients_of

SIZES = [(2, 7), (3, 5), (1, 9), (2, 1), (1, 1), (4, 16)]


def test_one_graph_forward_and_backward_for_every_size() -> None:
    """Sizes of 1 are served by the same graph, after gradients of the first such call were compared with eager's."""
    model = small()
    want = steps(model, SIZES, use_cache=False)
    apply(model)
    got = steps(model, SIZES, use_cache=False)
    assert_equal(got, want)
    assert differs(want[0], want[1])  # else equality would say nothing
    report = decoder(model)
    assert (report.graphs, report.eager_calls, report.fallback) == (1, 0, None)


def test_weights_updated_in_place_are_seen_by_the_next_call() -> None:
    model, other = small(), small()
    apply(model, "aot_eager")
    for m in (model, other):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        for batch, length in [(2, 7), (3, 5), (1, 4)]:
            step(m, ids(batch, length), use_cache=False)
            optimizer.step()
    assert_equal([step(model, ids(2, 6), use_cache=False)], [step(other, ids(2, 6), use_cache=False)])
    with torch.no_grad():
        evaluated = [m.eval()(ids(2, 6), use_cache=False).logits for m in (model, other)]
    torch.testing.assert_close(*evaluated)
    assert decoder(model).graphs == 2  # training, evaluation
    model.train()
    other.train()
    assert_equal([step(model, ids(2, 5), use_cache=False)], [step(other, ids(2, 5), use_cache=False)])
    assert decoder(model).graphs == 2


@pytest.mark.slow
def test_without_the_mend_every_size_needs_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch fixes the backward to the example's strides, and the conditions of the entry say so.

    Once this fails, torch no longer does, and `compat_backward._CompileInner` can go.
    """
    monkeypatch.setattr(compat_backward._CompileInner, "capturing", property(lambda self: False, lambda self, _: None))
    model = small()
    want = steps(model, SIZES[:2], use_cache=False)
    apply(model)
    with inductor_config.patch(force_disable_caches=True):  # which hold what other tests compiled
        got = steps(model, SIZES[:2], use_cache=False)
    assert_equal(got, want)
    assert decoder(model).graphs > 1


class OnlyTraced(torch.autograd.Function):
    """Passes gradients on for the first length alone."""

    lengths: ClassVar[list[int]] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        OnlyTraced.lengths.append(x.shape[1])
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad if grad.shape[1] == OnlyTraced.lengths[0] else grad * 1.01


def test_a_backward_that_holds_for_the_traced_size_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        return lambda *given: tuple(OnlyTraced.apply(x) if x.dim() == 3 else x for x in gm.forward(*given))

    OnlyTraced.lengths = []
    monkeypatch.setattr(lowering, "lookup_backend", lambda name: lower)
    model = small()
    want = steps(model, SIZES[:2], use_cache=False)
    apply(model, "eager")
    with pytest.warns(PolicyWarning, match=r"differs from eager by 0\.01"):  # where `steps` calls the model
        assert_equal(steps(model, SIZES[:2], use_cache=False), want)
    report = decoder(model)
    assert report.eager_calls == 2
    assert report.fallback is not None and "differs from eager by 0.01" in report.fallback


class Shifts(torch.autograd.Function):
    """Right forward, and a gradient that is right for one size only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


@pytest.mark.parametrize("size", [(2, 5), (1, 1)])
def test_values_of_gradients_are_compared(size: tuple[int, int]) -> None:
    x = torch.randn(size, requires_grad=True)
    right, wrong = {"y": x * 2}, {"y": x * 2.1}
    cotangents = cotangents_of(right)
    want = gradients_of(right, cotangents, {"x": x})
    assert gradient_difference(gradients_of({"y": Shifts.apply(x)}, cotangents, {"x": x}), want, TOLERANCE) == ""
    said = gradient_difference(gradients_of(wrong, cotangents, {"x": x}), want, TOLERANCE)
    assert said.startswith("x differs from eager by 0.05")
    assert "none" in gradient_difference({"x": None}, want, TOLERANCE)


def test_hooks_and_grad_of_parameters_are_not_touched_by_the_comparison() -> None:
    model = small()
    weight = model.model.layers[0].self_attn.q_proj.weight
    seen: list[str] = []
    weight.register_hook(lambda grad: seen.append("tensor"))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    apply(model, "aot_eager")
    loss = model(input_ids=ids(2, 7), labels=ids(2, 7), use_cache=False).loss
    assert seen == [] and weight.grad is None
    loss.backward()
    assert seen == ["tensor", "accumulated"] and weight.grad is not None


def masked(tokens: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(tokens)
    mask[0, : tokens.shape[1] // 2] = 0
    return mask


def step_masked(model: Any, tokens: torch.Tensor, **call: Any) -> Any:
    return step(model, tokens, attention_mask=masked(tokens), **call)


def step_embeddings(model: Any, tokens: torch.Tensor, **call: Any) -> Any:
    """Gradients of embeddings that the caller hands over, beside those of parameters."""
    model.zero_grad()
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
    loss = loss_of(model(inputs_embeds=embeddings, **call))
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()} | {"embeddings": embeddings.grad}
    return loss.item(), {n: None if g is None else g.clone() for n, g in gradients.items()}


def with_lora(model: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def checkpointed(model: Any, reentrant: bool) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()


def frozen(model: Any) -> Any:
    model.requires_grad_(False)
    model.model.layers[-1].mlp.down_proj.requires_grad_(True)
    return model


FORMS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "masked": (lambda m: m, step_masked, {"use_cache": False}),
    "cache": (lambda m: m, step, {}),
    "masked, cache": (lambda m: m, step_masked, {}),
    "lora": (with_lora, step_masked, {"use_cache": False}),
    "frozen": (frozen, step, {"use_cache": False}),
    "embeddings": (lambda m: m, step_embeddings, {"use_cache": False}),
    "checkpointed": (lambda m: checkpointed(m, False), step, {"use_cache": False}),
    "checkpointed, reentrant": (lambda m: checkpointed(m, True), step, {"use_cache": False}),
    "lora, checkpointed": (lambda m: checkpointed(with_lora(m), True), step, {"use_cache": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "aot_eager", "eager"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_training(form: str, backend: str) -> None:
    change, run, call = FORMS[form]
    sizes = [(2, 7), (3, 5), (2, 12)]
    model = change(small(2))
    want = steps(model, sizes, run, **call)
    apply(model, backend)
    assert_equal(steps(model, sizes, run, **call), want)
    report = decoder(model)
    assert (report.graphs, report.eager_calls, report.fallback) == (1, 0, None)
    assert differs(want[0], want[1])
