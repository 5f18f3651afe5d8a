"""A decoder of which only the layers are compiled, because it calls another model before them.

What comes before its layers runs eager in every call, with the masks made dense as in every graph of a decoder; what it
leaves behind goes into the graph of the layers; what comes behind them arranges the result (`forward_parts.py`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from compile_policy.call_key import Call
from compile_policy.entry import Entry
from compile_policy.errors import NotCompilable
from compile_policy.region import Bound
from compile_policy.unseen import probed
from compile_policy_transformers import attention, cache_layers, caches, compat
from compile_policy_transformers.cache_masks import SLIDING, all_sliding, arranged
from compile_policy_transformers.decoder import DecoderBinder
from compile_policy_transformers.forward_parts import Parts
from compile_policy_transformers.lengths import held_by
from compile_policy_transformers.recipes import traceable_layers
from compile_policy_transformers.repeat import Step
from compile_policy_transformers.split_labels import SplitLabels

_IDS, _MASK = "input_ids", "attention_mask"
_COLLECTS = ("output_hidden_states", "output_attentions", "output_cross_attentions", "output_router_logits")


class SplitDecoderBinder(DecoderBinder):
    """Binds calls of one decoder instance to the graph of its layers.

    Attributes:
        runs_parts: binding runs what comes before the layers, eager.
    """

    runs_parts = True

    def __init__(self, decoder: nn.Module, parts: Parts) -> None:
        super().__init__(decoder)
        self.parts = parts
        self.labels = SplitLabels()
        self.traced = _dispatched(parts, type(decoder).forward, frozenset(self.parameters))

    @contextmanager
    def tracing(self, module: nn.Module) -> Iterator[None]:
        attends = attention.traced_with(attention.configs_below(module), self.masks.implementation)
        vars(module)["forward"] = MethodType(self.traced, module)
        try:
            with attends, traceable_layers(module), self.recurrent.tracing():
                yield
        finally:
            del vars(module)["forward"]

    def bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        own = vars(module).get("forward")  # its own while another thread captures
        if inspect.unwrap(type(module).forward) is not self.parts.forward or (
            own is not None and getattr(own, "__func__", None) is not self.traced
        ):
            raise NotCompilable("its forward was replaced", remedy="Take the policy off and apply it again.")
        values = self._by_name(args, kwargs)
        self._check(values)
        ids = values.get(_IDS)
        if ids is not None and values.get("inputs_embeds") is not None:
            raise NotCompilable("both input_ids and inputs_embeds were given")
        known = dict(values)
        embeds = self._embeds(module, known)
        batch, length = embeds.shape[:2]
        if length == 0:
            raise NotCompilable("a call without tokens")
        known[_IDS] = ids
        cache = self._cache(module, known, embeds)
        if isinstance(cache, EncoderDecoderCache):
            raise NotCompilable("it has a cache of an encoder beside its own")
        given = {**values, self.cache_name: cache, "use_cache": known["use_cache"]}
        if _MASK in self.parts.given and given.get(_MASK) is None:  # read by the layers: one that hides nothing
            held = 0 if cache is None else held_by(cache)
            given[_MASK] = torch.ones((batch, held + length), dtype=torch.long, device=embeds.device)
        stand_in, masks = _with_dense_masks(module, self.masks.implementation)
        local = self.parts.before(stand_in, **given)
        masks += [mask for mask in _each(given.get(_MASK)) if mask.dim() in (2, 4)]
        form = _Form(batch, length, cache, masks)
        into = {name: form.of(local[name]) for name in sorted(self.parts.given & local.keys())}

        def finish(out: Mapping[str, Any]) -> Any:
            left = {**local, **out}
            return self.parts.behind(module, **{name: left[name] for name in self.parts.used & left.keys()})

        label = self.labels.of(into, batch, length, form.masks, cache)
        return Bound(into, label, {}, {"batch": 2, "sequence": 3}, boundary=length > 1, finish=finish)

    def _shapes_after(self, module: nn.Module, call: Mapping[str, Any]) -> list[cache_layers.LayerShape]:
        if call.get(_IDS) is None:
            return super()._shapes_after(module, call)
        cache = cache_layers.fresh_cache(self.config, False)
        given = {name: value for name, value in call.items() if name != "inputs_embeds"}  # made of the tokens again
        given |= {self.cache_name: cache, "use_cache": True}
        probed(module, lambda: module.forward(**given), owned=[cache])
        return cache_layers.layer_shapes(cache)

    def _check(self, values: dict[str, Any]) -> None:
        """Raises NotCompilable for a call whose result is not what the parts make."""
        asked = [name for name in _COLLECTS if values.get(name) or getattr(self.config, name, False)]
        if asked:
            remedy = f"Call it without {' and '.join(asked)}."
            raise NotCompilable("the outputs of its layers are asked for, and they are inside the graph", remedy=remedy)
        wanted = values.pop("return_dict", None)
        if wanted is False or (wanted is None and getattr(self.config, "return_dict", True) is False):
            raise NotCompilable("a tuple is asked for", remedy="Call it without return_dict=False.")

    def step(self, kwargs: dict[str, Any], here: tuple[Any, ...]) -> Step | None:
        """None is shorter: what comes before the layers has to run."""
        return None

    def ran(self, module: nn.Module, kwargs: dict[str, Any], call: Call, entry: Entry, here: tuple[Any, ...]) -> None:
        pass


def _dispatched(parts: Parts, forward: Callable[..., Any], parameters: frozenset[str]) -> Callable[..., Any]:
    """The layers for what `SplitDecoderBinder.bind` made; threads that run the module meanwhile get ``forward``."""
    layers = compat.quietly(parts.layers)
    names = parts.given

    def dispatched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if args or not names.issuperset(kwargs) or parameters.issuperset(kwargs):
            return forward(self, *args, **kwargs)
        return layers(self, **{name: _own(value) for name, value in kwargs.items()})

    return dispatched


def _own(value: Any) -> Any:
    """A container that the layers may change; what they make of it, they return."""
    return list(value) if type(value) is list else dict(value) if type(value) is dict else value


class _WithConfig:
    """Stands for a module, with another configuration; nothing of the module is changed for other threads.

    Its methods see that configuration too, but for those that ask for their base class, which want the module itself.
    """

    def __init__(self, module: nn.Module, config: Any) -> None:
        self.__dict__["_module"], self.__dict__["config"] = module, config

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.__dict__["_module"], name)
        own = isinstance(found, MethodType) and found.__self__ is self.__dict__["_module"]
        code = getattr(inspect.unwrap(found.__func__), "__code__", None) if own else None
        return found if code is None or "__class__" in code.co_freevars else MethodType(found.__func__, self)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_module"], name, value)


def _with_dense_masks(module: nn.Module, implementation: str) -> tuple[Any, list[torch.Tensor]]:
    """``module``, whose masks are made whether they hide anything or not, and the list that they are put down in."""
    config: Any = copy.copy(module.config)
    made: list[torch.Tensor] = []
    config._attn_implementation_internal = attention.NOTED
    setattr(config, attention.NOTED_AS, implementation)
    setattr(config, attention.NOTED_MASKS, made)
    return _WithConfig(module, config), made


def _each(mask: Any) -> list[torch.Tensor]:
    """The masks among an argument."""
    return [m for m in (mask.values() if isinstance(mask, Mapping) else [mask]) if isinstance(m, torch.Tensor)]


class _Form:
    """The one form in which local variables go into the graph: in all rows, the cache as a call's, masks arranged.

    Attributes:
        masks: ``id`` of those tensors that say which keys of the cache are seen.
    """

    def __init__(self, batch: int, length: int, cache: Cache | None, masks: list[torch.Tensor]) -> None:
        self.batch, self.length, self.cache = batch, length, cache
        self.carrier = None if cache is None else caches.CacheCall(cache, length)
        self._given = {id(mask) for mask in masks if mask is not None}
        self._told = any(mask is not None and mask.dim() == 4 for mask in masks)
        layers: list[Any] = [] if cache is None else list(cache.layers)
        self._keys = {length, *(int(layer.get_mask_sizes(length)[0]) for layer in layers)}
        self.masks: set[int] = set()

    def of(self, value: Any, kind: str = "") -> Any:
        """``value`` in that form; ``kind``: of the layers that it is for, in a mapping by kinds of layers."""
        if value is self.cache and value is not None:
            return self.carrier
        if isinstance(value, torch.Tensor):
            return self._tensor(value, kind)
        if isinstance(value, (list, tuple)):
            return type(value)([self.of(v, kind) for v in value])
        if type(value) is dict:
            return {k: self.of(v, str(k)) for k, v in value.items()}
        return value

    def _tensor(self, value: torch.Tensor, kind: str) -> torch.Tensor:
        is_mask = id(value) in self._given or (not self._told and self._looks_like_a_mask(value))
        if value.dim() > 1 and value.shape[0] == 1 < self.batch and (is_mask or value.shape[1] == self.length):
            value = value.expand(self.batch, *value.shape[1:])
        if is_mask and value.dim() == 4:
            value = arranged(value, self.cache, sliding=kind in SLIDING or (not kind and all_sliding(self.cache)))
        if is_mask:
            self.masks.add(id(value))
        return value

    def _looks_like_a_mask(self, value: torch.Tensor) -> bool:
        """For a decoder that makes its masks itself."""
        return value.dim() == 4 and value.shape[2] == self.length and value.shape[3] in self._keys
