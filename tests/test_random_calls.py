"""Random calls of whole families: one graph per kind of cache, no call wrong, whatever the sizes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from compile_policy import CompilationConfig, apply, eager
from compile_policy.applied import regions
from compile_policy_transformers import tiny_inputs, tiny_model

FAMILIES = ("llama", "qwen2_5_vl", "gemma3", "exaone4_5", "qwen3_vl", "cohere2")
TEXT = ("llama", "cohere2")
SIDES = (28, 56, 84, 112)


def calls(model: PreTrainedModel, model_type: str, count: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Inputs and generation options; sizes 1 and 2 and the sliding window's edge are all likely."""
    draw = random.Random(7)
    for seed in range(count):
        batch, length = draw.choice((1, 1, 2, 3, 5)), draw.choice((2, 3, 7, 8, 15, 16, 17, 33))
        images = (
            [] if model_type in TEXT else [(draw.choice(SIDES), draw.choice(SIDES)) for _ in range(draw.randint(0, 3))]
        )
        inputs = tiny_inputs(model, text_len=length, images=images, batch=batch, seed=seed)
        options: dict[str, Any] = {"max_new_tokens": draw.randint(1, 4), "do_sample": False}
        if draw.random() < 0.5:
            options["cache_implementation"] = "static"
        yield inputs, options


def compare(model_type: str, count: int) -> None:
    model = tiny_model(model_type)
    apply(model, CompilationConfig(backend="eager"))
    kinds = set()
    for inputs, options in calls(model, model_type, count):
        with eager(model):
            want = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options), want)
        kinds.add(options.get("cache_implementation"))
    (region,) = regions(model)
    assert (region.graphs, region.eager_calls, region.fallback) == (len(kinds), 0, None)


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl"])
def test_random_calls(model_type: str) -> None:
    """A sample of what `test_200_random_calls` holds for every family."""
    compare(model_type, 16)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_200_random_calls(model_type: str) -> None:
    """200 calls: batch, length, pictures, their sizes, new tokens and the cache all vary."""
    compare(model_type, 200)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gemma3"])
def test_the_comparison_bites(model_type: str) -> None:
    """The control: with the padding mask ignored, most padded calls give other tokens."""
    model = tiny_model(model_type)
    changed = padded = 0
    for inputs, options in calls(model, model_type, 16):
        if inputs["attention_mask"].all():
            continue
        padded += 1
        unmasked = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
        changed += not torch.equal(model.generate(**unmasked, **options), model.generate(**inputs, **options))
    assert changed > padded / 2 > 1
