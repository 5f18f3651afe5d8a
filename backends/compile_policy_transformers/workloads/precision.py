"""Workloads in low precision: autocast, models in bfloat16, weights of eight bits."""

from __future__ import annotations

from typing import Any

import torch

from compile_policy_transformers.cache_argument import CACHE
from compile_policy_transformers.workloads.batches import (
    SHAPES,
    batch,
    batches,
    generate,
    llama,
    padded,
    prompts,
    train,
)
from compile_policy_transformers.workloads.workload import FEW_BITS, LOW_PRECISION, Trial, Workload


def autocast_to(trial: Trial, dtype: torch.dtype) -> None:
    model = trial.compiled(llama())

    def loss_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", dtype):
            found: torch.Tensor = model(**inputs).loss
        return found

    data = batches()
    train(trial, model, data, call=loss_of, spoiled=trial.mistaken)


def bf16_autocast(trial: Trial) -> None:
    autocast_to(trial, torch.bfloat16)


def fp16_autocast(trial: Trial) -> None:
    autocast_to(trial, torch.float16)


def autocast_checkpointed(trial: Trial) -> None:
    """As `Trainer` does with ``bf16`` and ``gradient_checkpointing``."""
    model = llama()
    model.gradient_checkpointing_enable()
    trial.compiled(model)

    def loss_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found: torch.Tensor = model(**inputs, use_cache=False).loss
        return found

    train(trial, model, [batch(2, 9), batch(3, 14)], call=loss_of, spoiled=trial.mistaken)


def bf16_llama() -> Any:
    model: Any = llama()
    return model.to(torch.bfloat16)


def bf16_training(trial: Trial) -> None:
    model = bf16_llama()
    data = [padded(model, tokens, rows) for rows, tokens in SHAPES]
    train(trial, trial.compiled(model), data, spoiled=trial.mistaken)


@torch.no_grad()
def bf16_inference(trial: Trial) -> None:
    """Logits of forward and of one decode step; tokens may tie in bfloat16."""
    model = trial.compiled(bf16_llama())
    for inputs in prompts(model):
        ids = inputs["input_ids"]
        first = model(**inputs, use_cache=True)
        trial.keep("logits", first.logits[:, -1])
        mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"][:, :1] * 0 + 1], dim=1)
        if trial.mistaken:
            mask[:, :-1] = 0
        later = model(input_ids=ids[:, :1], attention_mask=mask, **{CACHE: first[CACHE]})
        trial.keep("logits", later.logits)


@torch.no_grad()
def autocast_inference(trial: Trial) -> None:
    model = trial.compiled(llama())
    for inputs in prompts(model):
        with torch.autocast("cpu", torch.bfloat16):
            mask = None if trial.mistaken else inputs["attention_mask"]
            trial.keep("logits", model(input_ids=inputs["input_ids"], attention_mask=mask).logits[:, -1])


def int8_weights(trial: Trial) -> None:
    """torchao's weights of eight bits."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = llama()
    if not trial.mistaken:
        quantize_(model.get_decoder(), Int8WeightOnlyConfig())
    trial.compiled(model)
    for inputs in prompts(model):
        generate(trial, model, inputs)


WORKLOADS = (
    Workload("training, bf16 autocast", "Products in bfloat16.", "a gradient is doubled", bf16_autocast, LOW_PRECISION),
    Workload("training, fp16 autocast", "Products in float16.", "a gradient is doubled", fp16_autocast, LOW_PRECISION),
    Workload(
        "training, bf16 autocast, checkpointing",
        "What Trainer does with both options.",
        "a gradient is doubled",
        autocast_checkpointed,
        LOW_PRECISION,
    ),
    Workload("training, bf16 weights", "A model in bfloat16.", "a gradient is doubled", bf16_training, LOW_PRECISION),
    Workload("inference, bf16 weights", "A model in bfloat16.", "the cache is masked", bf16_inference, LOW_PRECISION),
    Workload(
        "inference, bf16 autocast", "Products in bfloat16.", "the mask is ignored", autocast_inference, LOW_PRECISION
    ),
    Workload("int8 weights", "torchao, Int8WeightOnlyConfig.", "float32 weights", int8_weights, FEW_BITS, ("torchao",)),
)
