"""What the architectures are asked for when the policy is measured: requests, and the inputs that they become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from compile_policy_transformers.components import answering
from compile_policy_transformers.tiny import tiny_inputs
from compile_policy_transformers.tiny.sounds import SOUNDS
from compile_policy_transformers.tiny.videos import VIDEOS


@dataclass(frozen=True)
class Request:
    """One batch of prompts.

    Attributes:
        text: text tokens of the first row.
        pictures: height and width of each row's pictures.
        sounds: frames of each row's pieces of sound.
        batch: rows.
        videos: frames, height and width of each row's videos.
    """

    text: int
    pictures: tuple[tuple[int, int], ...] = ()
    sounds: tuple[int, ...] = ()
    batch: int = 1
    videos: tuple[tuple[int, int, int], ...] = ()


REQUESTS = (
    Request(9, ((56, 56),), (40,)),
    Request(14, ((56, 84), (84, 56)), (72, 37), batch=2),
    Request(23, ((84, 84),), (130,), batch=3),
    Request(11),
    Request(8, ((56, 112), (56, 56), (112, 56)), (24, 205, 61)),
    Request(17, batch=2),
    Request(12, videos=((4, 56, 84),)),
    Request(10, ((84, 56),), (50,), batch=2, videos=((2, 56, 56), (6, 84, 56))),
)


def prompts_of(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The requests that the model takes eager; text alone, or several pictures, are not for every model."""
    prompts = []
    blind = _refuses(model, images=REQUESTS[0].pictures)
    # with a picture: a model that cannot do without one says that first
    picture = () if blind else REQUESTS[0].pictures
    deaf = _refuses(model, images=picture, sounds=REQUESTS[0].sounds)
    still = _refuses(model, images=picture, videos=REQUESTS[-1].videos)
    for seed, request in enumerate(REQUESTS):
        if still and request.videos:
            continue
        given: dict[str, Any] = {"text_len": request.text, "batch": request.batch, "seed": seed}
        given |= {"images": () if blind else request.pictures, "sounds": () if deaf else request.sounds}
        given |= {"videos": request.videos}
        try:
            inputs = tiny_inputs(model, **given)
            answering(model)(**inputs)
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
    for name in ("pixel_values", "image_pixel_values", "flattened_patches", VIDEOS, *SOUNDS):
        seen = prompt.get(name)
        if isinstance(seen, torch.Tensor):
            yield {**prompt, name: torch.zeros_like(seen)}
