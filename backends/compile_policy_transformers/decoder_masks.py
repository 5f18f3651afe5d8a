"""The mask of a decoder's call, always given and always dense, whatever the caller gave."""

from __future__ import annotations

import ast
import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache, StaticLayer
from transformers.masking_utils import create_causal_mask, create_masks_for_generate

from compile_policy.errors import NotCompilable
from compile_policy_transformers import attention
from compile_policy_transformers.known_code import tree_of
from compile_policy_transformers.own_masks import OwnMasks, has_kinds_of_its_own

_CAUSAL = "create_causal_mask"
_PREPARES = "_prepare_decoder_attention_mask"
_BIDIRECTIONAL = "use_bidirectional_attention"


class DecoderMasks:
    """Makes the masks of one decoder.

    Attributes:
        implementation: the attention that the decoder is traced with. One that writes its attention out adds the mask
            to the scores, so that it has to be additive; so has one that is lengthened by numbers.
        create: makes masks from a configuration, ``dense_config`` for dense ones.
    """

    def __init__(self, decoder: torch.nn.Module) -> None:
        config: Any = decoder.config
        self.config = config
        dense = _calls_attention(decoder) and not _lengthens_mask(decoder)
        self.implementation = attention.DECODER if dense else attention.ADDITIVE
        self.dense_config: Any = copy.copy(config)
        self.dense_config._attn_implementation_internal = self.implementation
        self.create: Callable[..., Any] = create_masks_for_generate
        self.own = OwnMasks(decoder) if has_kinds_of_its_own(config) else None
        names = inspect.unwrap(type(decoder).forward).__code__.co_names
        self._makes_own = _BIDIRECTIONAL in names
        # A window in the configuration may be the attention's alone: what counts is the mask that its forward makes.
        windowed = getattr(config, "sliding_window", None) is not None and not hasattr(config, "layer_types")
        others = any("sliding_window" in name or "chunk" in name for name in names) or hasattr(config, _BIDIRECTIONAL)
        self._no_window = windowed and _CAUSAL in names and not others

    def created(
        self,
        mask: torch.Tensor | None,
        embeds: torch.Tensor,
        cache: Cache | None,
        text: torch.Tensor | None,
        *,
        passed: bool = False,
    ) -> Any:
        """Dense masks, where Transformers would make some or leave them out: one, or one per layer type.

        Args:
            mask: (batch, keys) padding, or none.
            embeds: (batch, sequence, hidden size).
            text: positions by which packed sequences are recognised.
            passed: the caller had made masks and left these out.
        """
        if self.own is not None and not isinstance(mask, Mapping):
            return self.own.made(self.dense_config, embeds, mask, cache, text)
        if self._no_window and not isinstance(mask, Mapping):
            return create_causal_mask(self._config_for(embeds), embeds, mask, cache, position_ids=text)
        made = self.create(self._config_for(embeds), embeds, mask, cache, position_ids=text)
        if embeds.shape[1] == 1 or getattr(self.config, _BIDIRECTIONAL, False) not in (True, "all"):
            return made  # a single token has no future to see
        if self._makes_own:
            raise NotCompilable("its attention is bidirectional, and the model gave no mask for this call")
        # Its attention is causal by the mask alone: where Transformers skips that, every token sees every other.
        stock = None if passed else self.create(self.config, embeds, mask, cache, position_ids=text)
        if isinstance(made, Mapping):
            stock = stock or {}
            return {name: torch.ones_like(m) if stock.get(name) is None else m for name, m in made.items()}
        return torch.ones_like(made) if stock is None else made

    def _config_for(self, embeds: torch.Tensor) -> Any:
        """``dense_config``, with causal marks in place of masks for a long prompt that wants no gradients."""
        marked = self.implementation == attention.DECODER and embeds.shape[1] >= attention.MARKED_FROM
        if not marked or torch.is_grad_enabled() or torch.is_autocast_enabled(embeds.device.type):
            return self.dense_config
        config = copy.copy(self.dense_config)
        setattr(config, attention.MARKS, True)
        return config


def prepares_own(decoder: torch.nn.Module) -> bool:
    """Whether the decoder prepares its mask by a method of its own, which branches on whether there is one token.

    Kosmos-2 does, and BART's kind did before Transformers 4.56, whose decoders outside Transformers still do.
    """
    return hasattr(decoder, _PREPARES) and _PREPARES not in vars(decoder)


def prepared(decoder: Any, given: Any, embeds: torch.Tensor, cache: Cache | None) -> torch.Tensor:
    """The mask (batch, 1, sequence, keys) that the decoder's own method makes, numbers to add to the scores."""
    seen = int(cache.get_seq_length()) if cache is not None else 0
    made: torch.Tensor | None = getattr(decoder, _PREPARES)(given, embeds.shape[:2], embeds, seen)
    return embeds.new_zeros(embeds.shape[0], 1, embeds.shape[1], seen + embeds.shape[1]) if made is None else made


@contextmanager
def as_prepared(decoder: torch.nn.Module) -> Iterator[None]:
    """Let such a decoder take the mask that was `prepared` as it is."""
    if not prepares_own(decoder):
        yield
        return
    own = vars(decoder)
    own[_PREPARES] = lambda attention_mask, *args, **kwargs: attention_mask
    try:
        yield
    finally:
        del own[_PREPARES]


def _calls_attention(decoder: torch.nn.Module) -> bool:
    """Whether the decoder's layers go through Transformers' attention interface, which takes masks of any kind."""
    modules = {type(part).__module__ for part in decoder.modules()}
    return any("ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[name]) for name in modules if name in sys.modules)


def _lengthens_mask(decoder: torch.nn.Module) -> bool:
    """Whether layers that are handed masks of numbers alone put more numbers behind them (DeepSeek V4)."""
    if getattr(decoder, "_supports_sdpa", True):  # which has boolean ones
        return False
    classes = {type(part) for part in decoder.modules() if not type(part).__module__.startswith("torch.")}
    return any(_lengthens(tree_of(cls.forward)) for cls in classes)


def _lengthens(tree: ast.Module | None) -> bool:
    calls = [] if tree is None else [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    joins = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in ("cat", "pad")]
    named = (node for call in joins for node in ast.walk(call) if isinstance(node, ast.Name))
    return any(node.id == "attention_mask" for node in named)


def padding_mask(given: Any, embeds: torch.Tensor, cache: Cache | None, dtype: torch.dtype) -> torch.Tensor:
    """(batch, keys): which keys are no padding; slots of a static cache that are still empty count as padding."""
    if given is not None and not (isinstance(given, torch.Tensor) and given.dim() == 2):
        raise NotCompilable("it reads the padding mask, and was given a mask of another form")
    batch, length = embeds.shape[:2]
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    layer: Any = own.layers[0] if own is not None else None
    static = isinstance(layer, StaticLayer)
    keys = length if layer is None else layer.max_cache_len if static else layer.get_seq_length() + length
    if given is None:
        return torch.ones((batch, keys), dtype=dtype, device=embeds.device)
    return torch.nn.functional.pad(given, (0, keys - given.shape[1])) if static else given


def as_boolean(masks: Mapping[str, Any]) -> dict[str, Any]:
    """Prepared masks with those of them boolean that open and close and do nothing else."""
    return {name: _boolean(mask) if isinstance(mask, torch.Tensor) else mask for name, mask in masks.items()}


def _boolean(mask: torch.Tensor) -> torch.Tensor:
    if not mask.is_floating_point():
        return mask
    closed = mask <= torch.finfo(mask.dtype).min / 2
    return ~closed if bool(((mask == 0) | closed).all()) else mask


def padding_of(mask: torch.Tensor, cache: Cache | None) -> torch.Tensor:
    """(batch, keys), false for padding, of a prepared mask (batch, 1, sequence, keys) that is causal besides.

    Raises:
        NotCompilable: the mask says more than that.
    """
    open_ = mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min / 2
    padding = open_[:, 0, -1]
    seen = 0 if cache is None else int(cache.get_seq_length())
    queries = torch.arange(mask.shape[2], device=mask.device) + seen
    causal = torch.arange(mask.shape[3], device=mask.device) <= queries[:, None]
    if not torch.equal(open_, (padding[:, None] & causal)[:, None]):
        raise NotCompilable("it reads the padding mask, and was given one that hides more than padding")
    return padding


def with_mask(given: Any, embeds: torch.Tensor, cache: Cache | None) -> Callable[[Any], Any]:
    """What puts the caller's mask into the result of a decoder that returns it: a graph's has room for empty slots.

    Args:
        given: the mask of the call; made as such a decoder makes it where there is none.
    """
    batch, length = embeds.shape[:2]
    seen = 0 if cache is None else int(cache.get_seq_length())
    mask = torch.ones((batch, seen + length), device=embeds.device) if given is None else given

    def finish(result: Any) -> Any:
        if "attention_mask" in result:
            result["attention_mask"] = mask
        return result

    return finish
