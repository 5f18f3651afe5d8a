"""Which dims vary of what a decoder hands to its layers, told by size: its local variables have any name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache

from compile_policy.shapes import Labels
from compile_policy_transformers.decoder_labels import DecoderLabels

Label = Callable[[str, torch.Tensor], Labels]
#: Stands for the labels of a mask, which the cache tells.
_MASK: Labels = ("mask",)


class SplitLabels:
    """Labels of local variables, remembered by name: one token has the size of anything that there is one of.

    A dim is a batch in the first place, a sequence elsewhere, where the size says so; the last dim of numbers
    holds features; any other varies by itself, together with the dims of its size in the call that was looked at. What
    a size was mistaken for costs a graph: what is equal by accident is a condition of the graph that was made then.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[str, int], Labels] = {}

    def of(self, values: Mapping[str, Any], batch: int, length: int, masks: set[int], cache: Cache | None) -> Label:
        """Labels of the tensors in ``values`` by their path.

        Args:
            masks: ``id`` of those that say which keys are seen: (batch, 1, sequence, keys), or (batch, keys).
        """
        tensors = dict(_tensors(values))
        fresh = _told_by_size(tensors, batch, length, masks)
        found: dict[str, Labels] = {}
        for path, tensor in tensors.items():
            names = _MASK if id(tensor) in masks else self.known.get((path, tensor.dim()))
            if names is None or not _fits(names, tensor, {"batch": batch, "sequence": length}):
                names = fresh[path]
                if length > 1:
                    self.known[path, tensor.dim()] = names
            found[path] = names
        as_masks = DecoderLabels(batch, length, cache, padding=True)

        def label(path: str, tensor: torch.Tensor) -> Labels:
            names = found[path]
            kind = path.removeprefix(path.split("[")[0])
            return as_masks(f"attention_mask{kind}", tensor) if names == _MASK else names

        return label


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in plain containers, by the path that it has in a call."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif type(value) is dict:
        for key, item in value.items():
            yield from _tensors(item, f"{path}[{key!r}]" if path else key)
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{path}[{i}]")


def _fits(names: Labels, tensor: torch.Tensor, sizes: Mapping[str, int]) -> bool:
    pairs = zip(names, tensor.shape, strict=False)
    return all(sizes.get(name or "", size) == size for name, size in pairs)


def _told_by_size(tensors: Mapping[str, torch.Tensor], batch: int, length: int, masks: set[int]) -> dict[str, Labels]:
    own: dict[int, str] = {}
    return {
        path: _MASK if id(t) in masks else tuple(_names(path, t, batch, length, own)) for path, t in tensors.items()
    }


def _names(path: str, t: torch.Tensor, batch: int, length: int, own: dict[int, str]) -> Iterator[str | None]:
    """The label of each dim of a tensor; ``own`` has those of sizes that are neither batch nor sequence."""
    last = t.dim() - 1
    seen_by = t.dim() == 4 and t.shape[1] == 1 and t.shape[2] == length  # (batch, 1, sequence, what is seen)
    for i, size in enumerate(t.shape):
        features = i == last and t.is_floating_point() and not seen_by
        if i == 0 and size == batch:
            yield "batch"
        elif size == length and (i == 2 or not seen_by) and not (features and last > 1):
            yield "sequence"
        elif features or size == 1 or (last == 3 and i == 1):
            yield None
        else:
            yield own.setdefault(size, f"{path}.{i}")
