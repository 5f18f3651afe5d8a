"""Dropout and autocast in training: eager's random numbers, and gradients of the masks that made the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training_steps import apply, assert_equal, decoder, differs, ids, small, step, steps, worst

SIZES = [(2, 7), (3, 5)]


def with_dropout(reentrant: bool | None = None, layers: int = 1) -> Any:
    """A model whose gradients depend on dropout masks, checkpointed unless ``reentrant`` is ``None``."""
    model = small(layers, attention_dropout=0.2)
    for layer in model.model.layers:
        layer.mlp.down_proj = torch.nn.Sequential(torch.nn.Dropout(0.3), layer.mlp.down_proj)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model.train()


def random_steps(model: Any) -> list[Any]:
    """Steps, each with the random state that it leaves."""
    found = []
    for batch, length in SIZES:
        torch.manual_seed(7)
        found.append((step(model, ids(batch, length), use_cache=False), torch.get_rng_state()))
    return found


def check(model: Any, backend: str) -> None:
    want = random_steps(model)
    torch.manual_seed(8)
    other = step(model, ids(*SIZES[0]), use_cache=False)
    assert differs(other, want[0][0])  # the masks matter
    apply(model, backend)
    got = random_steps(model)
    assert_equal([g for g, _ in got], [w for w, _ in want])
    for (_, state), (_, expected) in zip(got, want, strict=True):
        assert torch.equal(state, expected)
    report = decoder(model)
    assert (report.graphs, report.eager_calls, report.fallback) == (1, 0, None)


def test_checkpoints_compute_again_with_the_masks_of_the_loss() -> None:
    check(with_dropout(reentrant=True), "inductor")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_a_graph_that_runs_as_captured(reentrant: bool) -> None:
    check(with_dropout(reentrant), "eager")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "aot_eager", "eager"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_same_seed_draws_the_same_masks(reentrant: bool | None, backend: str) -> None:
    check(with_dropout(reentrant, layers=2), backend)


@pytest.mark.slow
def test_dropout_without_gradients_draws_eagers_numbers() -> None:
    model = with_dropout()
    with torch.no_grad():
        torch.manual_seed(7)
        want, state = model(ids(2, 7), use_cache=False).logits, torch.get_rng_state()
        apply(model)
        for _ in range(2):
            torch.manual_seed(7)
            torch.testing.assert_close(model(ids(2, 7), use_cache=False).logits, want, atol=1e-4, rtol=1e-4)
            assert torch.equal(torch.get_rng_state(), state)
    assert decoder(model).fallback is None


def step_autocast(model: Any, tokens: torch.Tensor, dtype: torch.dtype = torch.bfloat16, **call: Any) -> Any:
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        loss = model(input_ids=tokens, labels=tokens, **call).loss
    loss.backward()
    return loss.item(), {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def check_autocast(backend: str, checkpointed: bool, frozen: bool = False) -> None:
    model = small(1 if backend == "inductor" else 2)
    exact = steps(model, SIZES[:1], use_cache=False)
    if frozen:
        model.requires_grad_(False)
        model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    if checkpointed:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model.train()
    want = steps(model, SIZES, step_autocast, use_cache=False)
    apply(model, backend)
    got = steps(model, SIZES, step_autocast, use_cache=False)
    report = decoder(model)
    assert (report.graphs, report.eager_calls, report.fallback) == (1, 0, None)
    for one, other in zip(got, want, strict=True):
        assert abs(one[0] - other[0]) < 2e-2
        assert worst(one[1], other[1]) < 3e-2
    assert frozen or differs(exact[0], got[0])


def test_checkpointing_under_autocast() -> None:
    check_autocast("inductor", checkpointed=True)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("backend", ["inductor", "aot_eager", "eager"])
def test_training_under_autocast(backend: str, checkpointed: bool, frozen: bool) -> None:
    check_autocast(backend, checkpointed, frozen)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inference_under_autocast(dtype: torch.dtype) -> None:
    model = small(2).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        want = [model(ids(b, n)).logits for b, n in SIZES]
        apply(model)
        got = [model(ids(b, n)).logits for b, n in SIZES]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=0.3, rtol=0.1)
    report = decoder(model)
    assert (report.eager_calls, report.fallback) == (0, None)
