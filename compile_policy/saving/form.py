"""An entry as files: one JSON document, its native packages, and what people read. No pickle.

Weights are no part of it: a bound tensor is written as its place in the component, and looked up there again.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.utils._pytree as pytree

from compile_policy.blocks import BlockSummary
from compile_policy.call_key import Call
from compile_policy.compiled import Argument, CompiledGraph, GuardRecord
from compile_policy.entry import Entry, OutputSpec
from compile_policy.predicate import ShapeConditions
from compile_policy.program import Package, Program
from compile_policy.saving.conditions import check_conditions
from compile_policy.saving.stable import Stable
from compile_policy.saving.structure import tensor_places
from compile_policy.stand_ins import places_of, storages_of

ENTRY, READABLE = "entry.json", "readable.json.z"


class Unsaveable(Exception):
    """Why an entry cannot be written, or a written one not be used here."""


def to_files(entry: Entry, module: torch.nn.Module) -> dict[str, bytes]:
    """The files of an entry.

    Raises:
        Unsaveable: not lowered ahead of time, bound to a tensor that has no place in the component, or with results
            that are no plain data.
    """
    graph = entry.graph
    if graph.program is None:
        raise Unsaveable(f"it is lowered at run time{f', {graph.why_jit}' if graph.why_jit else ''}")
    place_of = {id(t): place for place, t in reversed(tensor_places(module).items())}
    check_conditions([*graph.accepts.conditions, *graph.accepts.passed_over])
    document = {
        "bound": [_bound(t, place_of) for t in graph.bound],
        "changed": places_of(graph.bound, graph.written),
        "arguments": [_argument(a, place_of) for a in graph.arguments],
        "order": graph.order,
        "marks": sorted(graph.marks),
        "outputs": graph.outputs,
        "conditions": graph.accepts.conditions,
        "passed_over": graph.accepts.passed_over,
        "program": graph.program.to_dict(),
        "packages": len(graph.program.packages),
        "result": {"tree": _dumped(entry.output.tree), "leaves": entry.output.leaves},
        "state_sizes": entry.state_sizes,
        "written": sorted(entry.written),
        "unread": sorted(entry.unread),
        "seconds": entry.seconds,
        "max_error": entry.max_error,
    }
    readable = {
        "readable": graph.readable,
        "sources": graph.sources,
        "depth": graph.depth,
        "guards": [asdict(guard) for guard in graph.guards],
        "blocks": None if graph.blocks is None else asdict(graph.blocks),
    }
    files = {ENTRY: _json(document), READABLE: zlib.compress(_json(readable), 1)}
    return files | {_package(i): package.data for i, package in enumerate(graph.program.packages)}


def from_files(files: Mapping[str, bytes], module: torch.nn.Module, call: Call) -> Entry | None:
    """The entry again, bound to the tensors of ``module``; ``None`` when it does not hold for the call's sizes.

    Loads native code: the files must have been verified.

    Raises:
        Unsaveable: a bound tensor is missing, or another than the packages were compiled for.
        Exception: the files are no entry.
    """
    document = json.loads(files[ENTRY])
    readable = json.loads(zlib.decompress(files[READABLE]))
    places = tensor_places(module)
    bound = [_found(record, places) for record in document["bound"]]
    check_conditions([*document["conditions"], *document["passed_over"]])
    accepts = ShapeConditions(document["conditions"], passed_over=document["passed_over"])
    if not accepts(call.leaves):
        return None
    packages = [Package.load(files[_package(i)]) for i in range(document["packages"])]
    graph = CompiledGraph(
        code=_no_code,
        arguments=[Argument(kind, places.get(place), leaf, dim) for kind, place, leaf, dim in document["arguments"]],
        outputs=[(str(kind), int(i)) for kind, i in document["outputs"]],
        accepts=accepts,
        guards=[GuardRecord(**guard) for guard in readable["guards"]],
        readable=readable["readable"],
        sources=readable["sources"],
        depth=readable["depth"],
        blocks=None if readable["blocks"] is None else BlockSummary(**readable["blocks"]),
        program=Program.from_dict(document["program"], packages),
        bound=bound,
        order=[int(i) for i in document["order"]],
        marks=frozenset(map(int, document["marks"])),
        written=storages_of([bound[i] for i in document["changed"]]),
    )
    leaves = tuple((str(kind), *rest) for kind, *rest in document["result"]["leaves"])
    output = OutputSpec(pytree.treespec_loads(document["result"]["tree"]), leaves)
    unread = frozenset(map(str, document["unread"]))
    return Entry(
        call=call.description(unread),
        graph=graph,
        output=output,
        state_sizes=[int(n) for n in document["state_sizes"]],
        written=frozenset(map(int, document["written"])),
        unread=unread,
        seconds=float(document["seconds"]),
        max_error=float(document["max_error"]),
    )


def _bound(t: torch.Tensor, place_of: Mapping[int, str]) -> dict[str, Any]:
    place = place_of.get(id(t))
    if place is None:
        shape = "x".join(map(str, t.shape)) or "scalar"
        raise Unsaveable(f"its graph holds a {t.dtype} tensor ({shape}) that is no parameter, buffer or attribute")
    return {"place": place, "form": Stable().tensor(t)}


def _found(record: Mapping[str, Any], places: Mapping[str, torch.Tensor]) -> torch.Tensor:
    t = places.get(record["place"])
    if t is None:
        raise Unsaveable(f"{record['place']} is missing")
    form = Stable().tensor(t)
    if form != record["form"]:
        raise Unsaveable(f"{record['place']} is {form[1:]}, was {record['form'][1:]}")
    return t


def _argument(argument: Argument, place_of: Mapping[int, str]) -> list[Any]:
    place = None if argument.tensor is None else place_of.get(id(argument.tensor))
    return [argument.kind, place, argument.leaf, argument.dim]


def _dumped(tree: pytree.TreeSpec) -> str:
    try:
        return pytree.treespec_dumps(tree)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise Unsaveable(f"its result cannot be written down: {error}") from None


def _no_code(*inputs: Any) -> Any:
    raise AssertionError("a loaded entry runs its packages")


def _package(number: int) -> str:
    return f"package-{number}.pt2"


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
