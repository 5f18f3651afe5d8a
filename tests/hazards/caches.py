"""What may be different about the cache that a call brings."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from compile_policy_transformers.cache_argument import CACHE

from .case import Case, Hazard, behind, chunk, forward, held, prompt_inputs, static_chunk


class Doubling(DynamicCache):
    """A cache of the user's own, which does something else on update."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(*args, **kwargs)
        return keys * 2, values


class DoublingLayer(DynamicLayer):
    """A layer of the user's own."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(*args, **kwargs)
        return keys * 2, values


def _cache(case: Case) -> Any:
    return case.inputs[CACHE]


def _empty(case: Case, cache: Cache) -> None:
    case.inputs = {**prompt_inputs(case, seed=2), CACHE: cache, "use_cache": True}


def _empty_dynamic(case: Case) -> None:
    _empty(case, DynamicCache(config=case.text_config))


def _empty_static(case: Case) -> None:
    _empty(case, StaticCache(config=case.text_config, max_cache_len=40))


def _static(case: Case, length: int = 40) -> None:
    case.inputs = behind(case, StaticCache(config=case.text_config, max_cache_len=length), seed=2)


def _dynamic(case: Case) -> None:
    case.inputs = behind(case, DynamicCache(config=case.text_config), seed=2)


def _without_windows(case: Case) -> None:
    """A cache that was not told of the configuration: every layer keeps everything."""
    case.inputs = behind(case, DynamicCache(), seed=2)


def _cropped(case: Case) -> None:
    case.inputs = behind(case, DynamicCache(), seed=0)
    _cache(case).crop(-2)
    case.inputs["attention_mask"] = case.inputs["attention_mask"][:, 2:]
    case.inputs["position_ids"] = case.inputs["position_ids"] - 2


def _each(change: Any) -> Any:
    """Apply to keys and values of every layer."""

    def changed(case: Case) -> None:
        for layer in _cache(case).layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)

    return changed


def _in_place(case: Case) -> None:
    for tensor in held(_cache(case)):
        tensor.mul_(2)


def _reordered(case: Case) -> None:
    _cache(case).reorder_cache(torch.tensor([1, 0]))


def _repeated(case: Case) -> None:
    _cache(case).batch_repeat_interleave(2)
    _rows(case, torch.tensor([0, 0, 1, 1]))


def _selected(case: Case) -> None:
    _cache(case).batch_select_indices(torch.tensor([1]))
    _rows(case, torch.tensor([1]))


def _rows(case: Case, rows: torch.Tensor) -> None:
    for name in ("input_ids", "attention_mask"):
        case.inputs[name] = case.inputs[name][rows]
    case.inputs["position_ids"] = case.inputs["position_ids"][..., rows, :]


def _own_class(case: Case) -> None:
    _cache(case).__class__ = Doubling


def _own_layer(case: Case) -> None:
    for layer in _cache(case).layers:
        layer.__class__ = DoublingLayer


def _own_update(case: Case) -> None:
    """``update`` replaced on the instance, as quantizing and compressing caches do."""
    cache = _cache(case)

    def update(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = type(cache).update(cache, *args, **kwargs)
        return keys * 2, values

    cache.update = update


def _spare_layer(case: Case) -> None:
    """The cache of a deeper model: its last layer is never asked."""
    _cache(case).layers.append(copy.deepcopy(_cache(case).layers[-1]))
    _in_place(case)


def _missing_layer(case: Case) -> None:
    _cache(case).layers.pop()


def _other_heads(case: Case) -> None:
    """The cache of a model with other heads."""
    _each(lambda t: torch.cat([t, t], 1))(case)


def _strided(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3) * 2


def _tied(case: Case) -> None:
    """Values are the very tensors of the keys."""
    for layer in _cache(case).layers:
        layer.values = layer.keys


def _rolled_back(case: Case) -> None:
    """Rejected drafts taken back by moving the fill mark."""
    for layer in _cache(case).layers:
        layer.cumulative_length.sub_(2)
    case.inputs["position_ids"] = case.inputs["position_ids"] - 2
    case.inputs["attention_mask"] = case.inputs["attention_mask"][:, :-2]


def _reset(case: Case) -> None:
    _cache(case).reset()
    case.inputs["attention_mask"] = case.inputs["attention_mask"][:, -5:]
    case.inputs["position_ids"] = case.inputs["position_ids"] - case.inputs["position_ids"].min()


def _legacy(case: Case) -> None:
    case.inputs[CACHE] = tuple((layer.keys, layer.values) for layer in _cache(case).layers)


def _gradient_through(case: Case) -> Any:
    """Gradients of the cached states, as prefix tuning takes them."""
    inputs = copy.deepcopy(case.inputs)
    wanted = held(inputs[CACHE])
    loss = case.model(**inputs).logits.square().mean()
    loss.backward()
    return [loss, *[t.grad for t in wanted if t.grad is not None]]


def _forgets(case: Case) -> Any:
    """The cache's own history: keep three tokens of what it holds."""
    _each(lambda t: t[:, :, -3:].contiguous())(case)
    case.inputs["attention_mask"] = case.inputs["attention_mask"][:, -8:]


HAZARDS = [
    Hazard("static after dynamic cache", "Another kind of cache.", _static, chunk, forward),
    Hazard("dynamic after static cache", "The other way round.", _dynamic, static_chunk, forward),
    Hazard(
        "empty dynamic cache", "A prompt into a lazy cache after calls on a filled one.", _empty_dynamic, chunk, forward
    ),
    Hazard("filled after empty dynamic cache", "The other way round.", _dynamic, _empty_dynamic, forward),
    Hazard("empty static cache", "A prompt into a lazy static cache.", _empty_static, static_chunk, forward),
    Hazard("longer static cache", "Another `max_cache_len`.", lambda c: _static(c, 53), static_chunk, forward),
    Hazard(
        "cache without windows",
        "A cache whose layers keep everything, where sliding layers kept a window.",
        _without_windows,
        chunk,
        forward,
    ),
    Hazard("cropped cache", "Two tokens taken off the cache.", _cropped, chunk, forward),
    Hazard(
        "shortened cache",
        "Only its last three tokens are kept.",
        _forgets,
        chunk,
        forward,
        only=("llama", "qwen2_5_vl"),
    ),
    Hazard("reordered cache", "Rows change places, as in beam search.", _reordered, chunk, forward),
    Hazard("selected rows", "One row of the cache is kept.", _selected, chunk, forward),
    Hazard("states written in place", "Cached states get other values.", _in_place, chunk, forward),
    Hazard("states replaced", "Cached states are other tensors.", _each(lambda t: t.flip(2) * 2), chunk, forward),
    Hazard("strided states", "Cached states in another layout.", _each(_strided), chunk, forward),
    Hazard("states of another dtype", "A cache in bfloat16.", _each(lambda t: (t * 2).bfloat16()), chunk, forward),
    Hazard("one tensor for keys and values", "States share memory.", _tied, chunk, forward),
    Hazard("cache class of one's own", "A subclass that changes `update`.", _own_class, chunk, forward),
    Hazard("cache layer of one's own", "Layers of a subclass that changes `update`.", _own_layer, chunk, forward),
    Hazard("update replaced", "`update` is another function on this cache.", _own_update, chunk, forward),
    Hazard("cache of a deeper model", "One layer more than the model has.", _spare_layer, chunk, forward),
    Hazard("cache of a shallower model", "One layer fewer than the model has.", _missing_layer, chunk, forward),
    Hazard("cache of another model", "Twice as many heads, which cannot be attended to.", _other_heads, chunk, forward),
    Hazard(
        "static cache rolled back",
        "Two tokens are taken back.",
        _rolled_back,
        static_chunk,
        forward,
        only=("llama", "qwen2_5_vl"),
    ),
    Hazard("static cache reset", "The cache is emptied and used again.", _reset, static_chunk, forward),
    Hazard("tuples instead of a cache", "The form of old versions.", _legacy, chunk, forward),
    Hazard(
        "gradients of cached states",
        "As prefix tuning wants them.",
        _each(lambda t: t.clone().requires_grad_()),
        chunk,
        _gradient_through,
    ),
]
