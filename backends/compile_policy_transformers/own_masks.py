"""Masks of a decoder with kinds of layers that Transformers' own table of masks does not know.

``create_masks_for_generate`` leaves such masks to the decoder's forward. So that forward makes them: a stand-in runs it
with layers that take down what mask they are handed, and compute nothing.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING

from compile_policy.errors import NotCompilable
from compile_policy.shadow import with_layers
from compile_policy_transformers.cache_argument import cache_name
from compile_policy_transformers.cache_masks import mask_config

_LAYERS = "layers"


def has_kinds_of_its_own(config: Any) -> bool:
    """Whether a decoder has kinds of layers for which Transformers makes no masks before the call."""
    kinds = getattr(mask_config(config), "layer_types", None) or ()
    return any(kind not in LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING for kind in kinds)


class OwnMasks:
    """Makes the masks of one decoder by its own forward."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        self.decoder: Any = decoder

    def made(
        self,
        config: Any,
        embeds: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
        text: torch.Tensor | None,
    ) -> dict[str, Any]:
        """Kind of layers -> its mask.

        Args:
            config: says how masks are to look.
            embeds: (batch, sequence, hidden size), ``mask``: (batch, keys) padding, or none.
            text: (batch, sequence) positions, or none.

        Raises:
            NotCompilable: the decoder's layers are not where they are looked for, or are not handed masks by name.
        """
        kinds: Any = self.decoder.config.layer_types
        layers: Any = getattr(self.decoder, _LAYERS, None)
        if not isinstance(layers, torch.nn.ModuleList) or len(layers) != len(kinds):
            raise NotCompilable("it makes masks of its own kind for layers that were not found")
        taken: list[Any] = []
        last = len(layers) - 1
        noting = [_Noting(layer, taken, last=i == last) for i, layer in enumerate(layers)]
        stand_in = with_layers(self.decoder, _LAYERS, noting)
        stand_in.__dict__["config"] = config
        name = cache_name(inspect.unwrap(type(self.decoder).forward))
        given = {"attention_mask": mask, "position_ids": text, name: cache}
        try:
            stand_in.forward(inputs_embeds=embeds, **given, use_cache=cache is not None)
        except _Enough:
            return dict(zip(kinds, taken, strict=True))
        raise NotCompilable("it makes masks of its own kind, and does not run its layers in order")


class _Enough(Exception):
    """The last layer has its mask."""


class _Noting(torch.nn.Module):
    """Stands for a layer: takes down its mask, and hands on what came in."""

    def __init__(self, layer: torch.nn.Module, taken: list[Any], *, last: bool) -> None:
        super().__init__()
        self.__dict__.update(_layer=layer, _taken=taken, _last=last)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "attention_mask" not in kwargs:
            raise NotCompilable("it makes masks of its own kind, and its layers are not handed them by name")
        self._taken.append(kwargs["attention_mask"])
        if self._last:
            raise _Enough
        return hidden_states
