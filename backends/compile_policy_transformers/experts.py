"""Experts that a model goes through one by one, in a Python loop over those that were hit: traced as one operation.

Cause: which experts are hit is data, so that the loop cannot be captured (step3p7: modeling_step3p7.py,
``Step3p7Experts.forward``, ``for expert_idx in hit``). Transformers' own experts are decorated with
``use_experts_implementation`` and run by `grouped_mm_experts_forward`; experts with the same weights, gate and
arguments that are not decorated are traced with that function. Drop this once no model loops itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers.integrations.moe import grouped_mm_experts_forward

_ARGUMENTS = ["hidden_states", "top_k_index", "top_k_weights"]
#: What the decorator would have said of such experts.
_TRAITS = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "_is_expert_parallel": False,
}


def looping_experts(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules with the weights, gate and arguments of Transformers' experts that are not decorated as such."""
    return [module for module in decoder.modules() if _loops(module)]


def _loops(module: Any) -> bool:
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    if not all(isinstance(w, torch.nn.Parameter) and w.dim() == 3 for w in weights):
        return False
    if (
        not hasattr(module, "_apply_gate")
        or not hasattr(module, "num_experts")
        or any(hasattr(module, n) for n in _TRAITS)
    ):
        return False
    known = {name for name, _ in module.named_parameters(recurse=False)} == {"gate_up_proj", "down_proj"}
    return known and list(inspect.signature(module.forward).parameters) == _ARGUMENTS


@contextmanager
def grouped(experts: list[torch.nn.Module]) -> Iterator[None]:
    """Let these experts run as one operation."""
    for module in experts:
        vars(module).update(_TRAITS, forward=partial(grouped_mm_experts_forward, module))
    try:
        yield
    finally:
        for module in experts:
            for name in (*_TRAITS, "forward"):
                del vars(module)[name]
