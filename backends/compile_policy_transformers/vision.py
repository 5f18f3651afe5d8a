"""The encoder recipe: one graph for every number and size of pictures.

A vision tower computes positions, window orders and sequence lengths from the grid of its pictures, in Python and
with sizes that depend on data. Transformers' ``vision_utils`` functions do that; they run before the graph
(`prologue`), and their results go in as the keyword arguments that these functions look for. What is left is one graph
over packed patches; attention inside each picture or window goes through `attention.varlen_attention`. Towers that
read sizes in other ways are compiled from their layers on (`stacks`). No model code is patched.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from compile_policy.errors import NotCompilable
from compile_policy.proof import form_of
from compile_policy.region import Bound
from compile_policy.shapes import Labels
from compile_policy_transformers import attention, compat, pictures
from compile_policy_transformers.prologue import Prologue, layout_functions
from compile_policy_transformers.unread import without_unread


def is_grid_tower(tower: torch.nn.Module) -> bool:
    """Whether ``tower`` computes its layout from a picture grid with the ``vision_utils`` functions."""
    return pictures.grid_argument(tower) is not None and bool(layout_functions(tower))


class EncoderBinder:
    """Binds calls of a vision or audio tower: all tensors by name, leading dims dynamic."""

    def __init__(self, tower: torch.nn.Module) -> None:
        self.parameters = inspect.signature(tower.forward).parameters
        self.grid = is_grid_tower(tower)
        self.merge = pictures.merge_of(tower)
        self.prologue: Prologue | None = None
        self.dynamic: dict[str, tuple[bool, ...]] = {}
        self.refused: dict[Any, tuple[str, str]] = {}

    @contextmanager
    def tracing(self, module: torch.nn.Module) -> Iterator[None]:
        with attention.traced_with(attention.configs_below(module), attention.encoder_name(module)):
            yield

    def bind(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        values = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        values = without_unread(module, {name: value for name, value in values.items() if value is not None})
        if any(name.startswith("output_") and value is not False for name, value in values.items()):
            compat.install_output_capturing(module)  # a tower that is asked once is asked always; eager does the same
        if not self.grid:
            return Bound(dict(sorted(values.items())), _leading_dim)
        if self.prologue is None:
            self._look(module, values)
        assert self.prologue is not None
        values.update(self.prologue.run(values))
        return Bound(dict(sorted(values.items())), self._label, example=lambda: self._example(module, values))

    def form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, torch.Tensor | None]:
        return form_of({**dict(zip(self.parameters, args, strict=False)), **kwargs}), None

    def _look(self, module: torch.nn.Module, values: Mapping[str, Any]) -> None:
        """Learn what the tower computes from grids; what speaks against it is looked for once for a form of call."""
        form = form_of(values)
        if form not in self.refused:
            try:
                self.prologue, one, other = pictures.probe(module, values)
                self.dynamic = _differing(one, other)
                return
            except NotCompilable as reason:
                self.refused[form] = (reason.reason, reason.remedy)
        reason_, remedy = self.refused[form]
        raise NotCompilable(reason_, remedy=remedy)

    def _label(self, path: str, tensor: torch.Tensor) -> Labels:
        dynamic = self.dynamic.get(path, (True,) + (False,) * (tensor.dim() - 1))
        return tuple(f"{path}.{dim}" if varies else None for dim, varies in enumerate(dynamic))

    def _example(self, module: torch.nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
        assert self.prologue is not None
        given = {name: value for name, value in values.items() if name not in self.prologue.names}
        return pictures.probe(module, given)[1]


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[bool, ...]]:
    """Dims whose size differs between two sets of pictures."""
    return {
        name: tuple(a != b for a, b in zip(value.shape, other[name].shape, strict=True))
        for name, value in one.items()
        if isinstance(value, torch.Tensor)
    }


def _leading_dim(path: str, tensor: torch.Tensor) -> Labels:
    """Towers over whole pictures: the number of pictures varies, their size belongs to the key."""
    return ("images", *(None,) * (tensor.dim() - 1)) if tensor.dim() else ()
