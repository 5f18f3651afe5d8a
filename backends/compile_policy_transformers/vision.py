"""The encoder recipe: one graph for every number and size of pictures.

A vision tower computes positions, window orders and sequence lengths from the grid of its pictures, in Python and
with sizes that depend on data. These tensors are recorded in an eager *prologue*, which runs the tower's own forward
up to its first sub-module, and handed back as the keyword arguments that Transformers' ``vision_utils`` functions
look for. What is left is one graph over packed patches; attention inside each picture or window goes through
`attention.varlen_attention`. No model code is patched beyond the prologue's recording.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from compile_policy.errors import NotCompilable
from compile_policy.proof import form_of
from compile_policy.region import Bound
from compile_policy.shapes import Labels
from compile_policy_transformers import attention, compat

#: ``vision_utils`` function -> keyword arguments under which its results can be handed back.
_RECORDED: dict[str, tuple[str, ...]] = {
    "get_vision_attention_seqlens": ("cu_seqlens", "max_seqlen"),
    "get_vision_cu_seqlens": ("cu_seqlens",),
    "get_vision_position_ids": ("position_ids",),
    "get_vision_window_index": ("window_index", "cu_window_seqlens"),
    "get_vision_interpolation_indices_and_weights": ("interp_indices", "interp_weights"),
    "get_vision_bilinear_indices_and_weights": ("bilinear_indices", "bilinear_weights"),
}
#: Stands for every longest length: the varlen operator reads lengths from the tensor, a number would be a constant.
_ANY_LENGTH = 1 << 20
#: Grids (frames, height, width in merged patches) of the example and of a second one: dims that differ are dynamic.
_EXAMPLE_GRIDS = ((1, 2, 3), (1, 4, 1), (1, 3, 3), (1, 5, 2))
_OTHER_GRIDS = ((1, 3, 5), (1, 6, 2), (1, 2, 7), (1, 4, 4), (1, 5, 3), (1, 7, 3))

_prologue_lock = threading.RLock()


class _Reached(Exception):
    """The prologue is over: the tower called its first sub-module."""


def is_grid_tower(tower: torch.nn.Module) -> bool:
    """Whether ``tower`` computes its layout from a picture grid with the ``vision_utils`` functions."""
    namespace = vars(sys.modules[type(tower).__module__])
    return "grid_thw" in inspect.signature(tower.forward).parameters and any(n in namespace for n in _RECORDED)


def record_layout(tower: torch.nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Layout tensors that the tower computes before its first sub-module, by keyword argument.

    Raises:
        NotCompilable: the tower ended without calling a sub-module.
    """
    namespace = vars(sys.modules[type(tower).__module__])
    record: dict[str, Any] = {}
    with _prologue_lock, _recording(namespace, record), _stopping(tower):
        try:
            tower.forward(*args, **kwargs)  # hooks of the tower itself run round the whole call
        except _Reached:
            return {k: _ANY_LENGTH if isinstance(v, int) else v for k, v in record.items() if v is not None}
    raise NotCompilable(f"{type(tower).__name__} computes without calling a sub-module")


@contextmanager
def _recording(namespace: dict[str, Any], record: dict[str, Any]) -> Iterator[None]:
    """Note the results of the ``vision_utils`` functions that this thread calls."""
    thread = threading.get_ident()
    saved = {name: namespace[name] for name in (*_RECORDED, "get_max_seqlen") if name in namespace}

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if threading.get_ident() == thread:
                if name == "get_max_seqlen":
                    record[kwargs.get("kwarg_name", "max_seqlen")] = _ANY_LENGTH
                else:
                    record.update(zip(_RECORDED[name], result if isinstance(result, tuple) else (result,), strict=True))
            return result

        return call

    try:
        namespace.update({name: noting(name, function) for name, function in saved.items()})
        yield
    finally:
        namespace.update(saved)


@contextmanager
def _stopping(tower: torch.nn.Module) -> Iterator[None]:
    """Leave the tower's forward when it calls a child."""
    thread = threading.get_ident()

    def stop(module: torch.nn.Module, args: Any) -> None:
        if threading.get_ident() == thread:
            raise _Reached

    handles = [child.register_forward_pre_hook(stop) for child in tower.children()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class EncoderBinder:
    """Binds calls of a vision or audio tower: all tensors by name, leading dims dynamic."""

    def __init__(self, tower: torch.nn.Module) -> None:
        self.parameters = inspect.signature(tower.forward).parameters
        self.grid = is_grid_tower(tower)
        self.merge = int(getattr(tower, "spatial_merge_size", 1) or 1)
        self.dynamic: dict[str, tuple[bool, ...]] | None = None

    @contextmanager
    def tracing(self, module: torch.nn.Module) -> Iterator[None]:
        with attention.traced_with(attention.configs_below(module), attention.ENCODER):
            yield

    def bind(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        values = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        values = {name: value for name, value in values.items() if value is not None}
        if any(name.startswith("output_") and value is not False for name, value in values.items()):
            compat.install_output_capturing(module)  # a tower that is asked once is asked always; eager does the same
        if not self.grid:
            return Bound(dict(sorted(values.items())), _leading_dim)
        values.update(record_layout(module, **values))
        if self.dynamic is None:
            self.dynamic = self._dynamic_dims(module, values)
        return Bound(dict(sorted(values.items())), self._label, example=lambda: self._example(module, values))

    def form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, torch.Tensor | None]:
        return form_of({**dict(zip(self.parameters, args, strict=False)), **kwargs}), None

    def _label(self, path: str, tensor: torch.Tensor) -> Labels:
        assert self.dynamic is not None
        dynamic = self.dynamic.get(path, (True,) + (False,) * (tensor.dim() - 1))
        return tuple(f"{path}.{dim}" if varies else None for dim, varies in enumerate(dynamic))

    def _example(self, module: torch.nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
        return self._call_with(module, values, _EXAMPLE_GRIDS)

    def _call_with(self, module: torch.nn.Module, values: Mapping[str, Any], grids: Any) -> dict[str, Any]:
        """The call with other pictures: random patches on ``grids``, and the layout that belongs to them."""
        given = values["grid_thw"]
        grid = torch.tensor(
            [[t, h * self.merge, w * self.merge] for t, h, w in grids], dtype=given.dtype, device=given.device
        )
        name = next(iter(self.parameters))
        patches: torch.Tensor = values[name]
        count = int(grid.prod(dim=1).sum())
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(count, *patches.shape[1:], generator=generator).to(patches)
        layout_names = {n for names in _RECORDED.values() for n in names} | {"max_window_seqlen"}
        rest = {n: v for n, v in values.items() if n not in layout_names and n not in (name, "grid_thw")}
        call = {name: pixels, "grid_thw": grid, **rest}
        return dict(sorted({**call, **record_layout(module, **call)}.items()))

    def _dynamic_dims(self, module: torch.nn.Module, values: Mapping[str, Any]) -> dict[str, tuple[bool, ...]]:
        """Dims whose size differs between two sets of pictures."""
        one = self._call_with(module, values, _EXAMPLE_GRIDS)
        other = self._call_with(module, values, _OTHER_GRIDS)
        return {
            name: tuple(a != b for a, b in zip(value.shape, other[name].shape, strict=True))
            for name, value in one.items()
            if isinstance(value, torch.Tensor)
        }


def _leading_dim(path: str, tensor: torch.Tensor) -> Labels:
    """Towers over whole pictures: the number of pictures varies, their size belongs to the key."""
    return ("images", *(None,) * (tensor.dim() - 1)) if tensor.dim() else ()
