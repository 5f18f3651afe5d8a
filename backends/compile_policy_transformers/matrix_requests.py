"""What the architectures are asked for when the policy is measured: requests, and the inputs that they become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from compile_policy_transformers.tiny import tiny_inputs
from compile_policy_transformers.tiny.sounds import SOUNDS


@dataclass(frozen=True)
class Request:
    """One batch of prompts: height and width of each row's pictures, frames of each row's pieces of sound."""

    text: int
    pictures: tuple[tuple[int, int], ...] = ()
    sounds: tuple[int, ...] = ()
    batch: int = 1


REQUESTS = (
    Request(9, ((56, 56),), (40,)),
    Request(14, ((56, 84), (84, 56)), (72, 37), batch=2),
    Request(23, ((84, 84),), (130,), batch=3),
    Request(11),
    Request(8, ((56, 112), (56, 56), (112, 56)), (24, 205, 61)),
    Request(17, batch=2),
)


def prompts_of(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The requests that the model takes eager; text alone, or several pictures, are not for every model."""
    prompts = []
    blind = _refuses(model, images=REQUESTS[0].pictures)
    # with a picture: a model that cannot do without one says that first
    deaf = _refuses(model, images=() if blind else REQUESTS[0].pictures, sounds=REQUESTS[0].sounds)
    for seed, request in enumerate(REQUESTS):
        given: dict[str, Any] = {"text_len": request.text, "batch": request.batch, "seed": seed}
        given |= {"images": () if blind else request.pictures, "sounds": () if deaf else request.sounds}
        try:
            inputs = tiny_inputs(model, **given)
            model(**inputs)
        except Exception:
            continue
        prompts.append(inputs)
    return prompts


def _refuses(model: PreTrainedModel, **what: Any) -> bool:
    """Whether the model says that it takes no such input."""
    try:
        tiny_inputs(model, text_len=REQUESTS[0].text, **what)
    except ValueError as why:
        return "takes no" in str(why)
    except Exception:  # what it takes fails only beside other inputs
        return False
    return False


def altered(prompt: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """``prompt`` with its padding no longer masked, and with blank pictures or silence."""
    mask = prompt.get("attention_mask")
    if isinstance(mask, torch.Tensor) and not mask.all():
        yield {**prompt, "attention_mask": torch.ones_like(mask)}
    for name in ("pixel_values", "flattened_patches", *SOUNDS):
        seen = prompt.get(name)
        if isinstance(seen, torch.Tensor):
            yield {**prompt, name: torch.zeros_like(seen)}
