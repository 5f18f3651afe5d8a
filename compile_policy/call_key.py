"""Identity of a call: its tensors, and everything about it that a graph takes for granted.

A call flattens to tensors (*leaves*) and a hashable *spec* of all the rest. Spec and leaf metadata together are the
call key: two calls with one key may use one entry (whose own shape conditions are checked besides).
Types that are no tensor, constant or plain container travel through an `ArgumentAdapter`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from compile_policy.errors import NotCompilable
from compile_policy.example import Filler
from compile_policy.shapes import IntermediateTensors, Labels

CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum, type)
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

    ``label`` says which dims vary; an adapter that knows better passes labels of its own to `add`.
    """

    label: LabelFn
    fillers: Mapping[str, Filler] = field(default_factory=dict)
    tensors: list[torch.Tensor] = field(default_factory=list)
    labels: list[Labels] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    example_fillers: list[Filler | None] = field(default_factory=list)

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
            tensor: a strided tensor; made contiguous where it isn't, since strides are no part of the key.
            path: where it stands in the call.
            labels: label of each dim; asked of ``label`` when not given.
            mutable: the graph writes into it, so that a copy would not do.
            filler: how to fill the example, where random values would not do.
        """
        if type(tensor) is not torch.Tensor and not isinstance(tensor, torch.nn.Parameter):
            raise NotCompilable(f"argument {path} is a {type(tensor).__name__}, a tensor subclass with its own rules")
        if tensor.layout is not torch.strided:
            raise NotCompilable(f"argument {path} has layout {tensor.layout}; only strided tensors are compiled")
        if not tensor.is_contiguous():
            # Entries are compiled for contiguous inputs: strides stay out of the key.
            if mutable:
                raise NotCompilable(f"argument {path} is written in place and is not contiguous")
            tensor = tensor.contiguous()
        self.tensors.append(tensor)
        self.labels.append(labels if labels is not None else self.label(path, tensor))
        self.paths.append(path)
        self.example_fillers.append(filler or self.fillers.get(path))


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

    def description(self) -> Call:
        """The call without its tensors and values, to be kept without keeping them alive."""
        return replace(self, leaves=[], values={}, example=None)


def make_call(
    values: Mapping[str, Any],
    label: LabelFn,
    extra: tuple[Any, ...] = (),
    fillers: Mapping[str, Filler] | None = None,
    sizes: Mapping[str, int] | None = None,
    example: Callable[[], Mapping[str, Any]] | None = None,
) -> Call:
    """Flatten named arguments.

    Args:
        values: name -> argument.
        label: labels of a tensor argument from its path.
        extra: further parts of the key (modes, fingerprint).
        fillers: path -> how to fill the example of that tensor.
        sizes: label -> size in the example, where one of its own would not do.
        example: makes the arguments of a whole example call.

    Raises:
        NotCompilable: an argument that cannot be passed to a graph.
    """
    out = Leaves(label, fillers or {})
    spec = tuple((name, flatten(value, out, name)) for name, value in values.items())
    metadata = tuple(_metadata(t, ls) for t, ls in zip(out.tensors, out.labels, strict=True))
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
    )


def _metadata(t: torch.Tensor, labels: Labels) -> tuple[Any, ...]:
    static = tuple(s if label is None else -1 for s, label in zip(t.shape, labels, strict=True))
    return (t.dtype, t.device, static, t.requires_grad)


def flatten(value: Any, out: Leaves, path: str) -> Any:
    """Spec of ``value``; its tensors go to ``out``."""
    if isinstance(value, torch.Tensor):
        out.add(value, path)
        return ("tensor",)
    if isinstance(value, CONSTANTS):
        return ("const", value.__class__, value)  # the class too: True == 1 == 1.0
    if type(value) in (list, tuple):
        return (
            "list" if type(value) is list else "tuple",
            tuple(flatten(v, out, f"{path}[{i}]") for i, v in enumerate(value)),
        )
    if type(value) is dict:
        return ("dict", tuple((k, flatten(v, out, f"{path}[{k!r}]")) for k, v in sorted(value.items(), key=_by_name)))
    adapter = adapter_for(type(value))
    if adapter is None:
        raise NotCompilable(
            f"argument {path} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be passed to a graph",
            remedy="Register an adapter for the type with compile_policy.call_key.register_adapter.",
        )
    return ("adapted", type(value), adapter.flatten(value, out, path))


def _by_name(item: tuple[Any, Any]) -> str:
    return str(item[0])


def rebuild(spec: Any, leaves: Iterator[torch.Tensor]) -> Any:
    """The arguments again, around ``leaves``. Runs inside the trace."""
    kind = spec[0]
    if kind == "tensor":
        return next(leaves)
    if kind == "const":
        return spec[2]
    if kind == "list":
        return [rebuild(s, leaves) for s in spec[1]]
    if kind == "tuple":
        return tuple([rebuild(s, leaves) for s in spec[1]])
    if kind == "dict":
        return {k: rebuild(s, leaves) for k, s in spec[1]}
    adapter = adapter_for(spec[1])
    assert adapter is not None
    return adapter.rebuild(spec[2], leaves)


def collect_state(spec: Any, value: Any) -> list[torch.Tensor]:
    """New state of every adapted argument below ``value``. Runs inside the trace."""
    kind = spec[0]
    if kind in ("list", "tuple"):
        return [t for s, v in zip(spec[1], value, strict=True) for t in collect_state(s, v)]
    if kind == "dict":
        return [t for k, s in spec[1] for t in collect_state(s, value[k])]
    if kind == "adapted":
        adapter = adapter_for(spec[1])
        assert adapter is not None
        return list(adapter.state(spec[2], value))
    return []


def public_value(value: Any) -> Any:
    """An argument as the caller knows it."""
    adapter = adapter_for(type(value))
    return value if adapter is None else adapter.public(value)


class _IntermediateTensorsAdapter:
    def flatten(self, value: IntermediateTensors, out: Leaves, path: str) -> Any:
        for name, tensor in value.items():
            out.add(tensor, f"{path}.{name}")
        return tuple(name for name, _ in value.items())

    def rebuild(self, spec: Any, leaves: Iterator[torch.Tensor]) -> IntermediateTensors:
        return IntermediateTensors({name: next(leaves) for name in spec})

    def state(self, spec: Any, value: IntermediateTensors) -> list[torch.Tensor]:
        return []

    def write_back(self, spec: Any, value: IntermediateTensors, state: list[torch.Tensor]) -> None:
        return None

    def public(self, value: IntermediateTensors) -> IntermediateTensors:
        return value


register_adapter(IntermediateTensors, _IntermediateTensorsAdapter())
