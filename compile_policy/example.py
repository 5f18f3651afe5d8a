"""The synthetic call that an entry is traced on.

Every label gets a size of its own, at least 2: sizes that are equal by accident would be traced as equal for good, and
sizes 0 and 1 as constants. Values are random but reproducible, so that the compiled entry can be compared with eager.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch

from compile_policy.errors import NotCompilable
from compile_policy.masked_attention import dense
from compile_policy.shapes import Labels

#: Sizes handed to labels in the order in which the call names them. Sums of two are avoided on purpose.
_SIZES = (2, 3, 7, 11, 17, 23, 29, 37, 43, 53, 61, 71, 83, 97, 107, 127)

#: Fills one example leaf: (sizes by label, shape) -> tensor.
Filler = Callable[[Mapping[str, int], Sequence[int]], torch.Tensor]


def sizes_of(labels: Sequence[Labels], preferred: Mapping[str, int]) -> dict[str, int]:
    """label -> example size. A label ``a+b`` is as long as ``a`` and ``b`` together."""
    names = [n for ls in labels for n in ls if n is not None]
    simple = dict.fromkeys(part for name in names for part in name.split("+"))
    if len(simple) > len(_SIZES):
        raise NotCompilable(f"a call with {len(simple)} different dynamic sizes is beyond what examples are built for")
    free = itertools.chain((s for s in _SIZES if s not in preferred.values()), itertools.count(131, 2))
    sizes = {name: preferred.get(name) or next(free) for name in simple}
    return {name: sum(sizes[p] for p in name.split("+")) for name in dict.fromkeys([*names, *simple])}


def synthetic(
    leaves: Sequence[torch.Tensor],
    labels: Sequence[Labels],
    fillers: Sequence[Filler | None],
    preferred: Mapping[str, int],
    *,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Leaves of the same dtypes, devices and static sizes, with every label at its example size."""
    sizes = sizes_of(labels, preferred)
    generator = torch.Generator().manual_seed(seed)
    result = []
    for leaf, names, filler in zip(leaves, labels, fillers, strict=True):
        shape = [s if n is None else sizes[n] for s, n in zip(leaf.shape, names, strict=True)]
        value = filler(sizes, shape) if filler else _fill(leaf.dtype, shape, generator)
        value = value.to(leaf.device).contiguous()
        result.append(value.requires_grad_(leaf.requires_grad))
    return result


class Shaped(Protocol):
    """What of a call an example is made from."""

    @property
    def leaves(self) -> list[torch.Tensor]: ...
    @property
    def labels(self) -> list[Labels]: ...
    @property
    def fillers(self) -> list[Filler | None]: ...
    @property
    def sizes(self) -> Mapping[str, int]: ...


def examples(call: Shaped) -> Iterator[tuple[list[torch.Tensor], list[Labels]]]:
    """Examples to trace on, most general first, each with the labels of its dims.

    The second has the call's own sizes, with 0 and 1 as constants: for a component that treats those apart.
    """
    yield synthetic(call.leaves, call.labels, call.fillers, call.sizes), call.labels
    given = [
        tuple(n if s > 1 else None for s, n in zip(t.shape, ls, strict=True))
        for t, ls in zip(call.leaves, call.labels, strict=True)
    ]
    yield copies(call.leaves), given


def another_example(call: Shaped, labels: Sequence[Labels]) -> list[torch.Tensor]:
    """An example with the same labels and other sizes."""
    first = sizes_of(labels, call.sizes)
    other = {n: size + 2 for n, size in first.items() if "+" not in n and n not in call.sizes}
    return synthetic(call.leaves, labels, call.fillers, {**call.sizes, **other}, seed=1)


def copies(leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies for a run that may write into its inputs; a causal mark becomes the mask that it means."""
    return [dense(t).detach().clone().requires_grad_(t.requires_grad) for t in leaves]


def _fill(dtype: torch.dtype, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(tuple(shape), generator=generator).to(dtype)
    if dtype is torch.bool:
        return torch.ones(tuple(shape), dtype=dtype)
    # Integers index something as often as not: 0 and 1 are inside every table that has two rows.
    return (torch.arange(int(torch.Size(shape).numel())) % 2).reshape(shape).to(dtype)
