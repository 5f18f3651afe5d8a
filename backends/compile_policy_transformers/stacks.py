"""Towers of which only the layers are compiled.

Some towers read the sizes of their pictures in Python before their layers run, picture by picture: they crop, resize
position tables, or pad. That part is cheap and stays eager; nearly all of the time goes into the stack of layers,
which sees nothing but hidden states, masks and positions. The stack is one graph for every number and size of
pictures, where the whole tower would be one for each size, or none.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compile_policy.errors import NotCompilable
from compile_policy.proof import form_of
from compile_policy.region import Bound
from compile_policy.shapes import Labels
from compile_policy_transformers import attention, compat
from compile_policy_transformers.pictures import grid_argument
from compile_policy_transformers.prologue import ANY_LENGTH
from compile_policy_transformers.unread import without_unread

#: Arguments that say of what size each picture is, where pictures are padded or cut up.
_SIZES = {
    *("image_sizes", "spatial_shapes", "pixel_position_ids", "image_grid_hw", "merge_sizes"),
    *("aspect_ratio_ids", "flattened_patches"),
}
_STATES = ("hidden_states", "inputs_embeds")
_LENGTHS = "cu_seqlens"
PATCHES = "patches"


def stacks_of(tower: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of the stacks of layers to compile in place of the whole tower; empty: the whole tower is.

    A tower is taken apart when it is called with the sizes of its pictures, or when it reads a grid in Python.
    """
    found = list(_stacks(tower))
    if not found:
        return []
    takes_sizes = bool(_SIZES & set(inspect.signature(tower.forward).parameters))
    return found if takes_sizes or (grid_argument(tower) and _reads_numbers(tower, [s for _, s in found])) else []


def is_stack(module: nn.Module) -> bool:
    """Whether ``module`` is a stack of layers over hidden states."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList) and len(child)]
    if any(isinstance(m, nn.Conv2d) and max(m.stride) > 1 for m in module.modules()):
        return False  # it takes the pictures themselves, by whatever name (florence2)
    return _over_states(module) and any(all(_over_states(layer) for layer in layers) for layers in lists)


def _over_states(module: nn.Module) -> bool:
    return next(iter(inspect.signature(module.forward).parameters), "") in _STATES


def _stacks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if is_stack(child):
            yield prefix + name, child
        elif not isinstance(child, nn.ModuleList):
            yield from _stacks(child, f"{prefix}{name}.")


def _reads_numbers(tower: nn.Module, stacks: Sequence[nn.Module]) -> bool:
    """Whether a method outside the stacks turns tensors into lists of numbers."""
    inside = {id(m) for stack in stacks for m in stack.modules()}
    classes = {type(m) for m in tower.modules() if id(m) not in inside and not type(m).__module__.startswith("torch.")}
    return any(_calls_tolist(cls) for cls in classes)


def _calls_tolist(cls: type) -> bool:
    """Whether a method does; attention that has a packed form as well does not need to."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return False
    return ".tolist()" in source and "is_flash_attention_requested" not in source


class StackBinder:
    """Binds calls of a stack of layers: batch, patches and packed pictures are dynamic."""

    def __init__(self, stack: nn.Module) -> None:
        self.parameters = inspect.signature(stack.forward).parameters
        inner = {name for m in stack.modules() for name in inspect.signature(m.forward).parameters}
        self.packs = _LENGTHS in inner
        self.takes_longest = "max_seqlen" in inner
        self.layers = max(len(child) for child in stack.children() if isinstance(child, nn.ModuleList))
        self.tied = False

    def belongs_to(self, tower: nn.Module) -> None:
        """Told of the tower around the stack, which may ask for its last hidden state."""
        self.tied = compat.ties_last_state(tower)

    @contextmanager
    def tracing(self, module: nn.Module) -> Iterator[None]:
        # "flash" in a name makes towers with masks look into them; only packed pictures need it
        name = attention.ENCODER if self.packs else attention.DECODER
        with attention.traced_with(attention.configs_below(module), name), compat.uncollected(module):
            yield

    def bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """Raises NotCompilable when the tower collects what its layers compute."""
        if compat.collects_outputs() and not (self.tied and compat.collects_last_state_only(self.layers)):
            raise NotCompilable(
                "the outputs of its layers are asked for, and they are inside the graph",
                remedy="Call the tower without output_hidden_states and output_attentions.",
            )
        values = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        values = without_unread(module, {name: value for name, value in values.items() if value is not None})
        states = values[next(name for name in _STATES if name in values)]
        if compat.collects_outputs():
            compat.settle_last_state(self.layers, states)
        self._complete(values, states)
        packed = _LENGTHS in values
        batch = 1 if packed or states.dim() == 2 else states.shape[0]
        sizes = _Sizes(None if packed or states.dim() == 2 else batch, states.shape[-2])
        fillers = {_LENGTHS: _fill_lengths} if packed else {}
        return Bound(dict(sorted(values.items())), sizes.label, fillers=fillers)

    def _complete(self, values: dict[str, Any], states: torch.Tensor) -> None:
        """Give every call the same arguments: a mask that hides nothing, lengths of a single picture."""
        if self.packs:
            alone = states.dim() == 2 or len(states) == 1
            if _LENGTHS not in values and alone and "attention_mask" not in values:
                values[_LENGTHS] = torch.tensor([0, states.shape[-2]], dtype=torch.int32, device=states.device)
            if _LENGTHS in values and self.takes_longest:
                values["max_seqlen"] = ANY_LENGTH
        elif "attention_mask" in self.parameters and "attention_mask" not in values and states.dim() == 3:
            batch, patches, _ = states.shape
            values["attention_mask"] = states.new_ones(1, dtype=torch.bool).expand(batch, 1, patches, patches)

    def form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, torch.Tensor | None]:
        return form_of({**dict(zip(self.parameters, args, strict=False)), **kwargs}), None


class _Sizes:
    """Labels of a call of ``batch`` rows (``None``: packed in one) of ``patches`` each."""

    def __init__(self, batch: int | None, patches: int) -> None:
        self.batch = batch
        self.patches = patches

    def label(self, path: str, tensor: torch.Tensor) -> Labels:
        if path == _LENGTHS:
            return ("packed pictures",)
        found: list[str | None] = [PATCHES if size == self.patches else None for size in tensor.shape]
        if "mask" not in path and tensor.dim() > 1:  # the last dim holds features or coordinates
            found[-1] = None
            if path.split("[")[0] in _STATES:
                found = [None] * tensor.dim()
                found[-2] = PATCHES
        has_rows = tensor.dim() > 2 or (tensor.dim() == 2 and "mask" in path)
        if self.batch is not None and has_rows and tensor.shape[0] == self.batch:
            found[0] = "batch"
        return tuple(found)


def _fill_lengths(sizes: Mapping[str, int], shape: Sequence[int]) -> torch.Tensor:
    """Lengths of pictures that together have all patches."""
    return torch.linspace(0, sizes[PATCHES], shape[0]).to(torch.int32)
