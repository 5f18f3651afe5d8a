"""What a hazard is, and what it is given to work with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from compile_policy_transformers.cache_argument import CACHE
from compile_policy_transformers.tiny import tiny_inputs, tiny_model

from .ways import Way

#: A text decoder, one with images and multimodal positions, one with images and sliding-window layers.
ARCHITECTURES = ("llama", "qwen2_5_vl", "gemma3")
BATCH, NEW, TEXT = 2, 5, 9


@dataclass
class Case:
    """One model in the hands of a hazard.

    Attributes:
        model: what is called; a hazard may put another one in its place.
        inputs: arguments of the call, copied for every call.
        kept: anything else that a hazard carries from one of its functions to the next.
    """

    architecture: str
    way: Way
    model: Any
    inputs: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> PreTrainedModel:
        """The Transformers model, below an adapter's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # type: ignore[no-any-return]

    @property
    def decoder(self) -> Any:
        return self.base.get_decoder()

    @property
    def layer(self) -> Any:
        """The last decoder layer: what changes in it is in the result and nowhere else."""
        return self.decoder.layers[-1]

    @property
    def text_config(self) -> Any:
        return self.base.config.get_text_config()


@dataclass(frozen=True)
class Hazard:
    """Something that may change after a component was compiled.

    Attributes:
        name: a few words; unique.
        says: what happens, in one sentence.
        change: makes the change, after the first call.
        prepare: makes the inputs, and the model where need be, before the way of compiling is put on.
        call: calls the model and returns what is compared; run before and after the change.
        differs: words of the event that tells of a new graph: what differed, and its values.
        harmless: why the results before and after the change may be equal.
        only: architectures that have what changes; empty for all.
        rounding: relative error that low precision inside the model explains, where results are of a higher one.
    """

    name: str
    says: str
    change: Callable[[Case], Any]
    prepare: Callable[[Case], Any]
    call: Callable[[Case], Any]
    differs: tuple[str, ...] = ()
    harmless: str = ""
    only: tuple[str, ...] = ()
    rounding: float = 0.0


# -- how a call is made ready -----------------------------------------------------------------------------------------


def chunk(case: Case) -> None:
    """Five tokens behind a cache that holds a prompt (with a picture, where the model takes one)."""
    _chunk(case, DynamicCache(config=case.text_config))


def static_chunk(case: Case) -> None:
    """The same behind a static cache."""
    _chunk(case, StaticCache(config=case.text_config, max_cache_len=40))


def prompt(case: Case) -> None:
    """A padded prompt without a cache."""
    case.inputs = {**prompt_inputs(case), "use_cache": False}


def generation(case: Case) -> None:
    """A padded prompt for `generate`."""
    case.inputs = {**prompt_inputs(case), "max_new_tokens": 6}


def training(case: Case) -> None:
    """A prompt with labels, in training mode."""
    inputs = prompt_inputs(case)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    case.inputs = {**inputs, "labels": labels, "use_cache": False}
    case.model.train()


def prompt_inputs(case: Case, seed: int = 0, batch: int = BATCH, text_len: int = TEXT) -> dict[str, Any]:
    images = [(28, 28)] if case.architecture != "llama" else []
    return tiny_inputs(case.base, text_len=text_len, batch=batch, images=images, seed=seed)


def _chunk(case: Case, cache: Cache) -> None:
    case.inputs = behind(case, cache)


def behind(case: Case, cache: Cache, batch: int = BATCH, new: int = NEW, seed: int = 0) -> dict[str, Any]:
    """Arguments for ``new`` tokens behind a prompt, which is run into ``cache`` by an untouched model."""
    plain = tiny_model(case.architecture)
    prompt = prompt_inputs(case, seed, batch)
    with torch.no_grad():
        plain(**prompt, past_key_values=cache, use_cache=True)
    seen = prompt["input_ids"].shape[1]
    generator = torch.Generator().manual_seed(seed + 1)
    mask = torch.cat([prompt["attention_mask"], torch.ones(batch, new, dtype=torch.long)], 1)
    return {
        "input_ids": torch.randint(10, 200, (batch, new), generator=generator),
        "attention_mask": mask,
        "position_ids": positions(case, batch, seen, new),
        CACHE: cache,
        "use_cache": True,
    }


def positions(case: Case, batch: int, seen: int, new: int) -> torch.Tensor:
    """(batch, new), or (3, batch, new) where positions are temporal, height and width."""
    rows = torch.arange(seen, seen + new).expand(batch, new)
    return torch.stack([rows, rows + 1, rows + 2]) if case.architecture == "qwen2_5_vl" else rows.contiguous()


# -- what is done to results: nothing that a norm behind it would take back -------------------------------------------


def bent(result: Any, by: Any = 1.0) -> Any:
    """A result, or the first of several, with every number moved by ``by``."""
    return (result[0] + by, *result[1:]) if isinstance(result, tuple) else result + by


def bending(function: Any) -> Any:
    """``function`` with its result bent."""

    def bends(*args: Any, **kwargs: Any) -> Any:
        return bent(function(*args, **kwargs))

    return bends


# -- how the model is called ------------------------------------------------------------------------------------------


def forward(case: Case) -> Any:
    """One call without gradients."""
    with torch.no_grad():
        return plain(case)


def plain(case: Case) -> Any:
    """One call in the modes that are in force."""
    inputs = copy.deepcopy(case.inputs)
    return counting(inputs, case.model(**inputs))


def tokens(case: Case) -> Any:
    """Greedy tokens of `generate`."""
    return case.model.generate(**copy.deepcopy(case.inputs))


def gradients(case: Case) -> Any:
    """Loss and gradients of one training step; dropout draws the same numbers each time."""
    case.model.zero_grad()
    torch.manual_seed(0)
    loss = case.model(**copy.deepcopy(case.inputs)).loss
    loss.backward()
    return [loss, *[p.grad for p in case.model.parameters() if p.grad is not None]]


def counting(inputs: dict[str, Any], result: Any) -> Any:
    """Tensors of a result at the positions that are no padding, and what the call left in its cache."""
    mask = inputs.get("attention_mask")
    tensors = [t for t in pytree.tree_leaves(_plain(result)) if isinstance(t, torch.Tensor)]
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not mask.all():
        tensors = [_unpadded(t, mask.bool()) for t in tensors]
    cache = inputs.get(CACHE)
    return tensors + (held(cache) if isinstance(cache, Cache) else [])


def _plain(result: Any) -> Any:
    """A result without its cache, whose state is read by `held`."""
    values = list(result.values()) if hasattr(result, "values") else list(result)
    return [v for v in values if not isinstance(v, Cache)]


def _unpadded(t: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if t.dim() != 3 or t.shape[0] != mask.shape[0] or t.shape[1] > mask.shape[1]:
        return t
    return t[mask[:, -t.shape[1] :]]


def held(cache: Cache) -> list[torch.Tensor]:
    """States of a cache, layer by layer."""
    layers = [layer for layer in cache.layers if getattr(layer, "is_initialized", False)]
    return [t for layer in layers for t in (layer.keys, layer.values)]
