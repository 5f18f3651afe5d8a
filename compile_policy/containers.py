"""Containers of arguments and results taken apart and put together: pytree nodes, and data classes of the user's.

Torch's pytree registry says how a container becomes parts. A data class that nobody registered there is taken apart by
its attributes, without registering it: that would change what ``tree_map`` does with it elsewhere.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from compile_policy.errors import NotCompilable

#: One step from a container to a part: ``("attribute", name)``, ``("item", key)`` or ``("child", flatten, number)``.
Step = tuple[Any, ...]
IsLeaf = Callable[[Any], bool]


def node_type(value: Any) -> Any:
    """Return what ``value`` is registered as in torch's pytree registry; ``None`` for a leaf."""
    kind = pytree.namedtuple if pytree.is_namedtuple_instance(value) else type(value)  # type: ignore[attr-defined]
    return kind if kind in pytree.SUPPORTED_NODES else None


def is_data(value: Any) -> bool:
    """True for an instance of a data class that is neither a pytree node, a tensor nor a module."""
    if not dataclasses.is_dataclass(value) or isinstance(value, (type, torch.Tensor, torch.nn.Module)):
        return False
    return node_type(value) is None


def data_of(value: Any) -> dict[str, Any]:
    """Return the attributes of a data class instance by name: all that it holds, fields or not."""
    held = dict(getattr(value, "__dict__", {}))
    for field in dataclasses.fields(value):
        if field.name not in held and hasattr(value, field.name):
            held[field.name] = getattr(value, field.name)
    return held


def make_data(cls: type, names: Sequence[str], parts: Sequence[Any]) -> Any:
    """Return an instance of a data class that holds ``parts``, without running its constructor."""
    made: Any = object.__new__(cls)
    for name, part in zip(names, parts, strict=True):
        object.__setattr__(made, name, part)
    return made


class DataParts:
    """A data class instance as a pytree node; it is unflattened to the instance itself."""

    def __init__(self, cls: type, held: dict[str, Any]) -> None:
        self.cls = cls
        self.held = held


def _class_name(context: tuple[type, tuple[str, ...]]) -> list[Any]:
    cls, names = context
    if _found(cls.__module__, cls.__qualname__) is not cls:
        raise ValueError(f"{cls.__qualname__} cannot be found by its name")
    return [cls.__module__, cls.__qualname__, list(names)]


def _class_named(dumped: Sequence[Any]) -> tuple[type, tuple[str, ...]]:
    cls = _found(dumped[0], dumped[1])
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"{dumped[0]}.{dumped[1]} is no data class of this process")
    return cls, tuple(dumped[2])


def _found(module: str, qualname: str) -> Any:
    """Return what stands under a dotted name in a module that is loaded; nothing is imported."""
    value: Any = sys.modules.get(module)
    for part in qualname.split("."):
        value = getattr(value, part, None)
    return value


pytree.register_pytree_node(
    DataParts,
    lambda value: (list(value.held.values()), (value.cls, tuple(value.held))),
    lambda parts, context: make_data(context[0], context[1], list(parts)),
    serialized_type_name="compile_policy.DataParts",
    to_dumpable_context=_class_name,
    from_dumpable_context=_class_named,
)


def flattened(value: Any, is_leaf: IsLeaf) -> tuple[list[tuple[tuple[Step, ...], Any]], pytree.TreeSpec]:
    """Return the leaves of a result in the order of pytree, each with the steps to it, and the structure.

    Args:
        is_leaf: True for what is not to be taken apart.
    """
    wrapped = _wrapped(value, is_leaf)
    leaves, tree = pytree.tree_flatten(wrapped, is_leaf=is_leaf)
    found = list(_walk(value, is_leaf, ()))
    assert len(found) == len(leaves), "the steps and the leaves of a result are as many"
    return found, tree


def _wrapped(value: Any, is_leaf: IsLeaf) -> Any:
    """Replace data classes by pytree nodes, at every depth."""

    def replace(part: Any) -> Any:
        if is_leaf(part) or not is_data(part):
            return part
        return DataParts(type(part), {name: _wrapped(held, is_leaf) for name, held in data_of(part).items()})

    return pytree.tree_map(replace, value, is_leaf=lambda part: is_leaf(part) or is_data(part))


def _walk(value: Any, is_leaf: IsLeaf, steps: tuple[Step, ...]) -> Iterator[tuple[tuple[Step, ...], Any]]:
    parts = None if is_leaf(value) else parts_of(value)
    if parts is None:
        yield steps, value
        return
    for step, part in parts:
        yield from _walk(part, is_leaf, (*steps, step))


def parts_of(value: Any) -> list[tuple[Step, Any]] | None:
    """Return the parts of a container with the step to each, in the order of pytree; ``None`` for a leaf."""
    if is_data(value):
        return [(("attribute", name), part) for name, part in data_of(value).items()]
    kind = node_type(value)
    if kind is None:
        return None
    node = pytree.SUPPORTED_NODES[kind]
    children = list(node.flatten_fn(value)[0])
    keys = [None] * len(children) if node.flatten_with_keys_fn is None else [k for k, _ in _keyed(node, value)]
    return [(_step(node, value, i, key, part), part) for i, (key, part) in enumerate(zip(keys, children, strict=True))]


def _keyed(node: Any, value: Any) -> list[tuple[Any, Any]]:
    return list(node.flatten_with_keys_fn(value)[0])


def _step(node: Any, value: Any, number: int, key: Any, part: Any) -> Step:
    """The plainest step that leads to the part: Dynamo follows attributes and items without the registry."""
    steps: list[Step] = []
    if isinstance(key, pytree.GetAttrKey):
        steps = [("attribute", key.name)]
    elif isinstance(key, pytree.MappingKey):
        steps = [("item", key.key)]
    elif isinstance(key, pytree.SequenceKey):
        steps = [("item", key.idx)]
    for step in steps:
        try:
            if follow(value, (step,)) is part:
                return step
        except Exception:  # the key is a name for people
            break
    return ("child", node.flatten_fn, number)


def follow(value: Any, steps: Sequence[Step]) -> Any:
    """Return the part that ``steps`` lead to. Runs inside the trace too."""
    for step in steps:
        if step[0] == "attribute":
            value = getattr(value, step[1])
        elif step[0] == "item":
            value = value[step[1]]
        else:
            value = step[1](value)[0][step[2]]
    return value


def context_of(value: Any) -> Any:
    """Return what pytree keeps of a node beside its parts."""
    return pytree.SUPPORTED_NODES[node_type(value)].flatten_fn(value)[1]


def children_of(kind: Any, value: Any) -> list[Any]:
    """Return the parts of a pytree node of this kind. Runs inside the trace too."""
    return list(pytree.SUPPORTED_NODES[kind].flatten_fn(value)[0])


def make_node(kind: Any, parts: list[Any], context: Any) -> Any:
    """Return a pytree node again. Runs inside the trace too."""
    return pytree.SUPPORTED_NODES[kind].unflatten_fn(parts, context)


def spelled(step: Step) -> str:
    """Write a step as one would in Python, with the number where there is no better."""
    if step[0] == "attribute":
        return f".{step[1]}"
    return f"[{step[1]!r}]" if step[0] == "item" else f"[{step[2]}]"


def contents(value: Any, is_leaf: IsLeaf) -> list[tuple[tuple[Step, ...], Any]]:
    """Return all that a nest of containers holds, each with the steps to it, to be compared by `same_contents`."""
    return list(_walk(value, is_leaf, ()))


def same_contents(before: list[tuple[tuple[Step, ...], Any]], after: list[tuple[tuple[Step, ...], Any]]) -> bool:
    """True if two looks at a nest of containers found the same objects in the same places."""
    if [steps for steps, _ in before] != [steps for steps, _ in after]:
        return False
    return all(a is b for (_, a), (_, b) in zip(before, after, strict=True))


def changed(name: str) -> NotCompilable:
    """Return the refusal of a forward that writes into a container which it was given."""
    return NotCompilable(
        f"its forward changes the argument {name}, which the caller would not see",
        remedy="Return what is new, instead of writing it into an argument.",
    )
