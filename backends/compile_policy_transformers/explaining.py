"""What `compile_policy.explain` asks a backend: facts behind a plan, and calls made without weights.

A call of a component is bound on the meta device by the very binder that binds real calls, so that what is said about
dynamic dims is what a run would find.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from compile_policy.binder import Bound
from compile_policy.errors import PolicyWarning
from compile_policy.plan import Component
from compile_policy.shapes import UNBACKED
from compile_policy_transformers import caches
from compile_policy_transformers.applying import binder_for
from compile_policy_transformers.audio import SoundBinder
from compile_policy_transformers.base import find_components
from compile_policy_transformers.components import Found, holds, meta_model, qualname, rule_for
from compile_policy_transformers.decoder import DecoderBinder
from compile_policy_transformers.loading import config_of
from compile_policy_transformers.multimodal import MODALITIES, decoder_as_named
from compile_policy_transformers.stack_calls import StackBinder
from compile_policy_transformers.vision import EncoderBinder

#: What the labels of decoders and towers over whole pictures mean.
LABELS = {
    "batch": "rows of the call",
    "sequence": "new tokens of the call",
    caches.PAST: "tokens in the cache",
    caches.SLIDING_PAST: "tokens in a sliding layer of the cache",
    caches.SLIDING_KEPT: "tokens that a sliding layer keeps",
    caches.SLOTS: "length of a static cache",
    caches.SLIDING_SLOTS: "length of a sliding layer of a static cache",
    caches.INDEXED: "tokens so far, of a static cache with positions for an indexer",
    "visual_tokens": "visual tokens that the first layers add",
    "mask_heads": "heads of the mask",
    "patches": "patches of each picture, or of all packed ones",
    "packed pictures": "packed pictures of the call, and one",
    "pictures": "pictures and videos of the call",
    "images": "pictures of the call",
    "sounds": "pieces of sound of the call",
    "frames": "frames of each piece of sound, the longest one's",
}


def model_of(name: str | None) -> nn.Module:
    """The model behind a name without memory for its weights."""
    return meta_model(config_of(name))


def meaning(label: str, component: nn.Module) -> tuple[str, str]:
    """(where a label is from: ``rule`` or ``probe``, what it counts)."""
    parts = [part.removeprefix(UNBACKED) for part in label.split("+")]
    if all(part in LABELS for part in parts):
        return "rule", " and ".join(LABELS[part] for part in parts)
    return "probe", "differs between two sets of pictures"


def facts(model: nn.Module) -> dict[str, list[str]]:
    """Path of a component -> what the model's own methods answer, and why something else was taken. ``""``: model."""
    found = find_components(model)
    said: dict[str, list[str]] = {f.qualname: [] for f in found}
    for f in found:
        if f.role == "decoder":
            said[f.qualname] += _about_decoder(model, f)
    said.setdefault("", [])
    said[""] += _about_encoders(model, found)
    wrapper = _adapter_layers(model)
    if wrapper:
        said[""].append(wrapper)
    return {path: lines for path, lines in said.items() if lines}


def _about_decoder(model: nn.Module, found: Found) -> list[str]:
    rule = rule_for(model)
    lines = [f"rule for {rule.model_type}: {rule.why}"] if rule is not None and (rule.decoder or rule.inner) else []
    named = decoder_as_named(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        lines.append("the decoder of an encoder-decoder: it also attends to the encoder's states")
    if named is None:
        return [*lines, "the model has no get_decoder()"]
    if named is not found.module:
        where = qualname(model, named)
        place = "no part of the model" if where is None else where or "the model itself"
        inside = "holds more than the layers of the decoder" if holds(named, found.module) else "does not hold it"
        lines.append(f"get_decoder() answers {type(named).__name__} ({place}), which {inside}")
    return lines


def _about_encoders(model: nn.Module, found: list[Found]) -> list[str]:
    """Why a model that its name calls multimodal has no encoder of its own."""
    known = {modality for f in found for modality in f.modalities}
    get_encoder = getattr(model, "get_encoder", None)
    lines = []
    for modality in MODALITIES:
        if modality in known or get_encoder is None or not _sees(model, modality):
            continue
        try:
            answer: Any = get_encoder(modality=modality)
        except (TypeError, ValueError, AttributeError, NotImplementedError):
            continue
        if answer is model or qualname(model, answer) == "":
            lines.append(
                f"there is no {modality} encoder to compile: get_encoder({modality!r}) answers the model itself"
            )
        elif isinstance(answer, nn.Module):
            lines.append(f"get_encoder({modality!r}) answers {type(answer).__name__}, which is no tower of its own")
    return lines


def _sees(model: nn.Module, modality: str) -> bool:
    """Whether the model takes this modality at all."""
    return any(hasattr(part, f"get_{modality}_features") for part in (model, getattr(model, "model", None)))


def _adapter_layers(model: nn.Module) -> str:
    """Layers that peft put in place of the model's own."""
    wrapped = [m for m in model.modules() if type(m).__module__.startswith("peft.") and hasattr(m, "base_layer")]
    if not wrapped:
        return ""
    active = sorted({str(name) for m in wrapped for name in getattr(m, "active_adapters", ())})
    off = any(getattr(m, "disable_adapters", False) for m in wrapped)
    state = "switched off" if off else f"active: {', '.join(active) or 'none'}"
    return (
        f"{len(wrapped)} layers are wrapped by peft ({state}); they are part of the graph, and adding, switching or "
        "merging adapters is another structure, which needs another graph"
    )


def sample_bound(model: nn.Module, component: Component) -> Bound:
    """A call of a component, bound on the device of its weights (meta, for a model without memory).

    Raises:
        Exception: whatever the component raises without data, such as control flow that reads a tensor.
    """
    module = model.get_submodule(component.qualname)
    binder = binder_for(component.role, module)
    device = next(module.parameters()).device
    with torch.no_grad(), torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore", PolicyWarning)
        if isinstance(binder, DecoderBinder):
            binder.belongs_to(model)
            embeds = _embeds(module)
            given = {"inputs_embeds": embeds, "use_cache": True, **binder.ids.of(embeds)}
            if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
                given[binder.cache_name] = EncoderDecoderCache(DynamicCache(), DynamicCache())
            return binder.bind(module, (), given)
        if isinstance(module, nn.ModuleList):
            raise LookupError("what the tower hands to its layers is seen at the first call")
        if isinstance(binder, StackBinder):
            return binder.bind(module, (), {next(iter(binder.parameters)): _states(module)})
        if isinstance(binder, SoundBinder):
            raise LookupError("which of its dims are frames is found out by running it on sound")
        assert isinstance(binder, EncoderBinder)
        first = next(iter(binder.parameters))
        if not binder.grid:
            return binder.bind(module, (), {first: torch.empty(1, *_picture(module))})
    grid = torch.tensor([[1, 2 * binder.merge, 2 * binder.merge]])
    given = {first: torch.empty(int(grid.prod()), _patch_width(module), device=device), "grid_thw": grid}
    with torch.no_grad():
        return binder.bind(module, (), given)


def _embeds(decoder: Any) -> torch.Tensor:
    table = decoder.get_input_embeddings()
    width = getattr(table, "embedding_dim", None) or decoder.config.hidden_size
    return torch.empty(2, 3, width, dtype=next(decoder.parameters()).dtype)


def _states(stack: Any) -> torch.Tensor:
    """Hidden states of a stack of layers."""
    return torch.empty(2, 3, stack.config.hidden_size, dtype=next(stack.parameters()).dtype)


def _patch_width(tower: Any) -> int:
    """Values of one packed patch: channels, frames, height, width."""
    config = tower.config
    channels = next(v for n in ("in_channels", "in_chans", "num_channels") if (v := getattr(config, n, None)))
    return int(channels * getattr(config, "temporal_patch_size", 1) * config.patch_size**2)


def _picture(tower: Any) -> tuple[int, ...]:
    """Channels and sizes of one picture as the tower's configuration has them."""
    config = tower.config
    size = getattr(config, "image_size", None)
    if size is None:
        raise LookupError("its configuration does not name the size of its inputs")
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return (int(getattr(config, "num_channels", 3)), int(height), int(width))
