"""Python attributes and configuration values that a forward reads."""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from torch import nn

from .case import Case, Hazard, bent, chunk, forward, gradients, prompt, training


class Swish(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(3 * x)


def _norm(case: Case) -> Any:
    return case.layer.input_layernorm


def _epsilon(case: Case) -> None:
    norm = _norm(case)
    setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", 0.5)


def _rope_scaling(case: Case) -> None:
    rope = case.decoder.rotary_emb
    for name in [n for n in vars(rope) if n.endswith("attention_scaling")]:
        setattr(rope, name, 2.0)


def _swap(case: Case) -> None:
    case.layer.mlp.act_fn = Swish()


def _own_forward(case: Case) -> None:
    mlp = case.layer.mlp
    mlp.forward = lambda x: bent(type(mlp).forward(mlp, x))


def _own_method(case: Case) -> None:
    """A method bound to the instance, as monkey patches of attention do."""
    attention = case.layer.self_attn
    original = type(attention).forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        result, *rest = original(self, *args, **kwargs)
        return (result + 1, *rest)

    attention.forward = types.MethodType(scaled, attention)


def _bias(case: Case) -> None:
    linear = case.layer.mlp.down_proj
    linear.bias = nn.Parameter(torch.ones(linear.out_features))


def _shorter(case: Case) -> None:
    del case.decoder.layers[-1]


def _fewer_by_config(case: Case) -> None:
    """Models loop over as many layers as the configuration says."""
    case.decoder.config.num_hidden_layers = 1


def _swapped_layers(case: Case) -> None:
    first, last = case.decoder.layers[0].mlp, case.decoder.layers[-1].mlp
    case.decoder.layers[0].mlp, case.decoder.layers[-1].mlp = last, first


def _identity(case: Case) -> None:
    case.layer.mlp = nn.Identity()


def _sequential(case: Case) -> None:
    case.layer.mlp = nn.Sequential(case.layer.mlp, nn.Tanh())


def _soft_cap(case: Case) -> None:
    """Gemma's attention reads it on every call."""
    case.layer.self_attn.attn_logit_softcapping = 1.0


def _window(case: Case) -> None:
    case.text_config.sliding_window = 4
    for layer in case.decoder.layers:
        if layer.self_attn.sliding_window:
            layer.self_attn.sliding_window = 4


def _kinds(case: Case) -> None:
    """Every layer sees everything."""
    case.text_config.layer_types = ["full_attention"] * len(case.decoder.layers)


def _not_causal(case: Case) -> None:
    for layer in case.decoder.layers:
        layer.self_attn.is_causal = False


def _long_text(case: Case) -> None:
    prompt(case)
    case.inputs = {"input_ids": torch.arange(20, 52).view(2, 16), "use_cache": False}


def _checkpointing(case: Case) -> None:
    case.base.gradient_checkpointing_enable({"use_reentrant": False})


def _group_count(case: Case) -> None:
    """Fewer heads than the weights have: an error in eager too."""
    case.layer.self_attn.num_key_value_groups = 3


def _table(case: Case) -> None:
    case.text_config.rope_parameters["unread"] = 3


def _reading_global(case: Case) -> None:
    """A sub-module whose forward reads an attribute of the model's configuration object in a list."""
    chunk(case)
    case.text_config.own = {"scales": [1.0, 2.0]}
    mlp, config = case.layer.mlp, case.text_config
    mlp.forward = types.MethodType(lambda self, x: type(self).forward(self, x) + config.own["scales"][1], mlp)


HAZARDS = [
    Hazard("epsilon of a norm", "A number that a norm reads.", _epsilon, chunk, forward, ("eps", "0.5")),
    Hazard(
        "scaling of attention",
        "A number that attention reads.",
        lambda c: setattr(c.layer.self_attn, "scaling", 0.75),
        chunk,
        forward,
        ("scaling", "0.25", "0.75"),
    ),
    Hazard(
        "scaling of positions",
        "A number that rotary embeddings read.",
        _rope_scaling,
        chunk,
        forward,
        ("attention_scaling", "1.0", "2.0"),
    ),
    Hazard("activation swapped", "Another activation module.", _swap, chunk, forward, ("act_fn", "Swish")),
    Hazard("forward of an instance", "`forward` set on one module.", _own_forward, chunk, forward, ("forward",)),
    Hazard(
        "method of an instance",
        "A bound method set on one attention module.",
        _own_method,
        chunk,
        forward,
        ("forward", "scaled"),
    ),
    Hazard("bias added", "A linear layer gets a bias.", _bias, chunk, forward, ("bias",)),
    Hazard(
        "layers truncated",
        "The list of layers is cut.",
        _shorter,
        chunk,
        forward,
        ("layers",),
    ),
    Hazard(
        "fewer layers by configuration",
        "`config.num_hidden_layers` is lowered.",
        _fewer_by_config,
        chunk,
        forward,
        ("num_hidden_layers", "1", "2"),
    ),
    Hazard(
        "blocks change places", "Two layers swap their feed-forward blocks.", _swapped_layers, chunk, forward, ("mlp",)
    ),
    Hazard(
        "block replaced", "A feed-forward block becomes an identity.", _identity, chunk, forward, ("mlp", "Identity")
    ),
    Hazard(
        "soft cap",
        "Attention scores are capped from now on.",
        _soft_cap,
        chunk,
        forward,
        ("attn_logit_softcapping", "None", "1.0"),
        only=("gemma3",),
    ),
    Hazard(
        "window",
        "The sliding window becomes smaller.",
        _window,
        _long_text,
        forward,
        ("sliding_window", "8", "4"),
        only=("gemma3",),
    ),
    Hazard(
        "layer types",
        "`config.layer_types` names other kinds of attention.",
        _kinds,
        _long_text,
        forward,
        ("layer_types", "sliding_attention", "full_attention"),
        only=("gemma3",),
    ),
    Hazard(
        "attention no longer causal",
        "`is_causal` of attention modules.",
        _not_causal,
        _long_text,
        forward,
        ("is_causal", "True", "False"),
    ),
    Hazard("impossible head count", "A number that makes attention fail.", _group_count, chunk, forward),
    Hazard(
        "hidden states by configuration",
        "`config.output_hidden_states=True`.",
        lambda c: setattr(c.decoder.config, "output_hidden_states", True),
        chunk,
        forward,
        ("output_hidden_states", "True"),
    ),
    Hazard(
        "no cache by configuration",
        "`config.use_cache=False` with calls that do not say.",
        lambda c: setattr(c.decoder.config, "use_cache", False),
        lambda c: _silent_on_cache(c),
        lambda c: _cache_or_not(c),
    ),
    Hazard(
        "attention implementation",
        '`set_attn_implementation("eager")`.',
        lambda c: c.base.set_attn_implementation("eager"),
        chunk,
        forward,
        harmless="the same function",
    ),
    Hazard(
        "attentions with eager attention",
        "Attention weights are asked for, and the implementation gives them.",
        lambda c: (c.base.set_attn_implementation("eager"), c.inputs.update(output_attentions=True)),
        chunk,
        forward,
    ),
    Hazard(
        "gradient checkpointing",
        "Switched on between training steps.",
        _checkpointing,
        training,
        gradients,
        harmless="the same gradients",
    ),
    Hazard(
        "configuration value in a list",
        "A forward reads a list in a dict of the configuration.",
        lambda c: c.text_config.own["scales"].__setitem__(1, 7.0),
        _reading_global,
        forward,
        ("7.0",),
    ),
]


def _from_decoder(case: Case) -> Any:
    with torch.no_grad():
        inputs = copy.deepcopy(case.inputs)
        return (
            [t for t in case.decoder(**inputs).values() if isinstance(t, torch.Tensor)]
            if getattr(case.decoder.config, "return_dict", True)
            else [t for t in case.decoder(**inputs) if isinstance(t, torch.Tensor)]
        )


def _silent_on_cache(case: Case) -> None:
    prompt(case)
    del case.inputs["use_cache"]


def _cache_or_not(case: Case) -> Any:
    """Whether a cache came back."""
    with torch.no_grad():
        result = case.model(**case.inputs)
    return [torch.tensor(result.past_key_values is not None)]
