"""Which dims of a decoder's arguments are what: the labels of a call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, StaticLayer

from compile_policy.shapes import Labels
from compile_policy_transformers import cache_moves, caches
from compile_policy_transformers.cache_masks import SLIDING, all_sliding
from compile_policy_transformers.deepstack import FEATURES

#: Argument and number of its dims -> their labels.
_NAMED: dict[tuple[str, int], Labels] = {
    ("encoder_hidden_states", 3): ("batch", caches.ENCODED, None),
    ("encoder_attention_mask", 2): ("batch", caches.ENCODED),
    ("encoder_attention_mask", 4): ("batch", None, "sequence", caches.ENCODED),
    # mllama: what the picture gave, and which text may see which tile of it
    ("cross_attention_states", 3): ("batch", caches.ENCODED, None),
    ("cross_attention_mask", 4): ("batch", None, "sequence", caches.ENCODED),
    ("full_text_row_masked_out_mask", 4): ("batch", None, "sequence", None),
}


class DecoderLabels:
    """Labels of a decoder's tensor arguments: by name where the name says it, else by size.

    Args:
        kinds: of the decoder's layers, by which it finds their masks.
        alike: arguments that are the same for all rows.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        cache: Cache | None,
        *,
        padding: bool = False,
        kinds: Sequence[str] = (),
        alike: Sequence[str] = (),
    ) -> None:
        self.batch, self.length, self.padding, self.alike = batch, length, padding, alike
        self.cached = cache is not None
        layers = cache.layers if cache is not None else []
        self.static = any(isinstance(layer, StaticLayer) for layer in layers)
        self.has_sliding = any(getattr(layer, "is_sliding", False) for layer in layers)
        self.all_sliding = all_sliding(cache)
        moved = {} if cache is None else cache_moves.groups(cache)
        self.moved = {kinds[i] if i < len(kinds) else "": group for i, group in reversed(moved.items())}
        self.all_moved = len(moved) == len(layers) > 0

    def __call__(self, path: str, tensor: torch.Tensor) -> Labels:
        name = path.split("[")[0]
        if name == "attention_mask" and tensor.dim() == 4:
            heads = None if tensor.shape[1] == 1 else "mask_heads"
            return ("batch", heads, "sequence", self._keys(path))
        if path == "attention_mask" and self.padding:
            return ("batch", self._keys(path))
        if name == "position_ids":
            return (*(None,) * (tensor.dim() - 2), "batch", "sequence")
        if (name, tensor.dim()) in _NAMED and "[" not in path:
            return _NAMED[name, tensor.dim()]
        if name in self.alike:
            return (None,) * tensor.dim()
        if name in FEATURES:
            return ("visual_tokens", *(None,) * (tensor.dim() - 1))
        return self._by_size(tensor)

    def _keys(self, path: str) -> str:
        moved = next((group for kind, group in self.moved.items() if f"'{kind}'" in path), None)
        if moved is None and self.all_moved and path == "attention_mask":
            moved = next(iter(self.moved.values()))
        if moved is not None:
            return cache_moves.seen_label(moved)
        sliding = any(f"'{kind}'" in path for kind in SLIDING) or (self.all_sliding and path == "attention_mask")
        if not self.cached:
            return "sequence"
        if sliding and self.has_sliding:
            return f"{caches.SLIDING_SLOTS}+sequence" if self.static else f"{caches.SLIDING_PAST}+sequence"
        return caches.SLOTS if self.static else f"{caches.PAST}+sequence"

    def _by_size(self, tensor: torch.Tensor) -> Labels:
        labels: list[str | None] = [None] * tensor.dim()
        if tensor.dim() >= 2 and tensor.shape[0] == self.batch:
            labels[0] = "batch"
        if tensor.dim() >= 2 and tensor.shape[1] == self.length:
            labels[1] = "sequence"
        if tensor.dim() == 1 and tensor.shape[0] == self.length:
            labels[0] = "sequence"
        return tuple(labels)
