"""Tiny models with random weights, of any architecture of the installed Transformers."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from .. import compat
from ..components import TASKS, answering
from .overrides import FILL_IN, OVERRIDES, STAND_INS
from .shrink import FIRST_SPECIAL_ID, VOCAB, shrink

GAIN = 1.5  # q and k of unit-variance inputs then give attention scores of deviation about 2: decided, not one-hot
EMBEDDING_STD = 0.4


def known_model_types() -> dict[str, str]:
    """Model type to class name: image-text-to-text first, then audio and omni models, then causal language models."""
    out: dict[str, str] = {}
    for task in TASKS:
        out = compat.model_class_names(task) | out
    return out


def tiny_model(model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """Build a small model of an architecture with random weights, without any download.

    The default configuration is shrunk (two layers or one of each kind, width 64, 320 tokens) and the weights are
    drawn large enough that a dropped mask or a blank picture changes the greedy tokens. Equal seeds give equal models.

    Args:
        model_type: Transformers' name of the architecture, such as ``"qwen2_5_vl"``.
        seed: seed of the weights.

    Returns:
        The model in evaluation mode and float32, with a greedy generation configuration that never stops early.

    Raises:
        ValueError: the model type is unknown; the message names near matches.
    """
    cls = _model_class(model_type)
    config = tiny_config(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = compat.build_from_config(cls, config).eval()
    _draw_weights(model, seed)
    part: Any = answering(model)
    for one in {model, part}:
        if one.can_generate():
            _make_greedy(one.generation_config)
    return model


def _make_greedy(config: GenerationConfig) -> None:
    """Greedy, without an end; ids above the text are kept back, as a placeholder would ask for a missing picture."""
    config.update(
        do_sample=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        forced_eos_token_id=None,
        suppress_tokens=list(range(FIRST_SPECIAL_ID, VOCAB)),
    )


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The configuration that `tiny_model` builds from.

    Raises:
        ValueError: the model type is unknown.
    """
    cls = _model_class(model_type)
    default = _config_for(cls, AutoConfig.for_model(model_type, **FILL_IN.get(model_type, {})))
    values = shrink(default.to_dict())
    if "is_decoder" in values and compat.model_class_names("CAUSAL_LM").get(model_type) == cls.__name__:
        values["is_decoder"] = True  # these default to encoders, which see the tokens to come
    if any("mrope_section" in inspect.getsource(module) for module in _modeling_modules(cls, default)):
        for one in (values, *values.values()):  # a model may hold several, each with its text
            if isinstance(one, dict) and (one is values or "text_config" in one):
                _set_mrope_sections(one)
    for path, value in OVERRIDES.get(model_type, {}).items():
        _assign(values, path, value)
    config: PreTrainedConfig = type(default).from_dict(values)
    for name, stand_in in STAND_INS.get(model_type, {}).items():
        vars(config)[name] = AutoConfig.for_model(**stand_in)  # past the check of the field's class
    return config


def _config_for(cls: Any, config: PreTrainedConfig) -> PreTrainedConfig:
    """``config``, or the part of it that ``cls`` is built from: a decoder listed under the name of the whole."""
    parts = (part for part in vars(config).values() if isinstance(part, cls.config_class))
    return config if isinstance(config, cls.config_class) else next(parts, config)


def _modeling_modules(cls: Any, config: PreTrainedConfig) -> list[ModuleType]:
    """The module of the model, and that of its language model where another architecture lends it."""
    names = {cls.__module__, type(config.get_text_config()).__module__.replace(".configuration_", ".modeling_")}
    # some are a configuration alone, for the classes of another architecture
    return [importlib.import_module(name) for name in names if importlib.util.find_spec(name)]


def _model_class(model_type: str) -> Any:
    known = known_model_types()
    if model_type not in known:
        near = difflib.get_close_matches(model_type, known, n=3, cutoff=0.5)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"Unknown model type {model_type!r}.{hint}")
    return getattr(transformers, known[model_type])


def _assign(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        values = values[name]
    values[last] = value


def _set_mrope_sections(values: dict[str, Any]) -> None:
    """Multimodal rotary embeddings split half the rotated dims in three; the defaults only fit a head_dim of 128."""
    text = values.get("text_config", values)
    rope = text.get("rope_parameters") or {}
    for one in (rope, *rope.values()):
        if isinstance(one, dict) and "rope_type" in one:
            head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
            half = int(head_dim * one.get("partial_rotary_factor", 1.0)) // 2
            third = half * 3 // 8
            one["mrope_section"] = [half - 2 * third, third, third]


@torch.no_grad()
def _draw_weights(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    embeddings = _embedding_scales(model)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.ndim >= 2:
            std = _std(parameter, embeddings.get(id(parameter)))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        elif _is_closed_gate(name, parameter):
            # a gate that starts closed would hide the branch behind it from every comparison
            parameter.copy_(0.5 + 0.1 * torch.randn(parameter.shape, generator=generator))
        elif name.endswith("A_log"):  # a slow decay, so that a state remembers further than a few tokens
            parameter.uniform_(math.log(0.05), math.log(0.5), generator=generator)
        elif name.endswith("bias"):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def _embedding_scales(model: nn.Module) -> dict[int, float]:
    """What the model multiplies each embedding with, said by the embedding itself or by the module around it."""
    out = {}
    for owner in model.modules():
        for child in owner.children():
            if isinstance(child, nn.Embedding):
                scale = getattr(child, "embed_scale", getattr(owner, "embed_scale", 1.0))
                out[id(child.weight)] = max(float(scale or 1.0), 1.0)
    return out


def _std(parameter: torch.Tensor, embedding_scale: float | None) -> float:
    if embedding_scale is not None:
        return EMBEDDING_STD / embedding_scale
    fan_in = parameter[0].numel() if parameter.ndim != 3 else parameter.shape[-1]
    return GAIN / math.sqrt(max(fan_in, 1))


def _is_closed_gate(name: str, parameter: torch.Tensor) -> bool:
    tags = ("gate", "layer_scale", "lambda", "gamma", "alpha", "scale")
    return any(tag in name.rsplit(".", 1)[-1] for tag in tags) and bool(parameter.abs().max() < 0.1)
