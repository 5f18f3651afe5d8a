"""The graph of a whole component from that of its first layers.

What was captured of a layer is repeated for every layer that it stands for, with that layer's parameters and leaves in
place of its own (`Repeats`). The result is the graph that capturing all layers would have given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from compile_policy.compiled import Argument
from compile_policy.repeats import NotRepeated, Repeats
from compile_policy.tape import Origin

Output = tuple[str, int]
_NUMBER = re.compile(r"(.*[.\[])\d+(\]?)")


@dataclass(frozen=True)
class Stitched:
    """A graph of all layers, the sources of its inputs, and `CompiledGraph.outputs` for it."""

    graph: GraphModule
    arguments: list[Argument]
    outputs: list[Output]


class Stitching:
    """Repeats the captured layers of one graph.

    Args:
        gm: the graph of the first layers.
        arguments: the sources of its inputs; ``outputs`` as `CompiledGraph.outputs`.
        layers: those that were traced.

    Raises:
        NotRepeated: the graph is not cut at the borders of its layers as the runs were.
    """

    def __init__(
        self,
        gm: GraphModule,
        arguments: Sequence[Argument],
        outputs: Sequence[Output],
        repeats: Repeats,
        layers: Sequence[torch.nn.Module],
    ) -> None:
        self.gm, self.repeats = gm, repeats
        self.nodes: list[Node] = list(gm.graph.nodes)
        self.inputs = [n for n in self.nodes if n.op == "placeholder"]
        self.source = dict(zip(self.inputs, arguments, strict=True))
        self.arguments, self.outputs = list(arguments), list(outputs)
        given = self.nodes[-1].args[0]
        assert isinstance(given, (tuple, list))
        self.results: list[Any] = list(given)
        self.ids = [str(id(layer)) for layer in layers]
        numbers = {name: i for i, name in enumerate(self.ids)}
        self.layer = {n: _layer_of(n, numbers) for n in self.nodes if n.op.startswith("call")}
        self.members: list[list[Node]] = [[n for n, at in self.layer.items() if at == i] for i in range(len(layers))]
        _require(all(self.members), "a layer that was traced left nothing in the graph")
        self.handed = {i: self._handed_on(i) for i in {len(layers) - 1, *repeats.stands_for}}
        self.graph = Graph()
        self.here: dict[Node, Node] = {}
        self.made: dict[Origin, Node] = {}
        self.copies: list[dict[Node, Node]] = []

    def _handed_on(self, i: int) -> Node:
        """The tensor of a layer that the next one uses, or what comes behind the last."""
        last = i == len(self.members) - 1
        if last and self.repeats.last is not None:
            kind, place = self.outputs[self.repeats.last]
            _require(kind == "graph" and self.layer.get(self.results[place]) == i, "its result comes from elsewhere")
            found: Node = self.results[place]
            return found
        users = set(self._behind() if last else self.members[i + 1])
        crossing = [n for n in self.members[i] if _is_tensor(n) and any(u in users for u in n.users)]
        _require(len(crossing) == 1, "a captured layer hands more than one tensor on")
        return crossing[0]

    def _behind(self) -> list[Node]:
        end = self.nodes.index(self.members[-1][-1])
        return [n for n in self.nodes[end + 1 :] if n.op.startswith("call")]

    def run(self) -> Stitched:
        for node in self.inputs:
            self.here[node] = self.graph.node_copy(node)
            self.made.setdefault(_origin(self.source[node]), self.here[node])
        self._add_inputs()
        last = self.members[-1][-1]
        for node in self.nodes:
            if node.op not in ("placeholder", "output"):
                self.here[node] = self.graph.node_copy(node, self.here.__getitem__)
            if node is last:
                self._repeat()
        results = [self.here[n] if isinstance(n, Node) else n for n in self.results]
        for place, (which, alike) in self.repeats.results.items():
            kind, i = self.outputs[alike]
            made = self.copies[which].get(self.results[i]) if kind == "graph" else None
            _require(made is not None, "a result of a layer is made elsewhere in the graph")
            self.outputs[place] = ("graph", len(results))
            results.append(made)
        self.graph.output(tuple(results))
        return Stitched(GraphModule(self.gm, self.graph), self.arguments, self.outputs)

    # -- inputs ----------------------------------------------------------------------------------------------------

    def _add_inputs(self) -> None:
        """Inputs for the parameters and leaves of the layers that were not traced."""
        used = [[n for n in self.inputs if any(self.layer.get(u) == i for u in n.users)] for i in range(len(self.ids))]
        for representative, others in zip(self.repeats.stands_for, self.repeats.others, strict=True):
            for node in used[representative]:
                origin = _origin(self.source[node])
                if origin[0] == "size":
                    continue
                _require(origin in others, f"{node.name} is used in a way that no run shows")
                if others[origin] not in self.made:
                    self.made[others[origin]] = self._input(node, others[origin])

    def _input(self, like: Node, origin: Origin) -> Node:
        node = self.graph.placeholder(f"other_{len(self.arguments)}")
        node.meta = {"example_value": _another(like.meta["example_value"])}
        place = self.source[like]
        if origin[0] == "leaf":
            self.arguments.append(replace(place, leaf=origin[1]))
        else:
            self.arguments.append(replace(place, tensor=self.repeats.tensors[origin[1]]))
        return node

    # -- layers ----------------------------------------------------------------------------------------------------

    def _repeat(self) -> None:
        """Copies of the captured layers, one for each layer that was not traced."""
        handed = self.here[self.handed[len(self.ids) - 1]]
        for which, representative in enumerate(self.repeats.stands_for):
            copied: dict[Node, Node] = {}
            self.copies.append(copied)
            for node in self.members[representative]:
                for used in node.all_input_nodes:
                    if used not in copied:
                        copied[used] = self._instead_of(used, which, handed)
                copied[node] = self.graph.node_copy(node, copied.__getitem__)
                copied[node].meta = self._renamed(node.meta, representative, len(self.ids) + which)
            handed = copied[self.handed[representative]]
        self.here[self.handed[len(self.ids) - 1]] = handed

    def _instead_of(self, node: Node, which: int, handed: Node) -> Node:
        """What a copy uses where the traced layer uses ``node``, which is made outside of it."""
        representative, others = self.repeats.stands_for[which], self.repeats.others[which]
        if node in self.source:
            origin = _origin(self.source[node])
            return self.here[node] if origin[0] == "size" else self.made[others[origin]]
        layer = self.layer.get(node)
        if layer is not None and layer == representative - 1 and _is_tensor(node):
            _require(node is self._handed_on(layer), "a captured layer hands more than one tensor on")
            return handed
        _require(node in self.here, "a captured layer uses what is made behind it")
        if layer is None and _is_tensor(node):
            _require(self._is_shared(node, others), f"{node.name} is made for one layer, outside of it")
        return self.here[node]

    def _is_shared(self, node: Node, others: Mapping[Origin, Origin]) -> bool:
        """Whether a tensor made outside of the layers is the same one for all of them."""
        if node in self.source:
            origin = _origin(self.source[node])
            return others.get(origin, origin) == origin
        if self.layer.get(node) is not None:
            return not _is_tensor(node)
        return all(self._is_shared(used, others) for used in node.all_input_nodes)

    def _renamed(self, meta: Mapping[str, Any], was: int, now: int) -> dict[str, Any]:
        """Notes about an operation, as made in layer ``now``."""
        stack = meta["nn_module_stack"]
        path = next(path for key, (path, _) in stack.items() if key.split("@")[0] == self.ids[was])
        match = _NUMBER.fullmatch(path)
        _require(match is not None, "the path of a layer has no number")
        assert match is not None
        other = f"{match[1]}{now}{match[2]}"
        renamed = {
            key: (other + p.removeprefix(path) if p.startswith(path) else p, cls) for key, (p, cls) in stack.items()
        }
        return {**meta, "nn_module_stack": renamed}


def _layer_of(node: Node, numbers: Mapping[str, int]) -> int | None:
    """The traced layer that an operation was captured in."""
    keys = (key.split("@")[0] for key in node.meta.get("nn_module_stack") or ())
    return next((numbers[key] for key in keys if key in numbers), None)


def _origin(argument: Argument) -> Origin:
    """The source of an input, as runs name it."""
    if argument.kind == "tensor":
        return ("tensor", id(argument.tensor))
    return ("leaf", argument.leaf) if argument.kind == "leaf" else ("size", argument.leaf, argument.dim)


def _another(fake: torch.Tensor) -> torch.Tensor:
    """Another tensor of the same form that shares no memory with it."""
    mode = getattr(fake, "fake_mode", None)
    _require(mode is not None and fake.storage_offset() == 0, "an input of a layer is no plain tensor")
    assert mode is not None
    with mode, torch.no_grad():
        other = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)
    return other.requires_grad_(fake.requires_grad)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.Tensor)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise NotRepeated(otherwise)
