"""A found component, the exceptions that no general rule can tell, and models without memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compile_policy.errors import UnsupportedModelError

from . import compat

TASKS = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CAUSAL_LM")


@dataclass(frozen=True, eq=False)
class Found:
    """A module of a model that has a role.

    Attributes:
        role: ``decoder``, ``encoder[image]`` (``video``, ``audio``, ``text``), ``head`` or ``projector``.
        qualname: dotted path below the model; empty for the model itself.
        module: the module.
        modalities: what an encoder encodes; empty for the other roles.
        obstacle: why this module cannot be compiled by itself; empty when it can.
    """

    role: str
    qualname: str
    module: nn.Module
    modalities: frozenset[str] = frozenset()
    obstacle: str = ""


@dataclass(frozen=True)
class ComponentRule:
    """What Transformers' own answers get wrong for one architecture.

    Attributes:
        model_type: the architecture.
        why: what Transformers answers, and what happens instead.
        decoder: path of the decoder; empty leaves the general rule.
        inner: path of a sub-model that is resolved in place of the whole.
        encoders: modality and path of encoders that neither ``get_encoder`` nor their classes tell.
    """

    model_type: str
    why: str
    decoder: str = ""
    inner: str = ""
    encoders: tuple[tuple[str, str], ...] = ()


# Most exceptions need no entry: a decoder that holds its head (llama4, blip-2, kosmos-2, kosmos-2.5,
# vision-encoder-decoder) or a tower (chameleon, git, idefics) is seen in the module tree. These are not.
RULES: tuple[ComponentRule, ...] = (
    ComponentRule(
        "florence2",
        "get_decoder() is the BartModel, whose forward is never called: only its encoder and decoder are",
        decoder="model.language_model.decoder",
    ),
    ComponentRule(
        "pi0",
        "get_decoder() is the whole policy with its vision tower; the language model inside is called",
        decoder="model.vlm.language_model",
    ),
    ComponentRule(
        "pix2struct",
        "the decoder's own forward ends in lm_head and returns logits, so that the head is compiled with it",
        decoder="decoder",
    ),
    ComponentRule("granite_speech", "get_encoder() is the model itself", encoders=(("audio", "model.encoder"),)),
    ComponentRule("granite_speech_plus", "get_encoder() is the model itself", encoders=(("audio", "model.encoder"),)),
    ComponentRule(
        "phi4_multimodal",
        "the audio model is no tower by its name or its main input",
        encoders=(("audio", "model.embed_tokens_extend.audio_embed.encoder"),),
    ),
    ComponentRule("qwen2_5_omni", "get_decoder() is the model itself; the thinker answers", inner="thinker"),
    ComponentRule("qwen3_omni_moe", "get_decoder() is the model itself; the thinker answers", inner="thinker"),
)


def rule_for(model: nn.Module) -> ComponentRule | None:
    """The rule of the model's architecture, if it needs one."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return next((rule for rule in RULES if rule.model_type == model_type), None)


def answering(model: nn.Module) -> nn.Module:
    """The part of a model that its calls are about: the model, unless a rule names another in its place."""
    rule = rule_for(model)
    return model if rule is None or not rule.inner else model.get_submodule(rule.inner)


def generates(model: nn.Module) -> bool:
    """Whether the class of a model says that it can generate text."""
    can_generate = getattr(model, "can_generate", None)
    return can_generate is not None and bool(can_generate())


def qualname(model: nn.Module, module: nn.Module) -> str | None:
    """Dotted path of ``module`` below ``model``, ``None`` when it isn't there."""
    return next((name for name, candidate in model.named_modules() if candidate is module), None)


def holds(outer: nn.Module, inner: nn.Module) -> bool:
    """Whether ``inner`` is ``outer`` or below it."""
    return any(candidate is inner for candidate in outer.modules())


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that generates with ``config``: what the checkpoint names, else what Transformers' tables name.

    Raises:
        UnsupportedModelError: neither names a class.
    """
    names = [*(config.architectures or ())]
    names += [
        table[config.model_type] for task in TASKS if config.model_type in (table := compat.model_class_names(task))
    ]
    for name in names:
        cls: Any = getattr(transformers, name, None)
        if cls is not None:
            return cls  # type: ignore[no-any-return]
    raise UnsupportedModelError(
        f"No generating model class is known for model type {config.model_type!r}.",
        remedy="Build the model yourself and hand the model over instead of its configuration.",
    )


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of ``config`` on the meta device: its module tree, and no memory for weights.

    Raises:
        UnsupportedModelError: no class is known for the configuration.
    """
    cls = model_class(config)
    with torch.device("meta"):
        model: PreTrainedModel = cls(copy.deepcopy(config))  # building writes into the configuration
    # Some classes allocate all the same, with torch.FloatTensor or the like (xlnet, wav2vec2).
    torch.nn.Module.to(model, "meta")
    model.eval()
    return model


def as_model(config_or_model: PreTrainedConfig | nn.Module) -> nn.Module:
    """A model stays what it is; a configuration becomes a model on the meta device."""
    if isinstance(config_or_model, PreTrainedConfig):
        return meta_model(config_or_model)
    return config_or_model
