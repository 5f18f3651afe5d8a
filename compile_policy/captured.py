"""A piece of a graph that runs as it was captured: torch's operators one by one, without any compiler.

As data it is JSON behind a first line of its own. A piece that holds anything but operators that have a name here
cannot be written, and is compiled instead.
"""

from __future__ import annotations

import json
import math
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.fx import GraphModule, Node

FIRST_LINE = b"compile-policy operators 1\n"
#: Where functions are looked for, by the name that is written.
_NAMESPACES: dict[str, Any] = {
    "torch": torch,
    "functional": torch.nn.functional,
    "nn": torch._C._nn,
    "special": torch.special,
    "linalg": torch.linalg,
    "operator": operator,
    "math": math,
}
_BUILTIN = (types.BuiltinFunctionType, type(torch.rsqrt))
_IN_PYTHON = ("torch.functional", "torch.nn.functional")
_WORDS = (torch.dtype, torch.layout, torch.memory_format)


class NotWritable(ValueError):
    """Why a piece cannot be written as operators."""


def written(gm: GraphModule) -> bytes:
    """``gm``, all of whose inputs are tensors, as data.

    Raises:
        NotWritable: it holds something that has no name or no spelling here.
    """
    places: dict[Node, int] = {}
    calls: list[Any] = []
    outputs: Any = None
    inputs = sum(node.op == "placeholder" for node in gm.graph.nodes)
    for node in gm.graph.nodes:
        if node.op == "output":
            outputs = [_spelled(n, places) for n in node.args[0]]
            continue
        places[node] = len(places)
        if node.op in ("call_function", "call_method"):
            target = _name(node.target) if node.op == "call_function" else ["method", _method(str(node.target))]
            calls.append([target, _spelled(list(node.args), places), _spelled(dict(node.kwargs), places)])
        elif node.op != "placeholder":
            raise NotWritable(f"{node.name} is kept in the graph")
    return FIRST_LINE + json.dumps({"inputs": inputs, "calls": calls, "outputs": outputs}).encode()


def runner(data: bytes) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """The function that such data stands for.

    Raises:
        ValueError: it does not describe operators that are known.
    """
    try:
        document = json.loads(data.removeprefix(FIRST_LINE))
        calls = [(_function(target), _reader(args), _reader(kwargs)) for target, args, kwargs in document["calls"]]
        outputs = [_reader(spelled) for spelled in document["outputs"]]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"not the description of operators: {error!r}") from error

    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        values: list[Any] = list(inputs)
        for function, args, kwargs in calls:
            values.append(function(*args(values), **kwargs(values)))
        return [output(values) for output in outputs]

    return run


# -- functions ------------------------------------------------------------------------------------------------------


@cache
def _names() -> dict[int, list[str]]:
    """``id`` of a function -> where it is found."""
    found: dict[int, list[str]] = {}
    for space, holder in _NAMESPACES.items():
        for name, value in vars(holder).items():
            in_python = callable(value) and getattr(value, "__module__", "") in _IN_PYTHON
            if (isinstance(value, _BUILTIN) or in_python or name.startswith("sym_")) and not name.startswith("_"):
                found.setdefault(id(value), [space, name])
    return found


def _name(target: Any) -> list[str]:
    if isinstance(target, torch._ops.OpOverload):
        return ["op", target.namespace, target._schema.name.split("::")[1], target._overloadname]
    known = _names().get(id(target))
    if known is None:
        raise NotWritable(f"{getattr(target, '__name__', target)} is no operator with a name")
    return known


def _method(name: str) -> str:
    if name.startswith("_") or not callable(getattr(torch.Tensor, name, None)):
        raise NotWritable(f"{name} is no method of a tensor")
    return name


def _function(target: Sequence[str]) -> Callable[..., Any]:
    space, name = target[:2]
    if space == "method":
        found: Callable[..., Any] = getattr(torch.Tensor, _method(name))
        return found
    if space == "op":
        overload: Callable[..., Any] = getattr(getattr(getattr(torch.ops, name), target[2]), target[3])
        return overload
    found = vars(_NAMESPACES[space])[name]
    if id(found) not in _names():
        raise ValueError(f"{name} is no operator")
    return found


# -- arguments ------------------------------------------------------------------------------------------------------


def _spelled(value: Any, places: Mapping[Node, int]) -> Any:
    """An argument as JSON: a word for its kind, and what it is."""
    if isinstance(value, Node):
        return ["value", places[value]]
    if isinstance(value, slice):
        return ["slice", *[_spelled(v, places) for v in (value.start, value.stop, value.step)]]
    if type(value) in (list, tuple, torch.Size) or type(value).__name__.startswith("immutable_list"):
        return ["list" if isinstance(value, list) else "tuple", *[_spelled(v, places) for v in value]]
    if isinstance(value, dict):
        return ["dict", *[[str(k), _spelled(v, places)] for k, v in value.items()]]
    if value is Ellipsis:
        return ["..."]
    if type(value) in _WORDS:
        return ["torch", str(value).removeprefix("torch.")]
    if type(value) is torch.device:
        return ["device", str(value)]
    if value is None or type(value) in (bool, int, float, str):
        return ["plain", value]
    raise NotWritable(f"a {type(value).__name__} has no spelling")


def _reader(spelled: Any) -> Callable[[list[Any]], Any]:
    """Reads an argument off the values so far."""
    kind, *rest = spelled
    if kind == "value":
        return operator.itemgetter(int(rest[0]))
    if kind == "dict":
        named = [(name, _reader(v)) for name, v in rest]
        return lambda values: {name: read(values) for name, read in named}
    if kind in ("list", "tuple", "slice"):
        makers: dict[str, Callable[[list[Any]], Any]] = {"list": list, "tuple": tuple, "slice": lambda v: slice(*v)}
        make = makers[kind]
        parts = [_reader(v) for v in rest]
        return lambda values: make([read(values) for read in parts])
    constant = _constant(kind, rest)
    return lambda values: constant


def _constant(kind: str, rest: Sequence[Any]) -> Any:
    if kind == "...":
        return Ellipsis
    if kind == "torch" and type(found := getattr(torch, rest[0])) in _WORDS:
        return found
    if kind == "device":
        return torch.device(rest[0])
    if kind == "plain":
        return rest[0]
    raise ValueError(f"{kind} is no kind of argument")
