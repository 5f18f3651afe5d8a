"""LoRA adapters of PEFT: added, switched, merged, scaled."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from .case import Case, Hazard, chunk, counting, forward, gradients, training

TARGETS = ["q_proj", "v_proj", "down_proj"]


def _config(rank: int = 4) -> LoraConfig:
    return LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False)


@torch.no_grad()
def _louder(model: Any, name: str, factor: float) -> None:
    """Adapters large enough to be seen in the result."""
    for key, parameter in model.named_parameters():
        if "lora_" in key and f".{name}." in key:
            parameter.mul_(factor)


def _added(case: Case) -> None:
    case.model = get_peft_model(case.model, _config()).eval()
    _louder(case.model, "default", 3)


def with_adapter(case: Case) -> None:
    """One active adapter."""
    chunk(case)
    torch.manual_seed(0)
    _added(case)


def with_two(case: Case) -> None:
    """Two adapters, the first one active."""
    with_adapter(case)
    case.model.add_adapter("other", _config())
    _louder(case.model, "other", 4)
    case.model.eval()


def merged(case: Case) -> None:
    with_adapter(case)
    case.model.merge_adapter()


def trained(case: Case) -> None:
    training(case)
    torch.manual_seed(0)
    _added(case)
    case.model.train()


def _lora(case: Case) -> list[Any]:
    return [m for m in case.decoder.modules() if hasattr(m, "lora_A")]


def _scaled(case: Case) -> None:
    for module in _lora(case):
        module.scaling["default"] = 0.1


@torch.no_grad()
def _swapped_weights(case: Case) -> None:
    """Another adapter's weights of the same rank in the same tensors."""
    for module in _lora(case):
        module.lora_B["default"].weight.mul_(-2)


def _rank(case: Case) -> None:
    torch.manual_seed(1)
    case.model.delete_adapter("default")
    case.model.add_adapter("default", _config(8))
    _louder(case.model, "default", 3)
    case.model.set_adapter("default")
    case.model.eval()


def _switched_within_a_call(case: Case) -> Any:
    if not case.kept.get("disabled"):
        return forward(case)
    with case.model.disable_adapter():
        return forward(case)


def _mixed(case: Case) -> Any:
    """Rows of one batch with different adapters."""
    names = case.kept.get("names")
    if names is None:
        return forward(case)
    inputs = copy.deepcopy(case.inputs)
    with torch.no_grad():
        return counting(inputs, case.model(**inputs, adapter_names=names))


HAZARDS = [
    Hazard("adapter added", "`get_peft_model` on a compiled model.", _added, chunk, forward),
    Hazard(
        "adapter disabled",
        "Inside `disable_adapter()`.",
        lambda c: c.kept.update(disabled=True),
        with_adapter,
        _switched_within_a_call,
        ("disable_adapters", "True", "False"),
    ),
    Hazard(
        "adapter switched",
        "`set_adapter` to another one.",
        lambda c: c.model.set_adapter("other"),
        with_two,
        forward,
        ("active_adapter", "default", "other"),
    ),
    Hazard(
        "adapters mixed in a batch",
        "`adapter_names` in a call.",
        lambda c: c.kept.update(names=["other", "default"]),
        with_two,
        _mixed,
    ),
    Hazard(
        "adapter merged",
        "`merge_adapter`.",
        lambda c: c.model.merge_adapter(),
        with_adapter,
        forward,
        harmless="merging changes no result",
    ),
    Hazard(
        "merged adapter disabled",
        "`disable_adapter()` of merged weights.",
        lambda c: c.kept.update(disabled=True),
        merged,
        _switched_within_a_call,
    ),
    Hazard(
        "scaling of an adapter",
        "A number in a dict of the adapter's layers.",
        _scaled,
        with_adapter,
        forward,
        ("scaling", "0.1"),
    ),
    Hazard(
        "adapter's weights in place",
        "Another adapter of the same rank, hot-swapped.",
        _swapped_weights,
        with_adapter,
        forward,
    ),
    Hazard("rank of an adapter", "An adapter of another rank.", _rank, with_adapter, forward),
    Hazard(
        "adapter deleted",
        "`delete_adapter` of the active one.",
        lambda c: c.model.delete_adapter("default"),
        with_two,
        forward,
    ),
    Hazard(
        "adapter unloaded",
        "The plain model again.",
        lambda c: setattr(c, "model", c.model.unload()),
        with_adapter,
        forward,
    ),
    Hazard(
        "adapter in training",
        "Gradients of adapters after a switch.",
        lambda c: _scaled(c),
        trained,
        gradients,
        ("scaling", "0.1"),
    ),
]
