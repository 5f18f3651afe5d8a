"""The inputs of a captured graph: what each is in the model or the call, and what its symbols stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from compile_policy.compiled import Argument
from compile_policy.entry import Entry
from compile_policy.graphs.values import Value
from compile_policy.region import Region

_SYMBOL = re.compile(r"[a-z]+\d+")


def input_names(region: Region, entry: Entry) -> list[str]:
    """What each input of the graph is: a parameter by its name, a leaf by its path, a size by whose it is."""
    module = region.module
    bound = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    names = {id(tensor): name for name, tensor in reversed(bound)}
    return [_input(argument, entry, names) for argument in entry.graph.arguments]


def _input(argument: Argument, entry: Entry, names: dict[int, str]) -> str:
    if argument.kind == "tensor":
        return names.get(id(argument.tensor), "a tensor that capture found outside of the module")
    path = entry.call.paths[argument.leaf]
    if argument.kind == "leaf":
        return path
    label = entry.call.labels[argument.leaf][argument.dim]
    return f"{path}.shape[{argument.dim}]" + (f", {label}" if label else "")


def input_rows(names: Sequence[str], entry: Entry, values: Mapping[str, Value]) -> list[dict[str, Any]]:
    """One row an input, in order: its name in the graph, what it is, and dtype and shape where it is a tensor."""
    rows = []
    for value, argument, said in zip(_parameters(values), entry.graph.arguments, names, strict=False):
        shape = None if value.shape is None else list(value.shape)
        rows.append({"name": value.name, "kind": argument.kind, "is": said, "dtype": value.dtype, "shape": shape})
    return rows


def _parameters(values: Mapping[str, Value]) -> list[Value]:
    """The inputs by their nodes' names, in the order of the signature."""
    inputs = [value for value in values.values() if not value.text]
    nodes = {value.name: value for value in inputs if value.name.startswith("l_")}
    return [nodes.get(f"l{value.name[1:]}", value) for value in inputs if not value.name.startswith("l_")]


def symbols_of(
    rows: Sequence[Mapping[str, Any]], entry: Entry, example: Mapping[int, Sequence[int]]
) -> dict[str, dict[str, Any]]:
    """Symbol of a size -> its ``label`` and its ``size`` in the example, where these are known."""
    symbols: dict[str, dict[str, Any]] = {}
    for row, argument in zip(rows, entry.graph.arguments, strict=False):
        if argument.kind != "leaf":
            continue
        labels, sizes = entry.call.labels[argument.leaf], example.get(argument.leaf, ())
        for dim, symbol in enumerate(row["shape"] or ()):
            if _SYMBOL.fullmatch(symbol):
                known = symbols.setdefault(symbol, {"label": None, "size": None})
                known["label"] = known["label"] or (labels[dim] if dim < len(labels) else None)
                known["size"] = known["size"] or (sizes[dim] if dim < len(sizes) else None)
    return symbols
