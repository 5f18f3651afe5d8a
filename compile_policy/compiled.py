"""A lowered graph, and how it is called flat: parameters bound, sizes read off the leaves."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from compile_policy.ahead import sizes_from_tensors
from compile_policy.audit import GuardRecord as GuardRecord
from compile_policy.blocks import BlockSummary
from compile_policy.errors import first_line
from compile_policy.lowering import Lowering
from compile_policy.masked_attention import dense, takes_marks
from compile_policy.predicate import ShapeConditions
from compile_policy.program import Program, picker
from compile_policy.stand_ins import Substitutes, places_of
from compile_policy.watched import Watched


class AheadFault(Exception):
    """Lowering ahead of time failed; ``reason`` says why."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.reason = first_line(error)


@dataclass(frozen=True)
class Argument:
    """Where one input of the graph comes from: a bound tensor, a leaf of the call, or a size of a leaf."""

    kind: str  # "tensor" | "leaf" | "size"
    tensor: torch.Tensor | None = None
    leaf: int = 0
    dim: int = 0


@dataclass
class CompiledGraph:
    """A lowered graph with all that is needed to call it flat.

    Attributes:
        code: takes the graph's inputs in order, returns its outputs.
        arguments: the source of each input.
        outputs: for every tensor of the traced function's result: ``("graph", i)`` or ``("leaf", i)``.
        accepts: the sizes for which the graph holds.
        guards: what Dynamo would have guarded on, and what stands for each guard.
        watched: values that only a check covers, for `Fingerprint.watch`; empty for a graph that was loaded.
        readable: the captured graph as Python text with source comments.
        sources: per operation of the captured graph its module, name, target, shape and where the model wrote it.
        traced: the code that capture ran through; empty for a graph that was loaded.
        depth: which layers were traced for others, or why none was; empty where there is no list of layers.
        why_jit: why a graph was not lowered ahead of time although that was tried; empty otherwise.
        program: the native packages, when lowered ahead of time; takes ``bound`` and then the leaves in ``order``.
        blocks: how the graph was divided into packages; ``None`` on the other road.
        read: numbers of the arguments without tensors whose values the graph depends on.
        marks: leaves that may be causal marks; code of the other road expects dense masks.
        written: memory of bound tensors that the graph writes into, as `compat.storage_of` gives it.
    """

    code: Callable[..., Any]
    arguments: list[Argument]
    outputs: list[tuple[str, int]]
    accepts: ShapeConditions
    guards: list[GuardRecord] = field(default_factory=list)
    watched: tuple[Watched, ...] = ()
    readable: str = ""
    sources: list[dict[str, Any]] = field(default_factory=list)
    traced: list[types.CodeType] = field(default_factory=list)
    depth: str = ""
    why_jit: str = ""
    program: Program | None = None
    blocks: BlockSummary | None = None
    bound: list[torch.Tensor] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    read: frozenset[int] = frozenset()
    marks: frozenset[int] = frozenset()
    written: frozenset[int] = frozenset()

    @property
    def road(self) -> str:
        """``ahead`` of time, or ``jit``."""
        return "ahead" if self.program is not None else "jit"

    def run(self, leaves: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Call the graph; leaves as `Call.leaves` of a call with the entry's key. From the first run on, nothing of
        the graph may change."""
        if self.program is not None:
            results: Sequence[torch.Tensor] = self.program.run(self.bound + self._in_order(leaves))
        else:
            results = self.code(*self._inputs(leaves))
        if self._as_made and len(results) == len(self.outputs):
            return results
        return [results[i] if kind == "graph" else leaves[i] for kind, i in self.outputs]

    def with_marks(self, leaves: list[torch.Tensor], marks: Sequence[int]) -> list[torch.Tensor]:
        """The leaves with every causal mark that this graph does not take as a dense mask."""
        leaves = list(leaves)
        for number in marks:
            if number not in self.marks:
                leaves[number] = dense(leaves[number])
        return leaves

    def run_unseen(self, leaves: list[torch.Tensor], copies: Substitutes | None = None) -> Sequence[torch.Tensor]:
        """`run` on copies of the bound tensors that it writes into, for a call that nobody made.

        Args:
            copies: where the copies are kept, for who wants to see them afterwards.
        """
        if not self.written:
            return self.run(leaves)
        copies = copies or Substitutes(self.written)
        if self.program is not None:
            results: Sequence[torch.Tensor] = self.program.run(
                [copies.of(t) for t in self.bound] + self._in_order(leaves)
            )
        else:
            results = self.code(*[copies.of(value) for value in self._inputs(leaves)])
        return [results[i] if kind == "graph" else leaves[i] for kind, i in self.outputs]

    def changed(self) -> list[torch.Tensor]:
        """The bound tensors that it writes into."""
        bound = self.bound or [a.tensor for a in self.arguments if a.tensor is not None]
        return [bound[i] for i in places_of(bound, self.written)]

    def _inputs(self, leaves: Sequence[torch.Tensor]) -> list[Any]:
        """The inputs of ``code``: only what the call brings is put in its place."""
        fixed, leaf_places, pick, sizes = self._places
        inputs = fixed.copy()
        for place, leaf in zip(leaf_places, pick(leaves), strict=True):
            inputs[place] = leaf
        for place, leaf_number, dim in sizes:
            inputs[place] = leaves[leaf_number].shape[dim]
        return inputs

    @cached_property
    def _places(self) -> tuple[list[Any], list[int], Callable[[Any], list[Any]], list[tuple[int, int, int]]]:
        numbered = list(enumerate(self.arguments))
        leaves = [(i, a.leaf) for i, a in numbered if a.kind == "leaf"]
        sizes = [(i, a.leaf, a.dim) for i, a in numbered if a.kind == "size"]
        fixed = [a.tensor for a in self.arguments]
        return fixed, [i for i, _ in leaves], picker([leaf for _, leaf in leaves]), sizes

    @cached_property
    def _in_order(self) -> Callable[[list[Any]], list[Any]]:
        return picker(self.order)

    @cached_property
    def _as_made(self) -> bool:
        """Whether the results are the graph's outputs as they come."""
        return self.outputs == [("graph", i) for i in range(len(self.outputs))]

    def lower_ahead(self, gm: torch.fx.GraphModule, labels: Sequence[Sequence[str | None]], lowering: Lowering) -> None:
        """Replace the captured graph's Python by native packages.

        Raises:
            AheadFault: the graph could not be lowered.
        """
        kept = sizes_from_tensors(gm)
        arguments = [self.arguments[i] for i in kept]
        bound = [i for i, a in enumerate(arguments) if a.kind == "tensor"]
        rest = [i for i, a in enumerate(arguments) if a.kind == "leaf"]
        _reorder_inputs(gm, [*bound, *rest])
        self.bound = [a.tensor for a in (arguments[i] for i in bound) if a.tensor is not None]
        self.order = [arguments[i].leaf for i in rest]
        inputs = [n for n in gm.graph.nodes if n.op == "placeholder"][len(bound) :]
        self.marks = frozenset(i for i, node in zip(self.order, inputs, strict=True) if takes_marks(node))
        try:
            self.program, self.blocks = lowering.program(gm, self._frequent_sizes(labels, lowering.frequent))
        except Exception as error:
            raise AheadFault(error) from error

    def _frequent_sizes(
        self, labels: Sequence[Sequence[str | None]], frequent: Mapping[str, int]
    ) -> list[tuple[int, int, int]]:
        """(slot, dim, size) of the first dim with each label that has a frequent size; none if a label is missing."""
        places = {
            label: (slot, dim)
            for slot, leaf in reversed(list(enumerate(self.order, len(self.bound))))
            for dim, label in enumerate(labels[leaf])
        }
        return [(*places[n], size) for n, size in frequent.items()] if frequent.keys() <= places.keys() else []


def _reorder_inputs(gm: torch.fx.GraphModule, order: Sequence[int]) -> None:
    """Move the inputs in the graph of ``gm`` into the given order: parameters in front, so that they are one list for
    all calls. Its Python code stays as it was; what is lowered is the graph."""
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    body = next(n for n in gm.graph.nodes if n.op != "placeholder")
    for i in order:
        body.prepend(inputs[i])
