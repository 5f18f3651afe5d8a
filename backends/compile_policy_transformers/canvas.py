"""Decoders of block diffusion: all tokens of a canvas at once, beside the states that an encoder left in a cache.

Such a decoder reads the cache and writes none. In the graph the cache is keys and values by layer; the canvas, what is
believed of it so far (zero where nothing is), positions and dense masks are given in every call, whatever the caller
gave, so that the first step of denoising, the later ones, padding and none are one graph.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

from compile_policy.adapters import Leaves, register_adapter
from compile_policy.binder import Bound
from compile_policy.errors import NotCompilable
from compile_policy.proof import form_of
from compile_policy.shapes import Labels
from compile_policy_transformers import attention, cache_layers, caches, compat
from compile_policy_transformers.cache_argument import cache_name, cache_parameter, name_cache
from compile_policy_transformers.recipes import traceable_layers

_IDS, _LOGITS, _BELIEVED = "decoder_input_ids", "self_conditioning_logits", "self_conditioning_mask"
_MASK, _POSITIONS = "decoder_attention_mask", "decoder_position_ids"
_MAKE_MASKS = "create_diffusion_decoder_attention_mask"
#: How a layer is kept -> label of its length.
_LENGTHS = {
    "dynamic": caches.PAST,
    "sliding": caches.SLIDING_PAST,
    "static": caches.SLOTS,
    "static_sliding": caches.SLIDING_SLOTS,
}


def reads_a_canvas(decoder: torch.nn.Module) -> bool:
    """Whether a decoder is of this kind: told by its arguments."""
    names = inspect.signature(decoder.forward).parameters
    known = {_IDS, _LOGITS, _BELIEVED, _MASK, _POSITIONS} <= set(names)
    return known and cache_parameter(_forward(decoder)) is not None and hasattr(decoder, _MAKE_MASKS)


def _forward(decoder: torch.nn.Module) -> Any:
    return inspect.unwrap(type(decoder).forward)


class ReadLayer:
    """A layer of the cache inside a trace."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, cumulative_length: torch.Tensor | None) -> None:
        self.keys, self.values, self.device = keys, values, keys.device
        self.cumulative_length = cumulative_length


class ReadCache:
    """A cache inside a trace, of which only ``layers`` are read.

    Attributes:
        is_compileable: the layers have slots, of which ``cumulative_length`` are taken.
    """

    def __init__(self, layers: list[ReadLayer], is_compileable: bool) -> None:
        self.layers, self.is_compileable = layers, is_compileable


@dataclass(frozen=True)
class ReadCall:
    """A cache that a call reads only."""

    cache: Cache

    def kind(self, layer: int) -> str:
        """How a layer is kept.

        Raises:
            NotCompilable: in a way that no graph reads, or it holds nothing.
        """
        held: Any = self.cache.layers[layer]
        kind = cache_layers.kind_of(held)
        if kind not in _LENGTHS:
            raise cache_layers.unknown(type(held))
        if held.keys is None or held.keys.dim() != 4:
            raise NotCompilable("a layer of the cache holds no states yet")
        return kind


class _ReadAdapter:
    def flatten(self, value: ReadCall, out: Leaves, path: str) -> Any:
        cache: Any = value.cache
        if cache.offloading:
            raise NotCompilable("the cache is offloaded", remedy="Use a cache that stays on the device.")
        kinds = []
        for i, layer in enumerate(cache.layers):
            kinds.append(kind := value.kind(i))
            for name in ("keys", "values"):
                labels = ("batch", None, _LENGTHS[kind], None)
                out.add(getattr(layer, name), f"{path}.layers[{i}].{name}", labels)
            if cache.is_compileable:
                count = layer.cumulative_length
                out.add(count, f"{path}.layers[{i}].cumulative_length", (), filler=_zero)
        return (bool(cache.is_compileable), tuple(kinds))

    def rebuild(self, spec: Any, leaves: Iterator[torch.Tensor]) -> ReadCache:
        counted, kinds = spec
        layers = [ReadLayer(next(leaves), next(leaves), next(leaves) if counted else None) for _ in kinds]
        return ReadCache(layers, counted)

    def state(self, spec: Any, value: ReadCache) -> list[torch.Tensor]:
        return []

    def write_back(self, spec: Any, value: ReadCall, state: list[torch.Tensor]) -> None:
        return None

    def public(self, value: ReadCall) -> Cache:
        return value.cache


def _zero(sizes: Mapping[str, int], shape: Sequence[int]) -> torch.Tensor:
    return torch.zeros(tuple(shape), dtype=torch.long)


register_adapter(ReadCall, _ReadAdapter())


@cache
def _stands_in(word: str, classes: frozenset[type]) -> bool:
    """Whether the code of some class names an argument; what has no source may."""
    try:
        return any(re.search(rf"\b{word}\b", inspect.getsource(cls)) for cls in classes)
    except (OSError, TypeError):
        return True


class CanvasBinder:
    """Binds calls of one such decoder."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        config: Any = decoder.config
        self.parameters = tuple(inspect.signature(decoder.forward).parameters)
        self.cache_name = cache_name(_forward(decoder))
        self.classes = frozenset(type(part) for part in decoder.modules())
        self.config = config
        self.text: Any = config.get_text_config()
        self.dense_config = copy.copy(self.text)
        self.dense_config._attn_implementation_internal = attention.DECODER
        self.dense_config.canvas_length = getattr(self.config, "canvas_length", None)

    @contextmanager
    def tracing(self, module: torch.nn.Module) -> Iterator[None]:
        attends = attention.traced_with(attention.configs_below(module), attention.DECODER)
        with compat.output_capturing(module), attends, traceable_layers(module):
            yield

    def bind(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        values = self._by_name(args, kwargs)
        values.pop("use_cache", None)  # it never writes one
        for name in [n for n, v in values.items() if n not in self.parameters and isinstance(v, torch.Tensor)]:
            if name not in FlashAttentionKwargs.__annotations__ and not _stands_in(name, self.classes):
                del values[name]  # the encoder's, handed on to both
        ids, cache = values.get(_IDS), values.get(self.cache_name)
        if not isinstance(ids, torch.Tensor) or not isinstance(cache, Cache) or not cache.layers:
            raise NotCompilable("a call without a canvas, or without a cache to read")
        batch, length = ids.shape
        call = ReadCall(cache)
        kinds = {name: call.kind(i) for i, name in reversed(list(enumerate(self.text.layer_types)))}
        if values.get(_POSITIONS) is None:
            values[_POSITIONS] = (torch.arange(length, device=ids.device) + cache.get_seq_length(layer_idx=0))[None]
        values[_POSITIONS] = values[_POSITIONS].long().expand(batch, length)
        values[_MASK] = self._masks(module, values.get(_MASK), ids, cache)
        self._believed(module, values, ids)
        values[self.cache_name] = call
        ordered = {name: values[name] for name in sorted(values) if values[name] is not None}
        return Bound(ordered, _Labels(kinds), sizes={"batch": 2, "sequence": 3})

    def form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, torch.Tensor | None]:
        """Kinds of the arguments, whether the mask hides anything, whether the cache is beyond the window."""
        values = self._by_name(args, kwargs)
        mask, cache, ids = values.get(_MASK), values.get(self.cache_name), values.get(_IDS)
        masks = mask.values() if isinstance(mask, Mapping) else (mask,)
        hides = any(isinstance(m, torch.Tensor) and not bool(m.all()) for m in masks)
        window = getattr(self.text, "sliding_window", None) or 0
        beyond = isinstance(cache, Cache) and int(cache.get_seq_length()) > window
        one = isinstance(ids, torch.Tensor) and ids.shape[0] == 1
        return (form_of(values), hides, beyond, one), None

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        values = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        name_cache(values, self.cache_name, dict.fromkeys(self.parameters))
        return values

    def _believed(self, module: Any, values: dict[str, Any], ids: torch.Tensor) -> None:
        """Logits of the step before; zero times zero where there was none."""
        logits, believed = values.get(_LOGITS), values.get(_BELIEVED)
        if logits is None:
            weight = module.get_input_embeddings().weight
            logits = torch.zeros((*ids.shape, weight.shape[0]), dtype=torch.float32, device=ids.device)
            believed = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        elif believed is None:
            believed = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
        values[_LOGITS], values[_BELIEVED] = logits.float(), believed.to(torch.bool)

    def _masks(self, module: Any, given: Any, ids: torch.Tensor, cache: Cache) -> dict[str, torch.Tensor]:
        """Kind of layers -> its mask (batch, 1, canvas, held + canvas), made where the decoder would leave it out."""
        batch, length = ids.shape
        if not isinstance(given, Mapping):
            dummy = torch.empty((batch, length, 0), device=ids.device)  # read for its sizes alone
            make = getattr(module, _MAKE_MASKS)
            named = {cache_name(make): cache, "decoder_attention_mask": given}
            given = make(config=self.dense_config, inputs_embeds=dummy, **named)
        made = {}
        for i, name in enumerate(self.text.layer_types):
            if name in made:
                continue
            layer: Any = cache.layers[i]
            keys = layer.keys.shape[2] + length
            mask = given.get(name)
            if mask is None:
                mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=ids.device).expand(batch, 1, length, keys)
            if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.shape[-1] != keys:
                raise NotCompilable("an attention mask that does not fit the cache and the canvas")
            made[name] = mask.expand(batch, mask.shape[1], length, keys)
        return {name: made[name] for name in sorted(made)}


class _Labels:
    """Labels of the tensor arguments; those of the cache are its adapter's.

    Args:
        kinds: kind of layers -> how they are kept.
    """

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self.kinds = kinds

    def __call__(self, path: str, tensor: torch.Tensor) -> Labels:
        if path.startswith(_MASK):
            kind = next(kind for name, kind in self.kinds.items() if f"'{name}'" in path)
            return ("batch", None, "sequence", f"{_LENGTHS[kind]}+sequence")
        if path in (_IDS, _POSITIONS, _LOGITS):
            return ("batch", "sequence", *(None,) * (tensor.dim() - 2))
        return ("batch",) if path == _BELIEVED else (None,) * tensor.dim()
