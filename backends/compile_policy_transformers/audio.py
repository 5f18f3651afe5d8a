"""Encoders of sound: one graph for every number and length of pieces.

Which dims of a call are pieces and which are frames is not written anywhere: the tower is run on pieces of another
length, and what it takes is dynamic. Some towers only take one length; others cut sound into chunks and pack them
with Transformers' layout functions, which then run before the graph as they do for pictures (`prologue`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from compile_policy.errors import NotCompilable
from compile_policy.example import Filler
from compile_policy.proof import form_of
from compile_policy.region import Bound
from compile_policy.shapes import UNBACKED, Labels
from compile_policy.unseen import probed
from compile_policy_transformers import attention, compat
from compile_policy_transformers.padding_caches import ARGUMENT, PaddingCaches
from compile_policy_transformers.prologue import Prologue, layout_functions, learn
from compile_policy_transformers.size_twins import sizes_together
from compile_policy_transformers.sound_examples import sound_examples
from compile_policy_transformers.unread import without_unread

PIECES = "sounds"
#: Where pieces are cut up and packed, a single one is no special case for any tower; elsewhere it may be.
_PACKED_PIECES = f"{UNBACKED}{PIECES}"


@dataclass
class _Known:
    """What was found out about one form of call.

    Attributes:
        labels: labels of each tensor argument.
        example: a call to trace on, layout included.
        prologue: what runs before the graph.
        makes_cache: whether the tower makes a cache of paddings when it is given none.
    """

    labels: dict[str, Labels]
    example: dict[str, Any]
    prologue: Prologue = field(default_factory=lambda: Prologue(()))
    makes_cache: bool = False

    @cached_property
    def fillers(self) -> dict[str, Filler]:
        """The tensors of the example, where its sizes are asked for."""
        return {name: partial(_given, self.example[name]) for name in self.labels}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Sizes of the example by label."""
        pairs = [(self.example[name].shape, labels) for name, labels in self.labels.items()]
        return {label: n for shape, labels in pairs for n, label in zip(shape, labels, strict=True) if label}


def _given(tensor: torch.Tensor, sizes: Mapping[str, int], shape: Sequence[int]) -> torch.Tensor:
    return tensor


class SoundBinder:
    """Binds calls of an audio tower."""

    def __init__(self, tower: nn.Module) -> None:
        self.parameters = inspect.signature(tower.forward).parameters
        inner = {name for m in tower.modules() for name in inspect.signature(m.forward).parameters}
        self.packs = "cu_seqlens" in inner
        self.pieces = _PACKED_PIECES if self.packs else PIECES
        # "flash" in a name makes towers with masks look into them; only packed pieces need it
        self.attention: str | None = attention.ENCODER if self.packs else attention.DECODER
        self.known: dict[Any, _Known] = {}
        self.paddings = PaddingCaches(tower)

    @contextmanager
    def tracing(self, module: nn.Module) -> Iterator[None]:
        with self._attending(module), sizes_together(module):
            yield

    def _attending(self, module: nn.Module) -> AbstractContextManager[None]:
        if self.attention is None:
            return nullcontext()
        return attention.traced_with(attention.configs_below(module), self.attention)

    def bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """Raises NotCompilable when what the tower computes from lengths is not known to come from the call."""
        values = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        values = {
            n: values[n] for n in (*self.parameters, *values) if values.get(n) is not None
        }  # the sound comes first
        values = without_unread(module, values)
        if any(name.startswith("output_") and value is not False for name, value in values.items()):
            compat.install_output_capturing(module)
        cache = values.pop(ARGUMENT, None) if self.paddings.cls is not None else None
        form = form_of(values)
        if form not in self.known:
            self.known[form] = self._found_out(module, values)
        known = self.known[form]
        values.update(known.prologue.run(values))
        _agree(values, known.labels)
        if cache is None and known.makes_cache:
            main = values[next(iter(known.labels))]
            cache = self.paddings.new(len(main), main)
        if cache is not None:
            if not self.paddings.complete(cache):
                raise NotCompilable(f"{ARGUMENT} has no state for some of the convolutions")
            values[ARGUMENT] = cache

        def label(path: str, tensor: torch.Tensor) -> Labels:
            return known.labels.get(path, (self.pieces, *(None,) * (tensor.dim() - 1)) if tensor.dim() else ())

        return Bound(dict(sorted(values.items())), label, fillers=known.fillers, sizes=known.sizes)

    def form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, torch.Tensor | None]:
        return form_of({**dict(zip(self.parameters, args, strict=False)), **kwargs}), None

    def _makes_cache(self, tower: nn.Module, call: Mapping[str, Any]) -> bool:
        if self.paddings.cls is None:
            return False
        return self.paddings.made(probed(tower, lambda: tower.forward(**call)))

    def _found_out(self, tower: nn.Module, values: Mapping[str, Any]) -> _Known:
        try:
            with self._attending(tower):
                found = sound_examples(tower, values, self.pieces)
        except NotCompilable:
            if self.attention is None:
                raise
            self.attention = None  # it computes attention itself, from a mask as its own configuration makes it
            return self._found_out(tower, values)
        one, other, labels = found
        with self._attending(tower):
            if not layout_functions(tower):
                return _Known(labels, one, makes_cache=self._makes_cache(tower, one))
            prologue, again = learn(tower, one), learn(tower, other)
        if prologue != again:
            raise NotCompilable(f"what {type(tower).__name__} computes from lengths differs from call to call")
        one, other = ({**call, **prologue.run(call)} for call in (one, other))
        for name in prologue.names:
            if isinstance(one[name], torch.Tensor):
                pairs = enumerate(zip(one[name].shape, other[name].shape, strict=True))
                labels[name] = tuple(f"{name}.{dim}" if a != b else None for dim, (a, b) in pairs)
        return _Known(labels, one, prologue)


def _agree(values: Mapping[str, Any], labels: Mapping[str, Labels]) -> None:
    """Raises NotCompilable when two tensors have different numbers of pieces or frames."""
    sizes: dict[str, int] = {}
    for name, names in labels.items():
        value = values.get(name)
        for size, label in zip(value.shape, names, strict=True) if isinstance(value, torch.Tensor) else ():
            if label is not None and sizes.setdefault(label, size) != size:
                raise NotCompilable(f"{name} has {size} {label}, and another argument {sizes[label]}")
