"""Cache layers of any class, as long as all they do is move states: which go where is asked of the layer itself.

A layer's ``update`` decides in Python what attention sees and what is kept: all, a window, a window behind a prefix. A
copy of the layer whose states are numbers is updated outside the graph; the numbers that come out say which state went
where. The graph then only selects by index. What the layer counts in Python is taken from the copy afterwards.

That is right for layers that move states and nothing else. While the copy is updated, every operation on a state is
looked at, so that one which computes with states (quantizes, rotates, drops those that matter least) is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import Cache

from compile_policy import compat
from compile_policy.adapters import Leaves
from compile_policy.errors import NotCompilable, first_line
from compile_policy_transformers.cache_blocks import Block, blocks, is_held, refused
from compile_policy_transformers.cache_layers import (
    KINDS,
    MOVED,
    LayerShape,
    initialise_layer,
    kind_of,
    kind_of_class,
)
from compile_policy_transformers.releases import DummyLayer

#: What the numbers are kept in: no layer has states of that kind, so it shows which tensors are states.
_NUMBERS = torch.float64
#: Operations that put states elsewhere, and leave them what they are.
_MOVING = {
    *("alias", "cat", "clone", "copy_", "detach", "empty_like", "expand", "index", "index_copy", "index_copy_"),
    *("index_put", "index_put_", "index_select", "lift_fresh", "narrow", "new_empty", "new_zeros", "roll", "select"),
    *("slice", "split", "split_with_sizes", "squeeze", "unbind", "unsqueeze", "view", "_unsafe_view", "zero_"),
    "zeros_like",
}
#: Further apart than a cache has states.
_FAR = 2.0**30
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class Moves:
    """What one call does to layers in the same condition. Numbers: 0 is a state of zeros, then come the states of each
    block one after the other, then those of the call.

    Attributes:
        seen: of the states that attention sees, in order.
        kept: for each block, of the states that it holds afterwards.
        after: the updated copy.
        in_place: for each block, whether the layer writes into it.
    """

    seen: torch.Tensor
    kept: tuple[torch.Tensor, ...]
    after: Any
    in_place: tuple[bool, ...]


class _OnlyMoves(TorchDispatchMode):
    """Inside the block, an operation that does more with states than to move them is refused."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op.overloadpacket.__name__ not in _MOVING:
            states = any(isinstance(x, torch.Tensor) and _is_state(x) for x in pytree.tree_leaves((args, kwargs)))
            if states:
                raise NotCompilable(f"computes {op.overloadpacket.__name__} of states")
        return op(*args, **kwargs)


# -- layers of a call -------------------------------------------------------------------------------------------------


def groups(cache: Cache) -> dict[int, int]:
    """Layers of a class of their own -> number of the group that is in the same condition."""
    found: dict[int, int] = {}
    numbers: dict[tuple[Any, ...], int] = {}
    for i, layer in enumerate(cache.layers):
        if type(layer) not in KINDS and type(layer) is not DummyLayer and kind_of(layer) == MOVED:
            found[i] = numbers.setdefault(condition(layer), len(numbers))
    return found


def seen_label(group: int) -> str:
    """Label of the number of states that attention sees in layers of a group."""
    return f"seen_{group}"


def flatten(layer: Any, group: int, out: Leaves, path: str) -> tuple[Any, ...]:
    """Add what a layer holds to the leaves of a call; spec of the layer."""
    held = blocks(layer)
    if not held:
        raise NotCompilable("a layer of the cache holds no states yet")
    for n, block in enumerate(held):
        for name, tensor in (("keys", block.keys), ("values", block.values)):
            out.add(tensor, f"{path}.blocks[{n}].{name}", ("batch", None, f"held_{group}_{n}", None))
    return (MOVED, group, len(held))


def flatten_moves(
    cache: Cache, numbers: Mapping[int, int], new: int, moved: dict[int, Moves], out: Leaves, path: str
) -> tuple[int, ...]:
    """Add the index tensors of each group; the number of blocks of each.

    Args:
        numbers: `groups` of the cache.
        new: tokens of the call.
        moved: gets what the call does to each layer.
    """
    asked: dict[int, Moves] = {}
    layers: list[Any] = cache.layers
    for i, group in numbers.items():
        if group not in asked:
            held = blocks(layers[i])
            asked[group] = moves = ask(layers[i], held, new)
            device = held[0].keys.device
            out.add(moves.seen.to(device), f"{path}.seen[{group}]", (seen_label(group),), filler=_any_states)
            for n, index in enumerate(moves.kept):
                label = f"kept_{group}_{n}"
                out.add(index.to(device), f"{path}.kept[{group}][{n}]", (label,), filler=_any_states)
        moved[i] = asked[group]
    return tuple(len(moves.kept) for moves in asked.values())


def _any_states(sizes: Mapping[str, int], shape: Sequence[int]) -> torch.Tensor:
    """Any valid index does for an example."""
    return torch.arange(shape[0]) % (1 + sizes["sequence"])


# -- one layer --------------------------------------------------------------------------------------------------------


def condition(layer: Any) -> tuple[Any, ...]:
    """What layers that move states alike have in common. Hashable.

    Raises:
        NotCompilable: the layer holds something that is neither a tensor nor a constant.
    """
    found: list[Any] = [type(layer)]
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            counts = value.dim() <= 1 and not value.is_floating_point()
            found.append((name, tuple(value.reshape(-1).tolist()) if counts else value.shape))
        elif isinstance(value, _CONSTANTS):
            found.append((name, value))
        else:
            raise refused(layer, f"holds a {type(value).__name__} in {name}")
    return tuple(found)


def ask(layer: Any, held: Sequence[Block], new: int) -> Moves:
    """Which states go where when ``new`` of them come in; the layer is not changed.

    Args:
        held: the layer's `blocks`.

    Raises:
        NotCompilable: it does more than to move states.
    """
    keys, values = held[0].keys, held[0].values
    try:  # most layers do not look at how many heads there are
        return _asked(layer, held, (2, 2), (2, 2), new)
    except Exception:
        return _asked(layer, held, (keys.shape[0], keys.shape[1]), (keys.shape[3], values.shape[3]), new)


def _twin(layer: Any) -> Any:
    """A copy of a layer that holds numbers for states."""
    twin: Any = object.__new__(type(layer))
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            value = torch.empty(0, dtype=_NUMBERS) if is_held(value) else value.detach().to("cpu", copy=True)
        elif isinstance(value, torch.dtype) and value.is_floating_point:
            value = _NUMBERS
        elif isinstance(value, torch.device):
            value = torch.device("cpu")
        setattr(twin, name, value)
    return twin


def check_lazy(cache: Cache, shapes: Sequence[LayerShape]) -> None:
    """Refuse layers that do not do the same when they get their tensors before their first states arrive.

    Asked on copies of the layers, with numbers for states: nothing in the cache changes.

    Raises:
        NotCompilable: a layer does more with states than to move them, or has to stay as it is until they arrive.
    """
    layers: list[Any] = list(cache.layers)
    if cache.layer_class_to_replicate is not None and kind_of_class(cache.layer_class_to_replicate) == MOVED:
        while len(layers) < len(shapes):  # as its first call does
            layers.append(cache.layer_class_to_replicate())
        cache.layers[:] = layers
    known: set[Any] = set()
    for layer, shape in zip(layers, shapes, strict=False):
        own = type(layer) is not DummyLayer and type(layer) not in KINDS and kind_of(layer) == MOVED
        if not own or layer.is_initialized or shape.keys is None or shape.values is None:
            continue
        kind = (condition(layer), shape.keys.shape, shape.values.shape)
        if kind not in known:
            _check_one(layer, shape.keys, shape.values)
            known.add(kind)


def _check_one(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    rows, dims = (keys.shape[0], keys.shape[1]), (keys.shape[3], values.shape[3])
    states = [_repeated(torch.arange(1, 4, dtype=_NUMBERS), rows, dim) for dim in dims]
    found = []
    for early in (False, True):
        twin = _twin(layer)
        try:
            with torch.no_grad(), _OnlyMoves():
                if early:
                    initialise_layer(twin, states[0][:, :, :0].clone(), states[1][:, :, :0].clone())
                seen = [t.clone() for t in _updated(twin, [t.clone() for t in states])]
        except NotCompilable as why:
            raise refused(layer, why.reason) from None
        except Exception as error:
            what = "has to get its tensors from its first states" if early else f"fails on numbers: {first_line(error)}"
            raise refused(layer, what) from error
        found.append((seen, vars(twin)))
    (seen, held), (seen_early, held_early) = found
    same = held.keys() == held_early.keys() and all(_equal(held[name], held_early[name]) for name in held)
    if not (same and all(map(_equal, seen, seen_early))):
        raise refused(layer, "has to get its tensors from its first states")


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b) or a.numel() == b.numel() == 0
    return type(a) is type(b) and bool(a == b)


def _asked(layer: Any, held: Sequence[Block], rows: tuple[int, int], dims: tuple[int, int], new: int) -> Moves:
    twin = _twin(layer)
    first, memory = 1, []
    for block in held:
        numbers = torch.arange(first, first + block.keys.shape[2], dtype=_NUMBERS)
        wholes = [_repeated(numbers, rows, dim) for dim in dims]
        memory.append(compat.storage_of(wholes[0]))
        for name, start, count in block.views:
            for part, whole in zip((name, name.replace("key", "value")), wholes, strict=True):
                if getattr(layer, part).dim() == 4:
                    setattr(twin, part, whole.narrow(2, start, count))
        first += numbers.numel()
    states = [_repeated(torch.arange(first, first + new, dtype=_NUMBERS), rows, dim) for dim in dims]
    try:
        with torch.no_grad(), _OnlyMoves():
            seen = _updated(twin, states)
    except NotCompilable as why:
        raise refused(layer, why.reason) from None
    except Exception as error:  # what is wrong with the call itself, eager says too
        raise refused(layer, f"fails on numbers: {first_line(error)}") from error
    after = blocks(twin)
    if len(after) != len(held):
        raise refused(layer, "keeps its states in more places than before")
    limit = first + new
    index = _read(layer, seen, rows, limit)
    kept = tuple(_read(layer, (b.keys, b.values), rows, limit) for b in after)
    written = zip(after, memory, held, strict=True)
    in_place = tuple(compat.storage_of(a.keys) == m and a.views == h.views for a, m, h in written)
    return Moves(index, kept, twin, in_place)


class _Unread(dict[str, Any]):
    """Arguments of attention that a layer may hand on, but not look at: a graph does not ask it again."""

    def _read(self, *_: Any, **__: Any) -> Any:
        raise NotCompilable("reads the arguments of attention")

    __getitem__ = __contains__ = __iter__ = __len__ = _read
    get = items = keys = values = pop = copy = _read


def _updated(twin: Any, states: Sequence[torch.Tensor]) -> Any:
    """What attention sees after an update, called as attention calls it since Transformers 5.24 where it may be."""
    takes = inspect.signature(twin.update).parameters.values()
    if any(p.name == "kwargs" or p.kind is p.VAR_KEYWORD for p in takes):
        return twin.update(*states, kwargs=_Unread())
    return twin.update(*states)


def _repeated(numbers: torch.Tensor, rows: tuple[int, int], dim: int) -> torch.Tensor:
    """The same states in all rows, heads and dims, whose numbers say where they belong."""
    return numbers[None, None, :, None] + _homes(rows, dim)


def _homes(rows: tuple[int, int], dim: int) -> torch.Tensor:
    """(batch, heads, 1, dim): what is added to the numbers of states there."""
    return torch.arange(rows[0] * rows[1] * dim, dtype=_NUMBERS).view(*rows, 1, dim) * _FAR


def _read(layer: Any, pair: Sequence[torch.Tensor], rows: tuple[int, int], limit: int) -> torch.Tensor:
    """The numbers in keys and values, which have to be the same."""
    found = []
    for tensor in pair:
        if tensor.dim() != 4 or tuple(tensor.shape[:2]) != rows:
            raise refused(layer, "keeps states in an order of its own")
        here = torch.where(tensor == 0, tensor, tensor - _homes(rows, tensor.shape[3]))
        index = here[0, 0, :, 0]
        if not torch.equal(here, index[None, None, :, None].expand_as(here)):
            raise refused(layer, "moves states from row to row, or memory that was not written")
        found.append(index)
    if not torch.equal(*found):
        raise refused(layer, "treats values in another way than keys")
    index = found[0].to(torch.long)
    if bool(((index < 0) | (index >= limit)).any()) or not torch.equal(index.to(_NUMBERS), found[0]):
        raise refused(layer, "hands out memory that was not written")
    return index


def settle(layer: Any, moves: Moves, held: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Give the layer what it holds after the call.

    Args:
        held: keys and values of each block, as the graph made them.
    """
    before, after = blocks(layer), blocks(moves.after)
    for name, value in vars(moves.after).items():
        own = getattr(layer, name)
        if isinstance(value, torch.Tensor):
            if not is_held(value) and isinstance(own, torch.Tensor) and own.shape == value.shape:
                own.copy_(value)
            elif not is_held(value):
                setattr(layer, name, value.to(held[0][0].device, copy=True))
        elif not isinstance(value, (torch.dtype, torch.device)):
            setattr(layer, name, value)
    for old, new, (keys, values), written in zip(before, after, held, moves.in_place, strict=True):
        if written and old.keys.numel():
            old.keys.copy_(keys)
            old.values.copy_(values)
            continue
        made = Block(keys, values, new.views)
        for name, start, count, whole in made.parts():
            setattr(layer, name, whole.narrow(2, start, count) if len(new.views) > 1 else whole)


def _is_state(tensor: torch.Tensor) -> bool:
    return tensor.dtype is _NUMBERS
