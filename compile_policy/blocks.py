"""Repeated blocks of a captured graph, cut out so that each kind is lowered once.

A graph of a deep model is the same block many times over. Every operation knows the module that it was traced in;
children of one parent that are numbered and of one class are instances of a block. The graph is cut where an instance
begins and ends, each piece becomes a graph of its own, and pieces of one canonical form (operations, arguments,
metadata of what goes in) are the same code with other tensors.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from compile_policy import compat

_NUMBERED = re.compile(r"(.*)(?:\.|\[)(\d+)\]?")
_LEVELS = 3  # how many lists of blocks within blocks are tried


class NotDivisible(Exception):
    """The graph stays in one piece; the message says why."""


@dataclass(frozen=True)
class BlockSummary:
    """How a graph was divided.

    Attributes:
        instances: number of blocks in the graph; 0 for a graph that is one package.
        distinct: number of packages that serve them all.
        packages: number of packages, including those for what surrounds the blocks, not those for special sizes.
        reason: why the graph was not divided; empty when it was.
        captured: number of packages that are no native code: what surrounds the blocks runs as it was captured.
        blocks_only: whether nothing but blocks was to be compiled.
    """

    instances: int
    distinct: int
    packages: int
    reason: str = ""
    captured: int = 0
    blocks_only: bool = False

    def __str__(self) -> str:
        if not self.instances:
            also = ", so -O1 compiles it whole" if self.blocks_only else ""
            return f"one package: {self.reason}{also}"
        rest = ", the rest as captured" if self.captured else ""
        return f"{self.distinct} distinct block{'s' * (self.distinct != 1)} of {self.instances}{rest}"


@dataclass(frozen=True)
class Piece:
    """A run of operations as a graph of its own.

    Attributes:
        block: path of the block instance; empty for what surrounds the blocks.
        inputs: the nodes of the whole graph that the inputs of ``graph`` stand for, ``results`` those of its outputs.
        form: equal for pieces that are the same code, which share one ``graph``.
    """

    block: str
    graph: GraphModule
    inputs: tuple[Node, ...]
    results: tuple[Node, ...]
    form: tuple[Any, ...]


def divide(gm: GraphModule) -> tuple[list[Piece], BlockSummary]:
    """Cut ``gm``, all of whose inputs are tensors, at the borders of its repeated blocks.

    A graph without such blocks, or with a border that cannot be crossed with tensors alone, stays one piece.

    Raises:
        NotDivisible: a result of the graph is no tensor.
    """
    reason = "no module is repeated"
    for level in range(_LEVELS):
        names = _block_names(gm, level)
        if not any(names.values()):
            break
        try:
            pieces = _pieces(gm, names)
        except NotDivisible as error:
            reason = str(error)
            continue
        forms = [p.form for p in pieces if p.block]
        if len(set(forms)) < len(forms):
            return pieces, BlockSummary(len(forms), len(set(forms)), len({p.form for p in pieces}))
        reason = f"all {len(forms)} blocks are different"
    return whole(gm, reason)


def whole(gm: GraphModule, reason: str = "asked for") -> tuple[list[Piece], BlockSummary]:
    """``gm`` as a single piece."""
    return _pieces(gm, {}), BlockSummary(0, 0, 1, reason)


def _block_names(gm: GraphModule, level: int) -> dict[Node, str]:
    """operation -> the block instance that it belongs to; ``level`` 0 takes the outermost repeated module."""
    numbered = {n: _numbered(n) for n in gm.graph.nodes if n.op.startswith("call")}
    members: dict[tuple[str, Any], set[str]] = {}
    for found in numbered.values():
        for parent, number, cls in found:
            members.setdefault((parent, cls), set()).add(number)
    names = {}
    for node, found in numbered.items():
        repeated = [f"{parent}.{number}" for parent, number, cls in found if len(members[parent, cls]) > 1]
        names[node] = repeated[level] if len(repeated) > level else ""
    return names


def _numbered(node: Node) -> list[tuple[str, str, Any]]:
    """(path of the parent, number, class) of those modules round an operation that stand in a list, outermost first."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    matches = ((_NUMBERED.fullmatch(path), cls) for path, cls in stack)
    return list(dict.fromkeys((m[1], m[2], cls) for m, cls in matches if m))


def _pieces(gm: GraphModule, names: dict[Node, str]) -> list[Piece]:
    """Maximal runs of operations of one block, in order. Sizes are no operations: every piece computes its own."""
    sizes = _sizes(gm)
    runs: list[tuple[str, list[Node]]] = []
    for node in gm.graph.nodes:
        if node.op.startswith("call") and node not in sizes and not _is_note(node):
            block = names.get(node, "")
            if not runs or runs[-1][0] != block:
                runs.append((block, []))
            runs[-1][1].append(node)
    made: dict[tuple[Any, ...], GraphModule] = {}
    pieces = [_piece(gm, block, nodes, sizes, made) for block, nodes in runs]
    if len(pieces) > 1:
        _check_aliases(gm, pieces)
    return pieces


def _piece(
    gm: GraphModule, block: str, nodes: list[Node], sizes: set[Node], made: dict[tuple[Any, ...], GraphModule]
) -> Piece:
    builder = _Builder(nodes, sizes)
    for node in nodes:
        builder.get(node)
    results = [n for n in nodes if any(u not in builder.nodes and u not in sizes and not _is_note(u) for u in n.users)]
    results += [n for n in nodes if n not in results and _is_tensor(n) and any(u in sizes for u in n.users)]
    for node in results:
        _require_tensor(node)
    builder.graph.output(tuple(builder.here[n] for n in results))
    form = _form(gm, builder.graph)
    if form not in made:
        made[form] = GraphModule(gm, builder.graph)
    return Piece(block, made[form], tuple(builder.inputs), tuple(results), form)


class _Builder:
    """Copies a run of operations into a graph of their own; what they need from outside becomes its inputs."""

    def __init__(self, nodes: Sequence[Node], sizes: set[Node]) -> None:
        self.graph = Graph()
        self.nodes = set(nodes)
        self.sizes = sizes
        self.inputs: list[Node] = []
        self.here: dict[Node, Node] = {}
        self.places: dict[Any, tuple[Node, int]] = {}
        for node in dict.fromkeys(a for n in nodes for a in n.all_input_nodes):
            if node not in self.nodes and node not in sizes and node.op != "get_attr":
                self._input(node)

    def get(self, node: Node) -> Node:
        """The copy of ``node``; whatever it needs is copied first."""
        if node not in self.here:
            if node in self.sizes:
                self.here[node] = self._size(node)
            elif node in self.nodes or node.op == "get_attr":
                self.here[node] = self.graph.node_copy(node, self.get)
            else:
                self._input(node)
        return self.here[node]

    def _input(self, node: Node) -> None:
        _require_tensor(node)
        with self.graph.inserting_after(self.here[self.inputs[-1]] if self.inputs else None):
            made = self.graph.placeholder(f"in_{len(self.inputs)}")
        made.meta["example_value"] = value = node.meta["example_value"]
        self.here[node] = made
        self.inputs.append(node)
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                self.places.setdefault(size.node.expr, (made, dim))

    def _size(self, node: Node) -> Node:
        """A size is read off an input that has it, or computed from sizes that are."""
        value = node.meta["example_value"]
        place = self.places.get(value.node.expr) if isinstance(value, torch.SymInt) else None
        if place is None:
            return self.graph.node_copy(node, self.get)
        made = self.graph.call_function(torch.ops.aten.sym_size.int, place)
        made.meta["example_value"] = value
        return made


def _sizes(gm: GraphModule) -> set[Node]:
    """Nodes that compute with nothing but sizes of tensors."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        number = isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool, torch.Size))
        reads_size = node.target in (torch.ops.aten.sym_size.int, "size")
        if node.op.startswith("call") and number and (reads_size or all(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.Tensor)


def _is_note(node: Node) -> bool:
    """Calls that only tell torch's telemetry what is used."""
    return getattr(node.target, "__name__", "") == "_log_api_usage_once"


def _require_tensor(node: Node) -> None:
    if not _is_tensor(node):
        raise NotDivisible(f"{node.name}, which is no tensor, is made in one block and used in another")


# -- what is the same code ------------------------------------------------------------------------------------------


def _form(owner: GraphModule, graph: Graph) -> tuple[Any, ...]:
    """Everything that decides what code the graph becomes, with nodes as numbers; ``owner`` has its constants."""
    numbers = {node: i for i, node in enumerate(graph.nodes)}
    return tuple(_node_form(owner, node, numbers) for node in graph.nodes)


def _node_form(owner: GraphModule, node: Node, numbers: dict[Node, int]) -> tuple[Any, ...]:
    if node.op == "placeholder":
        return ("input", *_metadata(node.meta["example_value"]))
    if node.op == "get_attr":  # a constant or a function of the graph: the same only when it is that very one
        return (node.op, id(operator.attrgetter(str(node.target))(owner)))
    return (node.op, node.target, _plain(node.args, numbers), _plain(node.kwargs, numbers))


def _metadata(value: torch.Tensor) -> tuple[Any, ...]:
    numbers = (*value.shape, *value.stride(), value.storage_offset())
    return (value.dtype, str(value.device), value.layout, value.dim(), tuple(map(str, numbers)))


def _plain(value: Any, numbers: dict[Node, int]) -> Any:
    """An argument as something that can be compared and hashed; 1, 1.0 and True stay apart."""
    if isinstance(value, Node):
        return ("node", numbers[value])
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *[_plain(v, numbers) for v in value])
    if isinstance(value, dict):
        return ("dict", *[(k, _plain(v, numbers)) for k, v in sorted(value.items())])
    if isinstance(value, slice):
        return ("slice", *[_plain(v, numbers) for v in (value.start, value.stop, value.step)])
    return (type(value).__name__, repr(value))


# -- writing in place -----------------------------------------------------------------------------------------------


def _check_aliases(gm: GraphModule, pieces: Sequence[Piece]) -> None:
    """A package may return a copy where the graph has a view. That shows only where one of both is written into."""
    written = {compat.storage_of(t) for n in gm.graph.nodes for t in _written(n)}
    crossing: dict[Any, set[str]] = {}
    for node in {n for p in pieces for n in (*p.inputs, *p.results)}:
        crossing.setdefault(compat.storage_of(node.meta["example_value"]), set()).add(node.name)
    for storage in written:
        if len(names := crossing.get(storage, set())) > 1:
            raise NotDivisible(f"{' and '.join(sorted(names))} share memory that is written in place")


def _written(node: Node) -> list[torch.Tensor]:
    """Tensors that an operation writes into."""
    if not node.op.startswith("call"):
        return []
    name = str(getattr(node.target, "__name__", node.target))
    writes = compat.mutates(node.target) or (name.endswith("_") and not name.endswith("__"))
    writes = writes or node.target in _IN_PLACE or "out" in node.kwargs or bool(node.kwargs.get("inplace"))
    tensors = [a.meta.get("example_value") for a in node.all_input_nodes] if writes else []
    return [t for t in tensors if isinstance(t, torch.Tensor)]


_IN_PLACE = (
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift,
    operator.imatmul,
)  # fmt: skip
