"""Identity of a call: its tensors, and everything about it that a graph takes for granted.

A call flattens to tensors (*leaves*) and a hashable *spec* of all the rest. Spec and leaf metadata together are the
call key: two calls with one key may use one entry (whose own shape conditions are checked besides).
Types that are no tensor, constant or plain container travel through an `ArgumentAdapter`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from compile_policy import containers
from compile_policy.adapters import ArgumentAdapter as ArgumentAdapter
from compile_policy.adapters import LabelFn, Leaves
from compile_policy.adapters import adapter_for as adapter_for
from compile_policy.adapters import register_adapter as register_adapter
from compile_policy.errors import NotCompilable
from compile_policy.example import Filler
from compile_policy.shapes import Labels

CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum, type)


class NotPassable(NotCompilable):
    """An argument that cannot go through a graph; it may all the same, if nobody reads it there."""


class Opaque:
    """An argument of a class that no graph knows, handed through a trace to find out whether it is read.

    Equal for objects of one class: what else such an object is, no graph depends on.

    Attributes:
        value: the object, as long as it is needed.
        reason, remedy: what a forward that reads it is told.
    """

    def __init__(self, value: Any, why: NotCompilable) -> None:
        self.cls = type(value)
        self.value = value
        self.reason, self.remedy = why.reason, why.remedy  # not the exception, whose traceback holds the call

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and self.cls is other.cls

    def __hash__(self) -> int:
        return hash(self.cls)

    def __repr__(self) -> str:
        return self.cls.__name__


@dataclass(frozen=True)
class Call:
    """One call, made canonical.

    Attributes:
        key: hashable; equal for calls that may share an entry.
        spec: how to rebuild the arguments inside the trace.
        leaves: the tensors, contiguous.
        labels: per leaf, the label of each dim (``None``: static).
        paths: per leaf, where it stands in the call, for people.
        values: arguments as given, by name (their state is written back after the call).
        mutable: leaves that an adapter lets the graph write into.
        marks: leaves that are causal marks, which not every graph takes.
        copied: leaf -> the tensor as given, where the leaf is a contiguous copy of it.
        finish: makes the component's result of that of the graph, where it is more.
    """

    key: tuple[Any, ...]
    spec: Any
    leaves: list[torch.Tensor]
    labels: list[Labels]
    paths: list[str]
    fillers: list[Filler | None]
    sizes: Mapping[str, int]
    values: Mapping[str, Any]
    label: LabelFn
    example: Callable[[], Mapping[str, Any]] | None = None
    frequent: Mapping[str, int] = field(default_factory=dict)
    mutable: frozenset[int] = frozenset()
    marks: tuple[int, ...] = ()
    copied: Mapping[int, torch.Tensor] = field(default_factory=dict)
    finish: Callable[[Any], Any] | None = None

    def description(self, unread: Collection[str] = ()) -> Call:
        """The call without its tensors and values, to be kept without keeping them alive.

        Args:
            unread: arguments that the graph does not depend on.
        """
        key = self.key_without(unread)
        return replace(self, key=key, spec=key[0], leaves=[], values={}, example=None, copied={}, finish=None)

    def key_without(self, unread: Collection[str]) -> tuple[Any, ...]:
        """The key in which the values of these arguments are left out; that they are given, and their class, is not."""
        if not unread:
            return self.key
        spec = tuple([(name, _unread(s) if name in unread else s) for name, s in self.spec])
        return (spec, *self.key[1:])

    def unread(self, read: Collection[int]) -> frozenset[str]:
        """Arguments without tensors but those with these numbers."""
        constants = self.constants()
        return frozenset(name for i, (name, _) in enumerate(self.spec) if name in constants and i not in read)

    def objects(self) -> frozenset[str]:
        """Arguments that cannot be passed to a graph."""
        return frozenset([name for name, s in self.spec if s[0] == "object"])

    def forget_objects(self) -> None:
        """Let go of the arguments that cannot be passed to a graph: what was captured may refer to their carriers."""
        for _, s in self.spec:
            if s[0] == "object":
                s[1].value = None

    def constants(self) -> dict[str, Any]:
        """Arguments that are no tensors and hold none: name -> spec."""
        return {name: s for name, s in self.spec if s[0] in ("const", "object")}


def make_call(
    values: Mapping[str, Any],
    label: LabelFn,
    extra: tuple[Any, ...] = (),
    fillers: Mapping[str, Filler] | None = None,
    sizes: Mapping[str, int] | None = None,
    example: Callable[[], Mapping[str, Any]] | None = None,
    frequent: Mapping[str, int] | None = None,
    finish: Callable[[Any], Any] | None = None,
) -> Call:
    """Flatten named arguments.

    Args:
        values: name -> argument.
        label: labels of a tensor argument from its path.
        extra: further parts of the key (modes, fingerprint).
        fillers: path -> how to fill the example of that tensor.
        sizes: label -> size in the example, where one of its own would not do.
        example: makes the arguments of a whole example call.
        frequent: label -> size in most calls.
        finish: makes the component's result of that of the graph.

    Raises:
        NotCompilable: an argument that cannot be passed to a graph.
    """
    out = Leaves(label, fillers or {})
    spec = tuple([(name, _argument(value, out, name)) for name, value in values.items()])
    metadata = tuple(metadata_of(t, ls) for t, ls in zip(out.tensors, out.labels, strict=True))
    return Call(
        key=(spec, metadata, *extra),
        spec=spec,
        leaves=out.tensors,
        labels=out.labels,
        paths=out.paths,
        fillers=out.example_fillers,
        sizes=sizes or {},
        values=values,
        label=label,
        example=example,
        frequent=frequent or {},
        mutable=frozenset(out.mutable),
        marks=tuple(out.marks),
        copied=out.copied,
        finish=finish,
    )


def metadata_of(t: torch.Tensor, labels: Labels) -> tuple[Any, ...]:
    static = tuple(s if label is None else -1 for s, label in zip(t.shape, labels, strict=True))
    return (t.dtype, t.device, static, t.requires_grad)


def _argument(value: Any, out: Leaves, name: str) -> Any:
    """Spec of a whole argument; one that cannot be passed to a graph may turn out not to be read."""
    before = len(out.tensors)
    try:
        return flatten(value, out, name)
    except NotPassable as why:
        if len(out.tensors) > before:
            raise
        return ("object", Opaque(value, why))


def _unread(spec: Any) -> Any:
    """What is left in a key of an argument that is not read: its class, which code may ask without reading it."""
    return ("unread", spec[1] if spec[0] == "const" else spec[1].cls)


def flatten(value: Any, out: Leaves, path: str) -> Any:
    """Spec of ``value``; its tensors go to ``out``."""
    if isinstance(value, torch.Tensor):
        if value.is_conj() or value.is_neg():
            raise NotCompilable(f"argument {path} is a lazy conjugate", remedy="Pass argument.resolve_conj().")
        out.add(value, path)
        return ("tensor",)
    if isinstance(value, CONSTANTS):
        return _constant(value)
    if type(value) in (list, tuple):
        return (
            "list" if type(value) is list else "tuple",
            tuple(flatten(v, out, f"{path}[{i}]") for i, v in enumerate(value)),
        )
    if type(value) is dict:  # tensors in the order of the names, but given back in the dict's own order
        named = sorted(value.items(), key=lambda item: str(item[0]))
        return ("dict", tuple((k, flatten(v, out, f"{path}[{k!r}]")) for k, v in named), tuple(value))
    adapter = adapter_for(type(value))
    if adapter is not None:
        return ("adapted", type(value), adapter.flatten(value, out, path))
    parts = containers.parts_of(value)
    if parts is None:
        raise NotPassable(
            f"argument {path} is a {type(value).__module__}.{type(value).__qualname__}, "
            "which cannot be passed to a graph",
            remedy="Register an adapter for the type with compile_policy.call_key.register_adapter.",
        )
    return _container(value, parts, out, path)


def _container(value: Any, parts: Sequence[tuple[Any, Any]], out: Leaves, path: str) -> Any:
    """Spec of a pytree node or a data class, by its class, its context and its parts."""
    specs = tuple([flatten(part, out, f"{path}{containers.spelled(step)}") for step, part in parts])
    if containers.is_data(value):
        return ("data", type(value), tuple([step[1] for step, _ in parts]), specs)
    before = len(out.tensors)
    context = flatten(containers.context_of(value), out, path)
    if len(out.tensors) > before:
        raise NotCompilable(f"argument {path} is a {type(value).__qualname__} with tensors in its pytree context")
    return ("node", type(value), containers.node_type(value), context, specs)


def _constant(value: Any) -> Any:
    """Spec of a constant: equal only for values that no program can tell apart, whatever ``==`` says."""
    kind = value.__class__  # True == 1 == 1.0
    if isinstance(value, float):
        value = math.nan if value != value else value
        return ("const", kind, value, math.copysign(1.0, value))  # 0.0 == -0.0, and nan != nan
    if isinstance(value, complex):
        return ("const", kind, value, repr(value))
    return ("const", kind, value)


def rebuild(spec: Any, leaves: Iterator[torch.Tensor]) -> Any:
    """The arguments again, around ``leaves``. Runs inside the trace."""
    kind = spec[0]
    if kind == "tensor":
        return next(leaves)
    if kind == "const":
        return spec[2]
    if kind == "object":
        return spec[1].value
    if kind == "list":
        return [rebuild(s, leaves) for s in spec[1]]
    if kind == "tuple":
        return tuple([rebuild(s, leaves) for s in spec[1]])
    if kind == "dict":
        named = {k: rebuild(s, leaves) for k, s in spec[1]}
        return {k: named[k] for k in spec[2]}
    if kind == "data":
        return containers.make_data(spec[1], spec[2], [rebuild(s, leaves) for s in spec[3]])
    if kind == "node":
        parts = [rebuild(s, leaves) for s in spec[4]]
        return containers.make_node(spec[2], parts, rebuild(spec[3], leaves))
    adapter = adapter_for(spec[1])
    assert adapter is not None
    return adapter.rebuild(spec[2], leaves)


def adapted(spec: Any, value: Any) -> list[tuple[ArgumentAdapter, Any, Any]]:
    """(adapter, spec, value) of every adapted argument at or below ``value``, in order. Runs inside the trace too."""
    kind = spec[0]
    if kind in ("list", "tuple"):
        return [found for s, v in zip(spec[1], value, strict=True) for found in adapted(s, v)]
    if kind == "dict":
        return [found for k, s in spec[1] for found in adapted(s, value[k])]
    if kind == "data":
        return [found for n, s in zip(spec[2], spec[3], strict=True) for found in adapted(s, getattr(value, n))]
    if kind == "node":
        parts = containers.children_of(spec[2], value)
        return [found for s, v in zip(spec[4], parts, strict=True) for found in adapted(s, v)]
    if kind != "adapted":
        return []
    adapter = adapter_for(spec[1])
    assert adapter is not None
    return [(adapter, spec[2], value)]


def collect_state(spec: Any, value: Any) -> list[list[torch.Tensor]]:
    """New state of every adapted argument at or below ``value``. Runs inside the trace."""
    return [list(adapter.state(s, v)) for adapter, s, v in adapted(spec, value)]


def public_value(value: Any) -> Any:
    """An argument as the caller knows it."""
    adapter = adapter_for(type(value))
    return value if adapter is None else adapter.public(value)
