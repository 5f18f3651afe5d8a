"""Encoders of sound: one graph for every number and length of pieces.

Which dims of a call are pieces and which are frames is not written anywhere: the tower is run on pieces of another
length, and what it takes is dynamic. Some towers only take one length; others cut sound into chunks and pack them
with Transformers' layout functions, which then run before the graph as they do for pictures (`prologue`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
from compile_policy_transformers import attention, compat
from compile_policy_transformers.prologue import Prologue, layout_functions, learn

PIECES, FRAMES = "sounds", "frames"
#: Where pieces are cut up and packed, a single one is no special case for any tower; elsewhere it may be.
_PACKED_PIECES = f"{UNBACKED}{PIECES}"
#: Lengths of packed pieces of an example, shorter than any chunk that towers cut; and of a second one, longer.
_SHORT, _LONG = (29, 17, 23), (431, 107, 31, 19)


@dataclass
class _Known:
    """What was found out about one form of call.

    Attributes:
        labels: labels of each tensor argument.
        example: a call to trace on, layout included.
        prologue: what runs before the graph.
    """

    labels: dict[str, Labels]
    example: dict[str, Any]
    prologue: Prologue = field(default_factory=lambda: Prologue(()))

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

    @contextmanager
    def tracing(self, module: nn.Module) -> Iterator[None]:
        with (
            nullcontext()
            if self.attention is None
            else attention.traced_with(attention.configs_below(module), self.attention)
        ):
            yield

    def bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """Raises NotCompilable when what the tower computes from lengths is not known to come from the call."""
        values = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        values = {name: value for name, value in values.items() if value is not None}
        if any(name.startswith("output_") and value is not False for name, value in values.items()):
            compat.install_output_capturing(module)
        form = form_of(values)
        if form not in self.known:
            self.known[form] = self._found_out(module, values)
        known = self.known[form]
        values.update(known.prologue.run(values))
        _agree(values, known.labels)

        def label(path: str, tensor: torch.Tensor) -> Labels:
            return known.labels.get(path, (self.pieces, *(None,) * (tensor.dim() - 1)) if tensor.dim() else ())

        return Bound(dict(sorted(values.items())), label, fillers=known.fillers, sizes=known.sizes)

    def form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, torch.Tensor | None]:
        return form_of({**dict(zip(self.parameters, args, strict=False)), **kwargs}), None

    def _found_out(self, tower: nn.Module, values: Mapping[str, Any]) -> _Known:
        try:
            with self.tracing(tower):
                found = _examples(tower, values, self.pieces)
        except NotCompilable:
            if self.attention is None:
                raise
            self.attention = None  # it computes attention itself, from a mask as its own configuration makes it
            return self._found_out(tower, values)
        one, other, labels = found
        with self.tracing(tower):
            if not layout_functions(tower):
                return _Known(labels, one)
            prologue, again = learn(tower, one), learn(tower, other)
        if prologue != again:
            raise NotCompilable(f"what {type(tower).__name__} computes from lengths differs from call to call")
        one, other = ({**call, **prologue.run(call)} for call in (one, other))
        for name in prologue.names:
            if isinstance(one[name], torch.Tensor):
                pairs = enumerate(zip(one[name].shape, other[name].shape, strict=True))
                labels[name] = tuple(f"{name}.{dim}" if a != b else None for dim, (a, b) in pairs)
        return _Known(labels, one, prologue)


def _examples(
    tower: nn.Module, values: Mapping[str, Any], pieces: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Labels]]:
    """Two other calls that the tower runs on, and labels of the dims that differ from the given one's.

    Raises:
        NotCompilable: it runs on none of those that were tried.
    """
    main = values[next(iter(values))]
    if not isinstance(main, torch.Tensor) or main.dim() < 2:
        raise NotCompilable("the sound of this call is no tensor of pieces, or of frames and their values")
    if (lengths := _lengths(values, main)) is not None:
        calls = [_packed(values, lengths, counts) for counts in (_SHORT, _LONG)]
        if all(_runs(tower, call) for call in calls):
            return calls[0], calls[1], _labels(values, calls[0], pieces, packed=True)
    count = 3 if len(main) != 3 else 5
    for dim in (*range(main.dim() - 1, 0, -1), None):
        for times in (2, 3):
            one, other = (_stretched(values, main, dim, n, times) for n in (count, count + 1))
            if _runs(tower, one):
                return one, other if _runs(tower, other) else one, _labels(values, one, pieces)
    raise NotCompilable(f"{type(tower).__name__} runs on no other number of pieces")


def _runs(tower: nn.Module, call: Mapping[str, Any]) -> bool:
    try:
        with torch.no_grad():
            tower.forward(**call)
    except Exception:
        return False
    return True


def _stretched(
    values: Mapping[str, Any], main: torch.Tensor, dim: int | None, count: int, times: int
) -> dict[str, Any]:
    """The call with ``count`` pieces whose dim ``dim`` is so many times longer; masks keep their padding behind."""
    generator = torch.Generator().manual_seed(0)
    frames = main.shape[dim] if dim is not None else 0
    out = dict(values)
    for name, value in values.items():
        if not isinstance(value, torch.Tensor) or not value.dim() or len(value) != len(main):
            continue
        rows = value[torch.arange(count) % len(value)]
        for d in range(1, value.dim()) if dim is not None else ():
            grows = d == dim if value is main else value.shape[d] == frames
            rows = torch.cat([rows] * times, dim=d) if grows else rows
        if value.is_floating_point():
            rows = torch.randn(rows.shape, generator=generator).to(value)
        elif value.dim() == 2 and value is not main:
            rows = rows.sort(dim=1, descending=True, stable=True).values
        out[name] = rows.contiguous()
    return out


def _lengths(values: Mapping[str, Any], main: torch.Tensor) -> str | None:
    """The argument that says how pieces are packed in the last dim of ``main``."""
    for name, value in values.items():
        whole = isinstance(value, torch.Tensor) and value.dim() == 1 and not value.is_floating_point()
        if whole and main.dim() == 2 and int(value.sum()) == main.shape[-1]:
            return name
    return None


def _packed(values: Mapping[str, Any], lengths: str, counts: Sequence[int]) -> dict[str, Any]:
    """The call with packed pieces of so many frames."""
    generator = torch.Generator().manual_seed(0)
    name, given = next(iter(values)), values[lengths]
    main = values[name]
    sound = torch.randn(main.shape[0], sum(counts), generator=generator).to(main)
    out = {**values, name: sound, lengths: torch.tensor(counts, dtype=given.dtype, device=given.device)}
    for other, value in values.items():  # one number a piece
        if other != lengths and isinstance(value, torch.Tensor) and value.shape == given.shape:
            out[other] = value[:1].expand(len(counts)).contiguous()
    return out


def _labels(
    given: Mapping[str, Any], example: Mapping[str, Any], pieces: str, packed: bool = False
) -> dict[str, Labels]:
    """Labels of the tensors: the first dim is pieces, others are frames where the example differs.

    Args:
        pieces: the label of the first dim.
        packed: pieces follow one another in the last dim, and only arguments with one dim have one number a piece.
    """
    out: dict[str, Labels] = {}
    for name, value in example.items():
        if isinstance(value, torch.Tensor):
            before = given[name].shape
            names = [FRAMES if a != b else None for a, b in zip(value.shape, before, strict=True)]
            if value.dim() and not (packed and value.dim() > 1):
                names[0] = pieces
            out[name] = tuple(names)
    return out


def _agree(values: Mapping[str, Any], labels: Mapping[str, Labels]) -> None:
    """Raises NotCompilable when two tensors have different numbers of pieces or frames."""
    sizes: dict[str, int] = {}
    for name, names in labels.items():
        value = values.get(name)
        for size, label in zip(value.shape, names, strict=True) if isinstance(value, torch.Tensor) else ():
            if label is not None and sizes.setdefault(label, size) != size:
                raise NotCompilable(f"{name} has {size} {label}, and another argument {sizes[label]}")
