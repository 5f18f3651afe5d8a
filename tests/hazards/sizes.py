"""Sizes at which something could be taken for a constant."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from compile_policy_transformers.cache_argument import CACHE

from .case import Case, Hazard, behind, chunk, forward, prompt, prompt_inputs


def _sized(batch: int, new: int) -> Any:
    def change(case: Case) -> None:
        case.inputs = behind(case, DynamicCache(config=case.text_config), batch=batch, new=new, seed=3)

    return change


def _smallest_first(case: Case) -> None:
    _sized(1, 1)(case)


def _cut(rows: int, new: int) -> Any:
    """The call's first rows and tokens, which may be none."""

    def change(case: Case) -> None:
        case.inputs["input_ids"] = case.inputs["input_ids"][:rows, :new]
        case.inputs["position_ids"] = case.inputs["position_ids"][..., :rows, :new]
        seen = case.inputs["attention_mask"].shape[1] - 5
        case.inputs["attention_mask"] = case.inputs["attention_mask"][:rows, : seen + new]
        for layer in case.inputs[CACHE].layers:
            layer.keys, layer.values = layer.keys[:rows], layer.values[:rows]

    return change


def _text_of(length: int) -> Any:
    def change(case: Case) -> None:
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(10, 200, (2, length), generator=generator)
        case.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    return change


def _other_prompt(case: Case) -> None:
    case.inputs = {**prompt_inputs(case, seed=4, batch=3, text_len=14), "use_cache": False}


HAZARDS = [
    Hazard("one row", "A batch of one.", _sized(1, 5), chunk, forward),
    Hazard("four rows", "A larger batch, as many rows as heads.", _sized(4, 5), chunk, forward),
    Hazard("no rows", "An empty batch.", _cut(0, 5), chunk, forward),
    Hazard("one token", "A decode step.", _sized(2, 1), chunk, forward),
    Hazard("no tokens", "A call without tokens.", _cut(2, 0), chunk, forward),
    Hazard("sixteen tokens", "As many tokens as a head has dims, more than a window.", _sized(2, 16), chunk, forward),
    Hazard(
        "more after the smallest",
        "Four tokens of three rows after one token of one row.",
        _sized(3, 4),
        _smallest_first,
        forward,
    ),
    Hazard("another prompt", "A longer prompt, a larger batch, no cache.", _other_prompt, prompt, forward),
    Hazard("prompt of one token", "Without a cache.", _text_of(1), prompt, forward),
    Hazard("prompt beyond a window", "One more than that.", _text_of(9), prompt, forward),
]
