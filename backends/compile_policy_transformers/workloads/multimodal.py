"""Workloads with pictures: fine-tuning of all of a model, of its tower, and gradients of the pixels."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from compile_policy_transformers.tiny import tiny_inputs, tiny_model
from compile_policy_transformers.workloads.batches import Batch, evaluate, generate, padded, train
from compile_policy_transformers.workloads.workload import Trial, Workload


def pictured(model: PreTrainedModel) -> list[Batch]:
    """Batches of other sizes, with one picture a row and with none."""
    return [
        padded(model, 9, 2, images=[(56, 56)]),
        padded(model, 6, 1, images=[(56, 84)]),
        padded(model, 11, 2),
    ]


def whole(trial: Trial) -> None:
    """Every weight of a vision-language model is trained; the tower runs eager, as by default."""
    model = tiny_model("qwen2_5_vl")
    train(trial, trial.compiled(model), pictured(model), spoiled=trial.mistaken)


def tower(trial: Trial) -> None:
    """The tower alone is trained, compiled too."""
    model = tiny_model("qwen2_5_vl")
    data = pictured(model)[:2]
    model.requires_grad_(False)
    model.model.visual.requires_grad_(True)
    trial.compiled(model, compile_mm_encoder=True)
    train(trial, model, data, spoiled=trial.mistaken)


def fixed_tower(trial: Trial) -> None:
    """The same with a tower of one picture size."""
    model = tiny_model("llava")
    data = [padded(model, 9, 2, images=[(64, 64)]), padded(model, 6, 1, images=[(64, 64)])]
    model.requires_grad_(False)
    model.model.vision_tower.requires_grad_(True)
    trial.compiled(model, compile_mm_encoder=True)
    train(trial, model, data, spoiled=trial.mistaken)


def pixels(trial: Trial) -> None:
    """Gradients of the pixels, as saliency maps and adversarial pictures need them; the weights have none."""
    model = tiny_model("qwen2_5_vl").requires_grad_(False)
    trial.compiled(model, compile_mm_encoder=True)
    for size in ((56, 56), (56, 84)):
        inputs = tiny_inputs(model, text_len=7, images=[size])
        picture = inputs["pixel_values"].clone().requires_grad_(True)
        logits = model(**{**inputs, "pixel_values": picture}).logits[:, 0 if trial.mistaken else -1]
        (gradient,) = torch.autograd.grad(logits.logsumexp(-1).sum(), picture, allow_unused=True)
        trial.keep("gradients", torch.zeros_like(picture) if gradient is None else gradient)


@torch.no_grad()
def answers(trial: Trial) -> None:
    """Questions about pictures, by `generate`, with the tower compiled."""
    model = tiny_model("qwen2_5_vl")
    trial.compiled(model, compile_mm_encoder=True)
    for number, size in enumerate(((56, 56), (56, 84))):
        inputs = tiny_inputs(model, text_len=7 + number, images=[size], batch=2)
        if trial.mistaken:
            inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
        generate(trial, model, inputs)


def alternating(trial: Trial) -> None:
    """Training steps and evaluation with pictures and without."""
    model = trial.compiled(tiny_model("gemma3"))
    data = [padded(model, 9, 2, images=[(56, 56)]), padded(model, 12, 1)]
    for one in data:
        train(trial, model, [one])
    if trial.mistaken:
        model.lm_head.weight.data.mul_(1.1)
    evaluate(trial, model, data)


WORKLOADS = (
    Workload("VLM training", "All weights of a Qwen2.5-VL; with pictures and without.", "a gradient is doubled", whole),
    Workload("VLM training, evaluation between", "A Gemma 3.", "another head is asked", alternating),
    Workload("tower training", "compile_mm_encoder; packed pictures of Qwen2.5-VL.", "a gradient is doubled", tower),
    Workload("tower training, one size", "compile_mm_encoder; CLIP in LLaVA.", "a gradient is doubled", fixed_tower),
    Workload("gradients of pixels", "compile_mm_encoder; nothing is trained.", "of another token", pixels),
    Workload("VLM inference", "compile_mm_encoder; generate with pictures.", "pictures are blank", answers),
)
