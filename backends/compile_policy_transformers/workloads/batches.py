"""Models and batches of the workloads: tiny, random, the same for equal seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from compile_policy_transformers.tiny import tiny_inputs, tiny_model
from compile_policy_transformers.workloads.workload import Trial

Batch = dict[str, Any]
#: Rows and tokens of three batches, no two alike.
SHAPES = ((2, 9), (3, 14), (1, 6))
RATE = 0.05


def llama(seed: int = 0) -> PreTrainedModel:
    return tiny_model("llama", seed=seed)


def text(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random tokens, shape (rows, tokens)."""
    generator = torch.Generator().manual_seed(seed + 31 * tokens)
    return torch.randint(3, 250, (rows, tokens), generator=generator)


def batch(rows: int, tokens: int, seed: int = 0) -> Batch:
    """Tokens that are their own labels."""
    ids = text(rows, tokens, seed)
    return {"input_ids": ids, "labels": ids.clone()}


def batches() -> list[Batch]:
    return [batch(rows, tokens) for rows, tokens in SHAPES]


def padded(model: PreTrainedModel, tokens: int, rows: int, **more: Any) -> Batch:
    """A batch for ``model`` whose later rows are padded on the left; padding has no label."""
    inputs = tiny_inputs(model, text_len=tokens, batch=rows, **more)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def prompts(model: PreTrainedModel) -> list[Batch]:
    """Two batches to generate from, the first padded."""
    return [tiny_inputs(model, text_len=9, batch=2), tiny_inputs(model, text_len=5, batch=1)]


def without(inputs: Mapping[str, Any], name: str) -> Batch:
    return {key: value for key, value in inputs.items() if key != name}


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)


def train(
    trial: Trial,
    model: Any,
    data: Iterable[Batch],
    *,
    call: Callable[[Batch], torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    spoiled: bool = False,
) -> None:
    """Forward, backward and a step for each batch; keeps losses, gradients and the weights at the end.

    Args:
        trial: where results are kept.
        model: called with a batch as keywords, unless ``call`` computes the loss.
        data: the batches.
        call: loss of a batch.
        optimizer: SGD when left out.
        spoiled: the mistake of most workloads: the gradient of one weight is doubled.
    """
    model.train()
    optimizer = optimizer or sgd(model)
    for number, inputs in enumerate(data):
        torch.manual_seed(number)
        loss = model(**inputs).loss if call is None else call(inputs)
        loss.backward()
        if spoiled:
            double_gradient(model)
        trial.keep("losses", loss)
        trial.keep_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    trial.keep_weights(model)


def double_gradient(model: torch.nn.Module) -> None:
    """Double the gradient of the first weight that has one."""
    next(p.grad for p in model.parameters() if p.grad is not None).mul_(2)


@torch.no_grad()
def evaluate(trial: Trial, model: Any, data: Iterable[Batch]) -> None:
    """Losses and logits of batches without gradients, in evaluation mode."""
    model.eval()
    for inputs in data:
        found = model(**inputs)
        trial.keep("evaluation", found.loss, found.logits)


def generate(trial: Trial, model: Any, inputs: Mapping[str, Any], tokens: int = 6, **options: Any) -> Any:
    """Greedy tokens and the logits of each step; returns what `generate` returned."""
    torch.manual_seed(0)
    found = model.generate(**inputs, max_new_tokens=tokens, return_dict_in_generate=True, output_logits=True, **options)
    trial.keep("tokens", found.sequences)
    if found.logits is not None:
        trial.keep("logits", *found.logits)
    return found
