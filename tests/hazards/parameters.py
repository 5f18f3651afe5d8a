"""Weights and buffers: new values, new tensors, new kinds."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from compile_policy_transformers.cache_argument import CACHE
from compile_policy_transformers.tiny import tiny_config, tiny_model

from .case import Case, Hazard, chunk, forward, gradients, plain, prompt, training


def _weight(case: Case) -> nn.Parameter:
    return case.layer.mlp.down_proj.weight  # type: ignore[no-any-return]


@torch.no_grad()
def _in_place(case: Case) -> None:
    for parameter in case.model.parameters():
        parameter.mul_(1.3)


@torch.no_grad()
def _by_data(case: Case) -> None:
    for parameter in case.model.parameters():
        parameter.data = parameter.data * 1.3


def _replaced(case: Case) -> None:
    linear = case.layer.mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.detach().flip(0))


def _other_weights(case: Case) -> None:
    case.model.load_state_dict(tiny_model(case.architecture, seed=7).state_dict())


def _assigned_weights(case: Case) -> None:
    case.model.load_state_dict(tiny_model(case.architecture, seed=7).state_dict(), assign=True)


def _optimizer_step(case: Case) -> None:
    gradients(case)
    torch.optim.SGD(case.model.parameters(), lr=1e-2).step()


def _transposed(case: Case) -> None:
    """Equal shape, other strides."""
    weight = _weight(case)
    weight.data = weight.data.flip(0).t().contiguous().t()


def _to(dtype: torch.dtype) -> Any:
    def change(case: Case) -> None:
        case.model.to(dtype)
        for layer in case.inputs[CACHE].layers:
            layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)

    return change


def _one_in_double(case: Case) -> None:
    """One weight of another dtype: an error in eager too."""
    case.layer.mlp.down_proj.double()


def _positions(case: Case) -> None:
    for name, buffer in case.decoder.rotary_emb.named_buffers():
        if "original" not in name:
            buffer.mul_(3)


def _positions_replaced(case: Case) -> None:
    rope = case.decoder.rotary_emb
    for name, buffer in list(rope.named_buffers()):
        if "original" not in name:
            setattr(rope, name, buffer * 3)


def _tied(case: Case) -> None:
    case.layer.mlp.up_proj.weight = case.layer.mlp.gate_proj.weight


class Flipping(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flip(0)


def _resized(case: Case) -> None:
    case.base.resize_token_embeddings(400)
    case.inputs["input_ids"] = case.inputs["input_ids"] + 150


class Int8Linear(nn.Module):
    """A quantized linear layer in the plainest form."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.scale: torch.Tensor
        self.rounded: torch.Tensor
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 7)
        self.register_buffer("rounded", (weight / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.rounded.to(x.dtype) * self.scale)


def _quantized(case: Case) -> None:
    case.layer.mlp.down_proj = Int8Linear(case.layer.mlp.down_proj)


def _frozen(case: Case) -> None:
    for parameter in case.layer.parameters():
        parameter.requires_grad_(False)


def _functional(case: Case) -> Any:
    """The model with other weights for one call only."""
    factor = case.kept.get("factor", 1.0)
    weights = {n: p.detach() * factor for n, p in case.model.named_parameters()}
    inputs = copy.deepcopy(case.inputs)
    with torch.no_grad():
        return torch.func.functional_call(case.model, weights, (), inputs).logits


def _again(case: Case, **changes: Any) -> None:
    """Another model of the class takes the place of the first, compiled in the same way."""
    config = copy.deepcopy(tiny_config(case.architecture))
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        other = type(case.base)(config).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter
    case.way.attach(other)
    case.model = other


def _second_with_layers(case: Case) -> None:
    depth = 2 * len(case.decoder.layers)
    kinds = getattr(case.text_config, "layer_types", None)
    _again(case, num_hidden_layers=depth, **({"layer_types": [*kinds, *kinds]} if kinds else {}))


def _second_with_one_layer(case: Case) -> None:
    kinds = getattr(case.text_config, "layer_types", None)
    _again(case, num_hidden_layers=1, **({"layer_types": kinds[-1:]} if kinds else {}))


HAZARDS = [
    Hazard("weights in place", "Every weight is scaled in place.", _in_place, chunk, forward),
    Hazard("weights by `.data`", "Every weight gets other data.", _by_data, chunk, forward),
    Hazard("weight replaced", "A weight is another `Parameter`.", _replaced, chunk, forward, ("weight",)),
    Hazard("`load_state_dict`", "Other weights are loaded.", _other_weights, chunk, forward),
    Hazard(
        "`load_state_dict(assign=True)`",
        "Loaded weights take the place of the old.",
        _assigned_weights,
        chunk,
        forward,
        ("weight",),
    ),
    Hazard("optimizer step", "Weights after a training step.", _optimizer_step, training, gradients),
    Hazard(
        "weight in another layout",
        "Other strides behind the same `Parameter`.",
        _transposed,
        chunk,
        forward,
        ("weight", "stride"),
    ),
    Hazard(
        "model to bfloat16", "`model.to(torch.bfloat16)`.", _to(torch.bfloat16), chunk, forward, ("bfloat16", "float32")
    ),
    Hazard("one weight in another dtype", "A mistake that eager refuses.", _one_in_double, chunk, forward),
    Hazard("buffer in place", "Rotary frequencies are scaled in place.", _positions, chunk, forward),
    Hazard(
        "buffer replaced", "Rotary frequencies are other tensors.", _positions_replaced, chunk, forward, ("inv_freq",)
    ),
    Hazard("weights tied", "Two layers share one weight from now on.", _tied, chunk, forward, ("weight",)),
    Hazard(
        "weight pruned",
        "`torch.nn.utils.prune`: a pre-hook and a mask.",
        lambda c: prune.l1_unstructured(c.layer.mlp.down_proj, "weight", amount=0.7),
        chunk,
        forward,
    ),
    Hazard(
        "weight parametrized",
        "`torch.nn.utils.parametrize`: another class.",
        lambda c: parametrize.register_parametrization(c.layer.mlp.down_proj, "weight", Flipping()),
        chunk,
        forward,
        ("class", "Parametrized"),
    ),
    Hazard(
        "linear quantized", "A linear layer becomes one with int8 weights.", _quantized, chunk, forward, ("Int8Linear",)
    ),
    Hazard(
        "embeddings resized", "`resize_token_embeddings`, and ids that were not there before.", _resized, chunk, forward
    ),
    Hazard(
        "weights frozen",
        "Half of the weights need no gradient any more.",
        _frozen,
        training,
        gradients,
        ("requires_grad", "True", "False"),
    ),
    Hazard(
        "weights for one call",
        "`torch.func.functional_call` with other weights.",
        lambda c: c.kept.update(factor=1.3),
        prompt,
        _functional,
    ),
    Hazard("second model, other weights", "Another model of the class.", _again, prompt, forward),
    Hazard(
        "second model, deeper",
        "Another model of the class with twice the layers.",
        _second_with_layers,
        prompt,
        forward,
    ),
    Hazard(
        "second model, one layer", "Another model of the class with one layer.", _second_with_one_layer, prompt, forward
    ),
    Hazard(
        "second model, another number",
        "Another model of the class with another epsilon.",
        lambda c: _again(c, rms_norm_eps=0.5),
        prompt,
        forward,
    ),
    Hazard("copy of the model", "A deep copy with other weights is called.", lambda c: _copied(c), prompt, plain),
]


def _copied(case: Case) -> None:
    case.model = copy.deepcopy(case.model)
    _in_place(case)
