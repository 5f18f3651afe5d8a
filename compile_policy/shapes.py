"""Dynamic dims of a call: inferred from annotations, given by the author, turned into labels.

A *label* names a size that may differ from call to call ("batch", "sequence", ...). Two dims with one label have
equal sizes in every call of an entry; dims without a label are static and belong to the call key.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from compile_policy.annotations import annotated_tensors
from compile_policy.annotations import container_types as container_types
from compile_policy.annotations import register_container as register_container
from compile_policy.errors import DecorationError

#: What an author may write for one argument: a dim, several dims, or dims with a shape id each.
DimSpec = int | Sequence[int] | Mapping[int, str | None]
#: The same, normalised: dim -> shape id (``None`` when the author gave none).
ArgDims = dict[str, dict[int, str | None]]
Labels = tuple[str | None, ...]
#: First character of a label whose dims are traced without assumptions on their size.
UNBACKED = "?"


class IntermediateTensors:
    """Named hidden states that one pipeline stage hands to the next.

    A plain container with a written-out ``__init__``: Dynamo follows attributes of such a class to their source,
    which it cannot do through a generated dataclass constructor.

    Args:
        tensors: name -> tensor; dim 0 of each is the token (or batch) dimension.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, key: str | slice) -> Any:
        if isinstance(key, str):
            return self.tensors[key]
        return IntermediateTensors({name: t[key] for name, t in self.tensors.items()})

    def __setitem__(self, key: str, value: torch.Tensor) -> None:
        self.tensors[key] = value

    def items(self) -> typing.ItemsView[str, torch.Tensor]:
        return self.tensors.items()

    def __len__(self) -> int:
        return len(self.tensors)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, IntermediateTensors)
            and self.tensors.keys() == other.tensors.keys()
            and all(torch.equal(t, other.tensors[n]) for n, t in self.tensors.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"IntermediateTensors({ {n: tuple(t.shape) for n, t in self.tensors.items()} })"

    @classmethod
    def empty_like(cls, other: IntermediateTensors) -> IntermediateTensors:
        """Receive buffers of the same names, shapes and dtypes."""
        return cls({n: torch.empty_like(t) for n, t in other.items()})


register_container(IntermediateTensors, lambda value: dict(value.items()))
pytree.register_pytree_node(
    IntermediateTensors,
    lambda value: (list(value.tensors.values()), list(value.tensors)),
    lambda parts, names: IntermediateTensors(dict(zip(names, parts, strict=True))),
    serialized_type_name="compile_policy.IntermediateTensors",
    flatten_with_keys_fn=lambda value: ([(pytree.MappingKey(n), t) for n, t in value.items()], list(value.tensors)),
)


def infer_dynamic_arg_dims(cls: type) -> ArgDims:
    """Infer dims that vary from the annotations of ``cls.forward``: dim 0 of every tensor.

    The tensors may be arguments, or lie in containers; `annotations` lists what is understood.

    Raises:
        DecorationError: no argument is annotated as a tensor.
    """
    dims: ArgDims = {name: {0: None} for name in annotated_tensors(forward_of(cls))}
    if not dims:
        raise DecorationError(
            f"{cls.__qualname__}.forward has no argument annotated as a tensor, so no dynamic dimension was found.",
            remedy="Annotate the tensor arguments (for example `x: torch.Tensor`) or pass dynamic_arg_dims={'x': 0}.",
        )
    return dims


def normalise(cls: type, dims: Mapping[str, DimSpec]) -> ArgDims:
    """``{"x": 0, "y": [0, -1], "z": {0: "tokens"}}`` as ``dim -> shape id`` per argument.

    Raises:
        DecorationError: an argument that ``forward`` does not have, or a dim that is no integer.
    """
    known = _parameters(cls)
    takes_any = any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(forward_of(cls)).parameters.values()
    )
    result: ArgDims = {}
    for name, spec in dims.items():
        if name not in known and not takes_any:
            raise DecorationError(
                f"{cls.__qualname__}.forward has no argument {name!r}.",
                remedy=f"Its arguments are {', '.join(known) or 'none'}.",
            )
        result[name] = _one(cls, name, spec)
    return result


def labels_for(tensor: torch.Tensor, dims: Mapping[int, str | None], where: str) -> Labels:
    """Labels of one tensor argument; a dim without a shape id is grouped with dims of equal size and position.

    Raises:
        DecorationError: a dim that the tensor does not have.
    """
    result: list[str | None] = [None] * tensor.dim()
    for dim, shape_id in dims.items():
        if not -tensor.dim() <= dim < tensor.dim():
            raise DecorationError(
                f"dynamic_arg_dims names dim {dim} of {where}, which has {tensor.dim()} dims.",
                remedy="Name a dim that exists; negative dims count from the end.",
            )
        at = dim % tensor.dim()
        size = tensor.shape[at]
        result[at] = shape_id or (f"size {size}" if size > 1 else f"size {size} of dim {at}")
    return tuple(result)


def pattern(labels: Sequence[Labels]) -> tuple[tuple[int, ...], ...]:
    """Which dims share a label, without the labels' names (which may hold sizes); -1 is a static dim."""
    numbers: dict[str | None, int] = {None: -1}
    return tuple(tuple([numbers.setdefault(n, len(numbers)) for n in names]) for names in labels)


def _one(cls: type, name: str, spec: DimSpec) -> dict[int, str | None]:
    if isinstance(spec, Mapping):
        items: list[tuple[Any, str | None]] = list(spec.items())
    else:
        items = [(d, None) for d in ([spec] if isinstance(spec, int) else spec)]
    for dim, _ in items:
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise DecorationError(
                f"dynamic_arg_dims of {cls.__qualname__}: {name!r} has {dim!r} where a dimension number is expected.",
                remedy="Write an integer, a list of integers, or {dim: 'shape id'}.",
            )
    return dict(items)


def forward_of(cls: type) -> Callable[..., Any]:
    """Return the ``forward`` that the author wrote, below wrappers by ``functools.wraps``."""
    forward: Callable[..., Any] = inspect.unwrap(cls.__dict__.get("forward") or getattr(cls, "forward"))  # noqa: B009
    return forward


def _parameters(cls: type) -> list[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(forward_of(cls)).parameters.values())[1:]
    return [p.name for p in parameters if p.kind not in kinds]
