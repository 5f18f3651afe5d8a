"""Training steps of tiny models of one layer, and gradients compared with eager's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import compile_policy
from compile_policy import CompilationConfig
from compile_policy.plan import ComponentReport
from compile_policy_transformers import tiny_model
from compile_policy_transformers.tiny.model import tiny_config

Gradients = dict[str, torch.Tensor | None]


def small(layers: int = 1, architecture: str = "llama", **changes: Any) -> Any:
    """A model in training mode with few layers."""
    config = tiny_config(architecture)
    config.num_hidden_layers = layers
    for name, value in changes.items():
        setattr(config, name, value)
    stock = tiny_model(architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    weights = {n: w for n, w in stock.state_dict().items() if n in model.state_dict()}
    model.load_state_dict(weights, strict=False)
    return model.train()


def ids(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * batch + length)
    return torch.randint(5, 60, (batch, length), generator=generator)


def loss_of(output: Any) -> torch.Tensor:
    """A loss that a single token has too."""
    weights = torch.linspace(-1, 1, output.logits.shape[-1])
    return (output.logits.tanh() * weights).sum()


def step(model: nn.Module, tokens: torch.Tensor, **call: Any) -> tuple[float, Gradients]:
    """The loss and the gradients of all parameters after one forward and one backward."""
    model.zero_grad()
    loss = loss_of(model(input_ids=tokens, **call))
    loss.backward()
    return loss.item(), {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def steps(
    model: nn.Module, sizes: Sequence[tuple[int, int]], run: Callable[..., Any] = step, **call: Any
) -> list[tuple[float, Gradients]]:
    found = []
    for batch, length in sizes:
        torch.manual_seed(7)
        found.append(run(model, ids(batch, length), **call))
    return found


def apply(model: nn.Module, backend: str = "inductor", **values: Any) -> None:
    compile_policy.apply(model, CompilationConfig(backend=backend, cache_dir=False, **values))


def decoder(model: nn.Module) -> ComponentReport:
    return next(c for c in compile_policy.report(model).components if c.role == "decoder")


def worst(got: Gradients, want: Gradients) -> float:
    """Largest difference of any gradient, relative to the largest gradient of all; infinite where one is missing."""
    top = max(float(g.abs().max()) for g in want.values() if g is not None)
    found = 0.0
    for name, expected in want.items():
        gradient = got[name]
        if (gradient is None) != (expected is None):
            return float("inf")
        if gradient is not None and expected is not None:
            found = max(found, float((gradient - expected).abs().max()) / top)
    return found


def assert_equal(
    got: Sequence[tuple[float, Gradients]], want: Sequence[tuple[float, Gradients]], tolerance: float = 1e-5
) -> None:
    for (loss, gradients), (expected, eager) in zip(got, want, strict=True):
        assert abs(loss - expected) <= 1e-3  # a sum of terms of either sign
        assert worst(gradients, eager) <= tolerance


def differs(one: tuple[float, Gradients], other: tuple[float, Gradients]) -> bool:
    return worst(one[1], other[1]) > 1e-2
