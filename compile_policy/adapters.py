"""Tensors of a call, and how types that are neither tensor, constant nor plain container become some.

Every such type has one `ArgumentAdapter`. Specs that adapters return are hashable: they are part of the call key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from compile_policy.errors import NotCompilable
from compile_policy.example import Filler
from compile_policy.masked_attention import is_causal_mark
from compile_policy.shapes import Labels

LabelFn = Callable[[str, torch.Tensor], Labels]


class ArgumentAdapter(Protocol):
    """How one type of argument becomes tensors and comes back. All specs are hashable."""

    def flatten(self, value: Any, out: Leaves, path: str) -> Any:
        """Add the tensors of ``value`` to ``out``; return the spec of the rest."""

    def rebuild(self, spec: Any, leaves: Iterator[torch.Tensor]) -> Any:
        """The value again, around (traced) tensors. Runs inside the trace."""

    def state(self, spec: Any, value: Any) -> list[torch.Tensor]:
        """Tensors of ``value`` after the call, that replace its state. Runs inside the trace."""

    def write_back(self, spec: Any, value: Any, state: list[torch.Tensor]) -> None:
        """Give the caller's ``value`` its new state. Runs outside the trace, after each call."""

    def public(self, value: Any) -> Any:
        """What the caller knows the argument as, for results that contain it."""


_adapters: dict[type, ArgumentAdapter] = {}


def register_adapter(cls: type, adapter: ArgumentAdapter) -> None:
    """Pass arguments of type ``cls`` (and subclasses) through ``adapter``."""
    _adapters[cls] = adapter


def adapter_for(cls: type) -> ArgumentAdapter | None:
    for base in cls.__mro__:
        if base in _adapters:
            return _adapters[base]
    return None


@dataclass
class Leaves:
    """Tensors of a call in order, with the label of every dim.

    ``label`` says which dims vary; an adapter that knows better passes labels of its own to `add`. ``mutable`` holds
    the places of tensors that an adapter lets the graph write into, ``copied`` the originals of copied ones, ``marks``
    the places of causal marks (`masked_attention`).
    """

    label: LabelFn
    fillers: Mapping[str, Filler] = field(default_factory=dict)
    tensors: list[torch.Tensor] = field(default_factory=list)
    labels: list[Labels] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    example_fillers: list[Filler | None] = field(default_factory=list)
    mutable: set[int] = field(default_factory=set)
    marks: list[int] = field(default_factory=list)
    copied: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(
        self,
        tensor: torch.Tensor,
        path: str,
        labels: Labels | None = None,
        *,
        mutable: bool = False,
        filler: Filler | None = None,
    ) -> None:
        """Add one tensor.

        Args:
            tensor: a strided tensor; copied where it isn't contiguous, since strides are no part of the key.
            path: where it stands in the call.
            labels: label of each dim; asked of ``label`` when not given.
            mutable: the graph writes into it, so that a copy would not do.
            filler: how to fill the example, where random values would not do.
        """
        if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
            raise NotCompilable(f"argument {path} is a {type(tensor).__name__}, a tensor subclass with its own rules")
        if tensor.layout is not torch.strided:
            raise NotCompilable(f"argument {path} has layout {tensor.layout}; only strided tensors are compiled")
        if not tensor.is_contiguous() and is_causal_mark(tensor):
            self.marks.append(len(self.tensors))
        elif not tensor.is_contiguous():
            if mutable:
                raise NotCompilable(f"argument {path} is written in place and is not contiguous")
            self.copied[len(self.tensors)] = tensor
            tensor = tensor.contiguous()
        if mutable:
            self.mutable.add(len(self.tensors))
        self.tensors.append(tensor)
        self.labels.append(labels if labels is not None else self.label(path, tensor))
        self.paths.append(path)
        self.example_fillers.append(filler or self.fillers.get(path))
