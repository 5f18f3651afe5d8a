"""How a call of a language decoder becomes canonical.

``generate`` calls a decoder in several forms: with ids or embeddings, with no mask, a 2D mask or prepared masks, with
a lazy cache or a filled one, with image features in the first call only. Each form would be a graph of its own; here
they become one: embeddings, an initialised cache, full position ids, a dense mask, features that may be empty.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from compile_policy.call_key import Call
from compile_policy.entry import Entry
from compile_policy.errors import NotCompilable
from compile_policy.failure import place_in
from compile_policy.proof import form_of
from compile_policy.region import Bound
from compile_policy.unseen import probed
from compile_policy_transformers import (
    attention,
    cache_checks,
    cache_layers,
    cache_moves,
    caches,
    compat,
    releases,
)
from compile_policy_transformers.cache_argument import cache_name, name_cache
from compile_policy_transformers.cache_masks import all_sliding, arranged, each_arranged, each_padded, mask_config
from compile_policy_transformers.cache_pairs import PairCall
from compile_policy_transformers.cache_states import is_linear
from compile_policy_transformers.cross_states import SeenStates, encoded_states
from compile_policy_transformers.decoder_labels import DecoderLabels
from compile_policy_transformers.decoder_masks import (
    DecoderMasks,
    as_boolean,
    as_prepared,
    padding_mask,
    padding_of,
    prepared,
    prepares_own,
    with_mask,
)
from compile_policy_transformers.decoder_rules import rule_of
from compile_policy_transformers.deepstack import DeepstackFeatures
from compile_policy_transformers.embedded import PICTURES, PLACES, with_pictures
from compile_policy_transformers.lengths import Lengths, held_by
from compile_policy_transformers.positions import OwnPositions
from compile_policy_transformers.recipes import traceable_layers
from compile_policy_transformers.recurrent_mixers import RecurrentDecoder
from compile_policy_transformers.repeat import DecodeSteps, Step
from compile_policy_transformers.token_ids import IDS, TokenIds, layers_read_ids, more_than_embeddings, takes_embeddings

#: Visual tokens are some of the example's 2 x 3 positions.
_EXAMPLE_SIZES = {"batch": 2, "sequence": 3, "visual_tokens": 5}
_NO_TOKENS = "Have its forward take inputs_embeds, in a subclass (compile_policy.layers.override, replace_layers_)."
_ONLY_IDS = "its layers read token ids, and it was given embeddings"
_IN_PLACE = "the graph writes the states of its cache in place, where gradients cannot go back through it"
#: First argument of a decoder that begins behind its embeddings (git).
_BEHIND = "hidden_states"
#: Decoding takes one token after the other.
_FREQUENT_SIZES = {"batch": 1, "sequence": 1}

_WEIGHTS = "output_attentions"
_ASKED_FOR_WEIGHTS = (
    "the decoder is asked for attention weights (output_attentions), which compiled attention leaves out"
)
_NO_WEIGHTS = "Leave output_attentions out of the calls that need no weights; those are compiled."


class DecoderBinder:
    """Binds calls of one decoder instance."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        config: Any = decoder.config
        self.config = config
        self.rule = rule_of(config)
        self.ids = TokenIds(decoder, self.rule)
        self.masks = DecoderMasks(decoder)
        self.kinds = tuple(getattr(config, "layer_types", None) or ())
        self.parameters = inspect.signature(decoder.forward).parameters
        behind = "inputs_embeds" not in self.parameters and next(iter(self.parameters), "") == _BEHIND
        self.embeds_name = _BEHIND if behind else "inputs_embeds"
        self.by_ids: bool | None = None  # not known yet
        self.only_ids = self.more_by_ids = False
        self.shapes: dict[torch.dtype, list[cache_layers.LayerShape]] = {}
        self.own_positions = OwnPositions(decoder)
        self.lengths = Lengths(config)
        self.cache_name = cache_name(inspect.unwrap(type(decoder).forward))
        self.steps = DecodeSteps(self.cache_name)
        self.features = DeepstackFeatures(decoder)
        self.seen = SeenStates(decoder)
        self.takes_pictures = PICTURES in self.parameters and PLACES in self.parameters
        self.recurrent = RecurrentDecoder(decoder)
        self.masks.dense_config = mask_config(config, stock=self.recurrent.stock_masks)
        self.masks.dense_config._attn_implementation_internal = self.masks.implementation
        self.masks.create = self.recurrent.make_masks

    def belongs_to(self, model: torch.nn.Module) -> None:
        """Learn what only the whole model knows: how many levels of visual features the decoder is handed."""
        self.features.count_of(model)

    @contextmanager
    def tracing(self, module: torch.nn.Module) -> Iterator[None]:
        attends = attention.traced_with(attention.configs_below(module), self.masks.implementation)
        own_code = traceable_layers(module)
        with compat.output_capturing(module), attends, as_prepared(module), own_code, self.recurrent.tracing():
            yield

    def bind(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        values = self._by_name(args, kwargs)
        weights = values.get(_WEIGHTS, getattr(getattr(module, "config", None), _WEIGHTS, False))
        if weights and self.masks.implementation == attention.DECODER and attention.is_eager(module):
            raise NotCompilable(_ASKED_FOR_WEIGHTS, remedy=_NO_WEIGHTS)
        tokens = values.get(IDS)
        embeds = self._embeds(module, values)
        if self.by_ids is None:
            self.only_ids = not takes_embeddings(module, self.embeds_name)
            self.by_ids = not self.only_ids and layers_read_ids(module)
            self.more_by_ids = not self.only_ids and not self.by_ids and more_than_embeddings(module)
        if self.only_ids:
            raise NotCompilable(f"{_forward_of(module)} takes token ids and no embeddings of them", remedy=_NO_TOKENS)
        if self.by_ids and tokens is None:
            raise NotCompilable(_ONLY_IDS)
        batch, length = embeds.shape[:2]
        if length == 0:
            raise NotCompilable("a call without tokens")
        self.ids.complete(values, tokens, embeds)
        if self.takes_pictures:
            embeds = values["inputs_embeds"] = with_pictures(embeds, values)
        cache = self._cache(module, values, embeds)
        if isinstance(cache, EncoderDecoderCache):
            encoded = values.get("encoder_hidden_states")
            given = None if encoded is None else encoded.shape[1]
            new = encoded_states(module, cache, values)
            values[self.cache_name], cache = PairCall(cache, length, given, new), cache.self_attention_cache
        else:
            seen = self.seen.complete(module, values, cache)
            if cache is not None:
                values[self.cache_name] = caches.CacheCall(cache, length, seen.read, seen.new)
        text = self._text_positions(values.get("position_ids"))
        if "position_ids" in self.parameters:
            own = self.own_positions.make(values, tokens, embeds, cache)
            values["position_ids"] = self.position_ids(
                values.get("position_ids") if own is None else own, embeds, cache
            )
        given_mask = values.get("attention_mask")
        if isinstance(given_mask, Mapping) and values.get("encoder_hidden_states") is not None:
            given_mask = as_boolean(given_mask)  # put beside masks of the encoder's output, which the graph has boolean
        if prepares_own(module):
            masks = prepared(module, given_mask, embeds, cache)
        else:
            masks = self._masks(given_mask, embeds, cache, text)
        if masks is not None:
            values["attention_mask"] = masks
        fillers = self.features.complete(values, embeds)
        label = DecoderLabels(
            batch, length, cache, padding=self.rule.padding_mask, kinds=self.kinds, alike=self.rule.alike
        )
        self._own_names(values, tokens, by_ids=self.by_ids or (self.more_by_ids and tokens is not None))
        ordered = {name: values[name] for name in sorted(values) if values[name] is not None}
        finish = with_mask(given_mask, embeds, cache) if self.rule.returns_mask else None
        return Bound(
            ordered, label, fillers, _EXAMPLE_SIZES, boundary=length > 1, frequent=_FREQUENT_SIZES, finish=finish
        )

    def form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, torch.Tensor | None]:
        """Kinds of the arguments; whether there is padding, one token, one row, an empty cache; which lengths it is
        beyond: each has its code."""
        values = self._by_name(args, kwargs)
        tokens = values.get("inputs_embeds") if values.get(IDS) is None else values[IDS]
        if tokens is None:
            return (form_of(values),), None  # binding says what is missing
        mask = values.get("attention_mask")
        rows = _counting_rows(mask, tokens.shape[1])
        padded = rows is not None or (isinstance(mask, torch.Tensor) and mask.dim() == 2 and not mask.all())
        cache: Any = values.get(self.cache_name)
        empty = cache is None or cache_layers.is_empty(cache)
        beyond = self.lengths.passed(tokens.shape[1] + (0 if empty else held_by(cache)))
        marked = tokens.shape[1] >= attention.MARKED_FROM  # whose mask may be a causal mark
        return (form_of(values), padded, tokens.shape[1] == 1, tokens.shape[0] == 1, empty, beyond, marked), rows

    def step(self, kwargs: dict[str, Any], here: tuple[Any, ...]) -> Step | None:
        """The short road: the single-token call that repeats the last one on its cache."""
        return self.steps.recognise(kwargs, here)

    def forget_steps(self) -> None:
        self.steps.forget()

    def ran(
        self, module: torch.nn.Module, kwargs: dict[str, Any], call: Call, entry: Entry, here: tuple[Any, ...]
    ) -> None:
        alike = (
            call.finish is None and self.embeds_name == "inputs_embeds" and not (self.own_positions or self.seen.layers)
        )
        alike = alike and self.embeds_name in call.values
        if alike and not isinstance(call.values.get(self.cache_name), PairCall):
            self.steps.remember(kwargs, call, entry, here, self, module)

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        values = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        name_cache(values, self.cache_name, self.parameters)
        if self.embeds_name in values:
            values["inputs_embeds"] = values.pop(self.embeds_name)
        return values

    def _own_names(self, values: dict[str, Any], tokens: torch.Tensor | None = None, *, by_ids: bool = False) -> None:
        """Name the arguments as the decoder does; ``by_ids``: of ``tokens``, or of any, in place of embeddings."""
        embeds = values.pop("inputs_embeds")
        if by_ids:
            values[IDS] = embeds.new_zeros(embeds.shape[:2], dtype=torch.long) if tokens is None else tokens
        else:
            values[self.embeds_name] = embeds

    @staticmethod
    def _embeds(module: torch.nn.Module, values: dict[str, Any]) -> torch.Tensor:
        ids = values.pop(IDS, None)
        embeds: torch.Tensor | None = values.get("inputs_embeds")
        if embeds is None:
            if ids is None:
                raise NotCompilable(
                    f"{_forward_of(module)} was called with neither input_ids nor inputs_embeds", remedy=_NO_TOKENS
                )
            embeds = module.get_input_embeddings()(ids)  # type: ignore[operator]
            values["inputs_embeds"] = embeds
        elif ids is not None:
            raise NotCompilable("both input_ids and inputs_embeds were given")
        return embeds

    def _cache(self, module: torch.nn.Module, values: dict[str, Any], embeds: torch.Tensor) -> Cache | None:
        cache = values.pop(self.cache_name, None)
        use_cache = values.pop("use_cache", None)
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", False)) and not releases.recomputes(module)
        if cache is None and use_cache:
            encoded = values.get("encoder_hidden_states") is not None
            cache = cache_layers.fresh_cache(self.config, encoded or self.config.is_encoder_decoder)
        if cache is None:
            values["use_cache"] = False
            return None
        if not isinstance(cache, Cache):
            raise NotCompilable(f"the cache is a {type(cache).__name__}, which is no Transformers Cache")
        cache_checks.check(cache)
        values["use_cache"] = use_cache
        if self.rule.wraps_cache and use_cache and isinstance(cache, DynamicCache):
            cache = EncoderDecoderCache(cache, DynamicCache(config=self.config))
        own: Cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if module.training and torch.is_grad_enabled() and any(map(is_linear, getattr(own, "layers", ()))):
            raise NotCompilable(_IN_PLACE, remedy="Call it with use_cache=False while it is trained.")
        if cache_layers.needs_initialisation(own, self.shapes.get(embeds.dtype)):
            shapes = self._layer_shapes(module, values, embeds)
            cache_moves.check_lazy(own, shapes)
            cache_layers.initialise(own, shapes, embeds.shape[0], embeds.device)
        found: Cache = cache
        return found

    def _layer_shapes(
        self, module: torch.nn.Module, values: Mapping[str, Any], embeds: torch.Tensor
    ) -> list[cache_layers.LayerShape]:
        """Learned once a dtype by an eager call: configurations name heads and dims in too many ways."""
        if embeds.dtype not in self.shapes:
            zeros = embeds.new_zeros(1, 2, embeds.shape[2])
            two_tokens = {"inputs_embeds": zeros, **self.ids.of(zeros)}
            try:
                self.shapes[embeds.dtype] = self._shapes_after(module, two_tokens)
            except Exception:  # it needs more than embeddings: the caller's call has all that
                whole = {**values, "inputs_embeds": embeds.clone()}
                if isinstance(whole.get("attention_mask"), Mapping):  # made for the call's own cache
                    del whole["attention_mask"]
                self.shapes[embeds.dtype] = self._shapes_after(module, whole)
        return self.shapes[embeds.dtype]

    def _shapes_after(self, module: torch.nn.Module, call: Mapping[str, Any]) -> list[cache_layers.LayerShape]:
        cache = cache_layers.fresh_cache(self.config, call.get("encoder_hidden_states") is not None)
        values = {**call, self.cache_name: cache, "use_cache": True}
        self._own_names(values, by_ids=bool(self.by_ids))
        probed(module, lambda: module.forward(**values), owned=[cache])
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        return cache_layers.layer_shapes(own, self.ids.first)

    def position_ids(self, ids: torch.Tensor | None, embeds: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """Position ids of every row and of every kind of position that the decoder has."""
        batch, length = embeds.shape[:2]
        if ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            ids = (torch.arange(length, device=embeds.device) + seen)[None]
        if ids.shape[-2] != batch:
            ids = ids.expand(*ids.shape[:-2], batch, length)
        if ids.dim() == 2 and self._rope_dims():
            ids = ids[None].expand(self._rope_dims(), batch, length)
        elif ids.dim() == 3 and ids.shape[0] == 1 and self._rope_dims():
            ids = ids.expand(self._rope_dims(), batch, length)  # text only: all three are the same
        elif ids.dim() == 3 and ids.shape[0] == self._rope_dims() + 1:
            # Row 0 repeats the text positions, which only say whether sequences are packed: the mask has that.
            ids = ids[1:]
        return ids

    def _rope_dims(self) -> int:
        """3 where positions are temporal, height and width (multimodal RoPE), or as many as there are; else 0."""
        rope = getattr(self.config, "rope_parameters", None) or getattr(self.config, "rope_scaling", None) or {}
        kinds = (rope, *(one for one in rope.values() if isinstance(one, Mapping)))  # one a kind of layers, or one
        sections = next((found for one in kinds if (found := one.get("mrope_section")) is not None), None)
        return 0 if sections is None else 4 if len(sections) == 4 else 3

    def _text_positions(self, ids: torch.Tensor | None) -> torch.Tensor | None:
        """The positions by which Transformers recognises packed sequences, as the models themselves hand them on."""
        if ids is None or not self._rope_dims():
            return ids
        return ids[0] if ids.dim() == 3 and ids.shape[0] == self._rope_dims() + 1 else None

    def _masks(self, given: Any, embeds: torch.Tensor, cache: Cache | None, text: torch.Tensor | None) -> Any:
        """Dense masks: one tensor, or one per layer type where the model keeps several."""
        if self.rule.padding_mask:
            if self.rule.only_hides and isinstance(given, torch.Tensor) and given.dim() == 4:
                given = padding_of(given, cache).to(self.rule.padding_dtype)
            return padding_mask(given, embeds, cache, self.rule.padding_dtype)
        if isinstance(given, torch.Tensor) and given.dim() == 4:
            if self.masks.implementation == attention.ADDITIVE:  # `generate` makes those of SDPA boolean
                given = attention.added(given, embeds.dtype)
            return arranged(given, cache, sliding=all_sliding(cache))
        if isinstance(given, Mapping):
            if any(mask is None for mask in given.values()):
                made = self.masks.created(None, embeds, cache, text, passed=True)
                given = {name: made.get(name) if mask is None else mask for name, mask in given.items()}
            return each_arranged(each_padded(given, embeds), cache)
        if given is not None and not (isinstance(given, torch.Tensor) and given.dim() == 2):
            raise NotCompilable(f"an attention mask of type {type(given).__name__} with an unknown layout")
        made = self.masks.created(given, embeds, cache, text)
        if isinstance(made, Mapping):
            made = each_padded(made, embeds)
            return self.recurrent.mask(made) if self.recurrent.alone else each_arranged(made, cache)
        return arranged(made, cache, sliding=all_sliding(cache))


def _forward_of(module: torch.nn.Module) -> str:
    return f"{type(module).__name__}.forward ({place_in(type(module).forward, 'def forward')})"


def _counting_rows(mask: Any, length: int) -> torch.Tensor | None:
    """(batch, sequence) positions that are no padding; ``None`` when all of them count."""
    if isinstance(mask, Mapping):
        mask = next((m for m in mask.values() if isinstance(m, torch.Tensor)), None)
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4):
        return None
    rows = mask[:, -length:].bool() if mask.dim() == 2 else _open(mask)[:, 0].any(-1)
    return None if bool(rows.all()) else rows


def _open(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min / 2
