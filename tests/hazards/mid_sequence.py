"""Changes of the model between two tokens of one sequence: ours with ``check_structure="call"``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from compile_policy_transformers.cache_argument import CACHE

from . import adapters, attributes, hooks, parameters, patches
from .case import Case, Hazard, chunk, held
from .ways import OURS, ours_at_every_call


def _next_token(case: Case) -> Any:
    """The first call runs a chunk and a token, every later one a token more of the same sequence."""
    if "cache" not in case.kept:
        if case.way is OURS:
            ours_at_every_call(case.base)
        case.kept["cache"] = copy.deepcopy(case.inputs[CACHE])
        with torch.no_grad():
            case.model(**{**case.inputs, CACHE: case.kept["cache"]})
        case.kept["mask"] = case.inputs["attention_mask"]
        _token(case)
    return _token(case)


def _token(case: Case) -> Any:
    cache = case.kept["cache"]
    mask = case.kept["mask"] = torch.cat([case.kept["mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    place = case.inputs["position_ids"].max() + mask.shape[1]
    shape = (3, 2, 1) if case.architecture == "qwen2_5_vl" else (2, 1)
    with torch.set_grad_enabled(case.kept.get("grad", False)):
        logits = case.model(
            input_ids=torch.tensor([[40], [41]]),
            attention_mask=mask,
            position_ids=place.expand(shape),
            past_key_values=cache,
            use_cache=True,
        ).logits
    return [logits, torch.tensor(logits.requires_grad), *held(cache)]


def _same_change(name: str, of: str, module: Any) -> Hazard:
    """The change of another hazard, between two tokens."""
    found = next(h for h in module.HAZARDS if h.name == of)
    prepare: Callable[[Case], Any] = found.prepare
    return Hazard(
        name,
        f"Between two tokens: {found.says[0].lower()}{found.says[1:]}",
        found.change,
        prepare,
        _next_token,
        found.differs,
        found.harmless,
        found.only,
    )


HAZARDS = [
    _same_change("hook between tokens", "hook on a layer", hooks),
    _same_change("number between tokens", "scaling of attention", attributes),
    _same_change("activation between tokens", "activation swapped", attributes),
    _same_change("forward between tokens", "forward of an instance", attributes),
    _same_change("class between tokens", "forward of a class", patches),
    _same_change("weight between tokens", "weight replaced", parameters),
    _same_change("weights in place between tokens", "weights in place", parameters),
    _same_change("layers truncated between tokens", "layers truncated", attributes),
    _same_change("adapter switched between tokens", "adapter switched", adapters),
    _same_change("scaling of an adapter between tokens", "scaling of an adapter", adapters),
    Hazard(
        "gradients between tokens",
        "Between two tokens: gradient mode is switched on.",
        lambda c: c.kept.update(grad=True),
        chunk,
        _next_token,
        ("grad mode", "True", "False"),
    ),
]
