"""Workloads that train: batches of other sizes, accumulation, checkpointing, dropout, rollouts in between."""

from __future__ import annotations

import torch
from torch import nn
from transformers import DataCollatorWithFlattening, PreTrainedModel

from compile_policy_transformers.workloads.batches import (
    SHAPES,
    Batch,
    batch,
    batches,
    evaluate,
    generate,
    llama,
    padded,
    prompts,
    sgd,
    text,
    train,
    without,
)
from compile_policy_transformers.workloads.workload import Trial, Workload

DROPOUT = 0.3


def plain(trial: Trial) -> None:
    model = llama()
    data = batches()
    train(trial, trial.compiled(model), data, spoiled=trial.mistaken)


def masked(trial: Trial) -> None:
    model = llama()
    data = [padded(model, tokens, rows) for rows, tokens in SHAPES]
    train(trial, trial.compiled(model), [without(one, "attention_mask") if trial.mistaken else one for one in data])


def cached(trial: Trial) -> None:
    """``use_cache`` stays on, as it does by default."""
    model = llama()
    assert model.config.use_cache
    data = [batch(2, 9), batch(2, 13)]
    train(trial, trial.compiled(model), data, spoiled=trial.mistaken)


def packed(trial: Trial) -> None:
    """Sequences one behind the other in one row; the longest one's length is a Python number in each batch."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    data: list[Batch] = []
    for lengths in ((5, 8, 3), (9, 4), (7, 7, 2)):
        rows = [{"input_ids": text(1, n, seed)[0].tolist()} for seed, n in enumerate(lengths)]
        one = dict(collate(rows))
        if trial.mistaken:  # every sequence sees those before it
            one["position_ids"] = torch.arange(one["input_ids"].shape[1])[None]
        data.append(one)
    train(trial, trial.compiled(llama()), data)


def accumulated(trial: Trial) -> None:
    """Two batches a step; the loss is a mean over the labels of both, as `Trainer` has it."""
    model = trial.compiled(llama()).train()
    optimizer = sgd(model)
    for seed in range(2):
        parts = [batch(rows, tokens, seed) for rows, tokens in SHAPES[:2]]
        labels = sum(part["labels"][:, 1:].numel() for part in parts)
        for number, part in enumerate(parts):
            loss = model(**part, num_items_in_batch=labels + seed).loss
            loss.backward()
            trial.keep("losses", loss)
            if trial.mistaken and number == 0:
                optimizer.zero_grad()
        trial.keep_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    trial.keep_weights(model)


def evaluated(trial: Trial) -> None:
    """Training and evaluation in turns."""
    model = trial.compiled(llama())
    for seed in range(2):
        train(trial, model, [batch(2, 9 + seed, seed), batch(3, 14, seed)])
        if trial.mistaken:
            model.lm_head.weight.data.mul_(1.1)
        evaluate(trial, model, [batch(2, 11, 7), batch(1, 6, 8)])


def checkpointed(trial: Trial, reentrant: bool = False, dropout: bool = False) -> None:
    model = llama()
    if dropout:
        set_dropout(model, 0.0 if trial.mistaken else DROPOUT)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    data = [{**one, "use_cache": False} for one in batches()]
    train(trial, trial.compiled(model), data, spoiled=trial.mistaken)


def reentrant(trial: Trial) -> None:
    checkpointed(trial, reentrant=True)


def dropped(trial: Trial) -> None:
    """Dropout in attention and in front of a layer; the seed is set before each step."""
    model = llama()
    set_dropout(model, 0.0 if trial.mistaken else DROPOUT)
    train(trial, trial.compiled(model), batches())


def checkpointed_dropout(trial: Trial) -> None:
    checkpointed(trial, dropout=True)


def set_dropout(model: PreTrainedModel, rate: float) -> None:
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = rate
        layer.mlp.down_proj = nn.Sequential(nn.Dropout(rate), layer.mlp.down_proj)


def frozen(trial: Trial) -> None:
    """One layer is trained, then all of them."""
    model = trial.compiled(llama())
    layers = model.get_decoder().layers
    layers[1 if trial.mistaken else 0].requires_grad_(False)
    train(trial, model, [batch(2, 9), batch(3, 14)])
    layers.requires_grad_(True)
    train(trial, model, [batch(2, 9, 5), batch(1, 6, 5)])


def clipped(trial: Trial) -> None:
    """AdamW, a schedule and clipped gradients; epsilon is large, as Adam divides by noise where gradients are none."""
    model = trial.compiled(llama()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for one in batches():
        loss = model(**one).loss
        loss.backward()
        trial.keep("losses", loss)
        trial.keep("norms", nn.utils.clip_grad_norm_(model.parameters(), 1e9 if trial.mistaken else 0.5))
        trial.keep_gradients(model)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    trial.keep_weights(model)


def rollouts(trial: Trial) -> None:
    """Generate, train, generate: the second answer comes from the new weights."""
    model = trial.compiled(llama())
    (inputs, other) = prompts(model)
    for number in range(3):
        model.eval()
        with torch.no_grad():
            answers = generate(trial, model, inputs if number % 2 == 0 else other).sequences
        if not (trial.mistaken and number == 1):
            train(trial, model, [{"input_ids": answers, "labels": answers}], optimizer=_large_steps(model))


def _large_steps(model: PreTrainedModel) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5)


def second_derivatives(trial: Trial) -> None:
    """The gradient of a gradient's norm, with attention written out; refused with a message where it is not."""
    model = llama()
    model.set_attn_implementation("eager")
    trial.compiled(model)
    one = batch(2, 9)
    weight = model.get_decoder().layers[0].self_attn.q_proj.weight
    loss = model(**one).loss
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    trial.keep("losses", loss)
    trial.keep("gradients", gradient * (2 if trial.mistaken else 1))
    (second,) = torch.autograd.grad(gradient.pow(2).sum(), weight)
    trial.keep("second", second)


WORKLOADS = (
    Workload("training", "Forward, backward, SGD step; batches of three sizes.", "a gradient is doubled", plain),
    Workload("training, padded", "Batches with padding masks.", "the masks are ignored", masked),
    Workload("training, use_cache on", "The default of a model's configuration.", "a gradient is doubled", cached),
    Workload("training, padding-free", "DataCollatorWithFlattening: packed rows.", "positions run through", packed),
    Workload("training, accumulation", "Two batches a step, one mean.", "the first one is left out", accumulated),
    Workload("training, evaluation between", "train() and eval() in turns.", "another head is asked", evaluated),
    Workload("training, checkpointing", "use_reentrant=False.", "a gradient is doubled", checkpointed),
    Workload("training, reentrant checkpointing", "use_reentrant=True.", "a gradient is doubled", reentrant),
    Workload("training, dropout", "Attention and a layer, seeded: the same masks.", "no dropout", dropped),
    Workload("training, dropout, checkpointing", "The same masks again.", "no dropout", checkpointed_dropout),
    Workload("training, layers frozen", "One of two layers frozen, then none.", "the other one", frozen),
    Workload("training, AdamW, clipping", "A schedule, clipped gradients.", "nothing is clipped", clipped),
    Workload("rollouts", "Generate, train, generate, three times.", "a training step is left out", rollouts),
    Workload("second derivatives", "The gradient of a gradient.", "the first one is doubled", second_derivatives),
)
