"""Calls of a stack of a tower's layers: one graph for every number and size of pictures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from compile_policy.errors import NotCompilable
from compile_policy.proof import form_of
from compile_policy.region import Bound
from compile_policy.shapes import Labels
from compile_policy_transformers import attention, compat
from compile_policy_transformers.chains import LayerChain, rows_of
from compile_policy_transformers.picture_convolution import convolving
from compile_policy_transformers.pictures import EXAMPLE, merge_of
from compile_policy_transformers.prologue import ANY_LENGTH
from compile_policy_transformers.stacks import STATES
from compile_policy_transformers.unread import without_unread

_LENGTHS = "cu_seqlens"
PATCHES = "patches"
_PACKED, _ROWS = "packed pictures", "pictures"
#: Labels of a grid that layers take.
_GRID = (_ROWS, None)


class StackBinder:
    """Binds calls of a stack of layers: batch, patches and packed pictures are dynamic."""

    def __init__(self, stack: nn.Module) -> None:
        self.chain = stack if isinstance(stack, LayerChain) else None
        first: Any = stack[0] if isinstance(stack, nn.ModuleList) else stack
        self.parameters = dict(inspect.signature(first.forward).parameters)
        if self.chain is not None:  # whatever the layers call it
            states, *others = self.parameters
            self.parameters = {STATES[0]: self.parameters[states], **{n: self.parameters[n] for n in others}}
        inner = {name for m in stack.modules() for name in inspect.signature(m.forward).parameters}
        self.packs = _LENGTHS in inner
        self.takes_longest = "max_seqlen" in inner
        lists = (child for child in (stack, *stack.children()) if isinstance(child, nn.ModuleList))
        self.layers = max(len(child) for child in lists)
        self.tied = False
        self.merge = 1

    def belongs_to(self, tower: nn.Module) -> None:
        """Told of the tower around the stack, which may ask for its last hidden state, and merges patches."""
        self.tied = compat.ties_last_state(tower)
        self.merge = merge_of(tower)

    @contextmanager
    def tracing(self, module: nn.Module) -> Iterator[None]:
        # "flash" in a name makes towers with masks look into them; only packed pictures need it
        name = attention.ENCODER if self.packs else attention.DECODER
        attends = attention.traced_with(attention.configs_below(module), name)
        with attends, compat.uncollected(module), convolving(module):
            yield

    def bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """Raises NotCompilable when the tower collects what its layers compute."""
        if compat.collects_outputs() and not (self.tied and compat.collects_last_state_only(self.layers)):
            raise NotCompilable(
                "the outputs of its layers are asked for, and they are inside the graph",
                remedy="Call the tower without output_hidden_states and output_attentions.",
            )
        named = self._by_name(args, kwargs).items()  # a loop hands every layer the same names, needed or not
        values = without_unread(module, {n: v for n, v in named if v is not None or self.chain is not None})
        states = values[next(name for name in STATES if name in values)]
        if compat.collects_outputs():
            compat.settle_last_state(self.layers, states)
        self._complete(values, states)
        packed = values.get(_LENGTHS) is not None
        batch = 1 if packed or states.dim() == 2 else states.shape[0]
        rows = rows_of(self.chain) & values.keys() if self.chain is not None else frozenset()
        sizes = _Sizes(None if packed or states.dim() == 2 else batch, states.shape[-2], rows)
        fillers = {_LENGTHS: _fill_lengths} if packed else {}
        ordered = dict(sorted(values.items()))
        made = partial(self._example, ordered, sizes.label) if rows else None
        return Bound(ordered, sizes.label, fillers=fillers, example=made)

    def _complete(self, values: dict[str, Any], states: torch.Tensor) -> None:
        """Give every call the same arguments: a mask that hides nothing, lengths of a single picture."""
        if self.packs:
            alone = states.dim() == 2 or len(states) == 1
            if values.get(_LENGTHS) is None and alone and values.get("attention_mask") is None:
                values[_LENGTHS] = torch.tensor([0, states.shape[-2]], dtype=torch.int32, device=states.device)
            if values.get(_LENGTHS) is not None and self.takes_longest:
                values["max_seqlen"] = ANY_LENGTH
        elif "attention_mask" in self.parameters and values.get("attention_mask") is None and states.dim() == 3:
            batch, patches, _ = states.shape
            values["attention_mask"] = states.new_ones(1, dtype=torch.bool).expand(batch, 1, patches, patches)

    def form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, torch.Tensor | None]:
        return form_of(self._by_name(args, kwargs)), None

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name; a grid that comes as rows of numbers is a tensor."""
        values = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        if self.chain is not None:
            device = values[STATES[0]].device
            rows = {name: torch.tensor(value, device=device) for name, value in values.items() if _is_rows(value)}
            if rows.keys() - rows_of(self.chain):
                self.chain.rows = rows_of(self.chain) | rows.keys()
            values |= rows
        return values

    def _example(self, values: Mapping[str, Any], label: Callable[[str, torch.Tensor], Labels]) -> dict[str, Any]:
        """The call for pictures of our own choice, whose grid fits the number of patches."""
        grid = torch.tensor([[t, h * self.merge, w * self.merge] for t, h, w in EXAMPLE])
        lengths = grid.prod(dim=1)
        sizes = {PATCHES: int(lengths.sum()), _PACKED: len(grid) + 1, _ROWS: len(grid)}
        generator = torch.Generator().manual_seed(0)

        def like(value: Any, path: str) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(like(v, f"{path}[{i}]") for i, v in enumerate(value))
            if not isinstance(value, torch.Tensor) or path == _LENGTHS or label(path, value) == _GRID:
                return value
            shape = [s if n is None else sizes.get(n, s) for s, n in zip(value.shape, label(path, value), strict=True)]
            return torch.randn(shape, generator=generator).to(value)

        made = {name: like(value, name) for name, value in values.items()}
        grids = {
            name: grid.to(v) for name, v in values.items() if isinstance(v, torch.Tensor) and label(name, v) == _GRID
        }
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return {**made, **grids, **({_LENGTHS: bounds.to(values[_LENGTHS])} if _LENGTHS in values else {})}


def _is_rows(value: Any) -> bool:
    """Whether a value is a list of as many whole numbers for each picture."""
    if not (isinstance(value, list) and value and all(isinstance(row, list) and row for row in value)):
        return False
    return len({len(row) for row in value}) == 1 and all(type(n) is int for row in value for n in row)


class _Sizes:
    """Labels of a call of ``batch`` rows (``None``: packed in one) of ``patches`` each; ``grids`` are by picture."""

    def __init__(self, batch: int | None, patches: int, grids: Collection[str] = ()) -> None:
        self.grids = grids
        self.batch = batch
        self.patches = patches

    def label(self, path: str, tensor: torch.Tensor) -> Labels:
        if path == _LENGTHS:
            return (_PACKED,)
        if path in self.grids:
            return _GRID
        found: list[str | None] = [PATCHES if size == self.patches else None for size in tensor.shape]
        if "mask" not in path and tensor.dim() > 1:  # the last dim holds features or coordinates
            found[-1] = None
            if path.split("[")[0] in STATES:
                found = [None] * tensor.dim()
                found[-2] = PATCHES
        has_rows = tensor.dim() > 2 or (tensor.dim() == 2 and "mask" in path)
        if self.batch is not None and has_rows and tensor.shape[0] == self.batch:
            found[0] = "batch"
        return tuple(found)


def _fill_lengths(sizes: Mapping[str, int], shape: Sequence[int]) -> torch.Tensor:
    """Lengths of pictures that together have all patches."""
    return torch.linspace(0, sizes[PATCHES], shape[0]).to(torch.int32)
