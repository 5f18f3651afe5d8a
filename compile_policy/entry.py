"""One call key's compiled code, and how its flat results become what the caller expects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from compile_policy import compat
from compile_policy.call_key import Call, adapted, public_value
from compile_policy.capture import compile_call
from compile_policy.compat_effects import raised_by_the_code
from compile_policy.compiled import CompiledGraph
from compile_policy.errors import NotCompilable, first_line
from compile_policy.example import another_example, copies
from compile_policy.lowering import Lowering
from compile_policy.outputs import OutputSpec as OutputSpec
from compile_policy.reference import TOLERANCE as TOLERANCE
from compile_policy.reference import Reference, run_of
from compile_policy.reference import relative_error as relative_error
from compile_policy.shapes import Labels
from compile_policy.stand_ins import Substitutes
from compile_policy.tensors import attribute_tensors
from compile_policy.unseen import refuse_effects_of_layers, unseen


class ExampleUnfit(NotCompilable):
    """The component does not run on this example; it may on another one."""


_Kept = list[tuple[dict[str, Any], dict[str, Any]]]


def kept(values: Sequence[Any]) -> _Kept:
    """The attributes of objects, and of the objects in their lists, as they are now; tensors are not copied."""
    out: _Kept = []
    seen: set[int] = set()
    left = list(values)
    while left:
        value = left.pop()
        held = getattr(value, "__dict__", None)
        if held is None or id(value) in seen or isinstance(value, (torch.nn.Module, type)):
            continue
        seen.add(id(value))
        out.append((held, dict(held)))
        for inside in held.values():
            if isinstance(inside, list):
                left += inside
            elif hasattr(inside, "__dict__") and not isinstance(inside, torch.Tensor):
                left.append(inside)
    return out


def restore(before: _Kept) -> None:
    """Give objects the attributes that they had."""
    for held, was in before:
        held.clear()
        held.update(was)


@dataclass
class Entry:
    """One call key's compiled code.

    Attributes:
        state_sizes: number of state tensors of each adapted argument, in order.
        written: leaves that the component writes into although no adapter manages them.
        unread: arguments without tensors whose values the graph does not depend on.
        number: its place among the component's entries, in the order in which they were made.
        wants_gradients: whether a gradient of something can be asked of the results.
        traced_shapes: of the leaves that the entry was traced and compared on.
    """

    call: Call
    graph: CompiledGraph
    output: OutputSpec
    state_sizes: list[int]
    written: frozenset[int] = frozenset()
    unread: frozenset[str] = frozenset()
    seconds: float = 0.0
    max_error: float = 0.0
    calls: int = field(default=0)
    number: int = 0
    wants_gradients: bool = False
    traced_shapes: tuple[torch.Size, ...] = ()

    def new_sizes(self, call: Call) -> tuple[Any, ...]:
        """Sizes of a call, as far as gradients may depend on them: sizes of 0 and 1, and all that are larger.

        Empty where gradients of just these sizes were compared when the entry was made, or where nobody wants any.
        """
        if not self.wants_gradients:
            return ()
        shapes = tuple([leaf.shape for leaf in call.leaves])
        if shapes == self.traced_shapes:
            return ()
        return tuple([tuple([min(size, 2) for size in shape]) for shape in shapes])

    def run(self, call: Call) -> Any:
        """Run the graph for a call with this entry's key and accepted sizes."""
        return self._run(call, self.graph.run)

    def run_unseen(self, call: Call, copies: Substitutes) -> Any:
        """`run` for a call that nobody made: what the graph writes beside the call's own tensors goes into copies."""
        return self._run(call, lambda leaves: self.graph.run_unseen(leaves, copies))

    def _run(self, call: Call, graph: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]) -> Any:
        self.calls += 1
        leaves = self.graph.with_marks(call.leaves, call.marks) if call.marks else call.leaves
        results = graph(leaves)
        if call.copied:
            results = self._as_given(call, results)
        result = self.output.build(results, {name: public_value(call.values[name]) for name in self.output.names})
        if self.state_sizes:
            self._write_back(call, iter(results[self.output.tensors :]))
        return result if call.finish is None else call.finish(result)

    def _as_given(self, call: Call, results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Where the graph saw a contiguous copy, the caller's tensor takes its place again."""
        for i in self.written & call.copied.keys():
            call.copied[i].copy_(call.leaves[i])
        places = zip(self.graph.outputs, results, strict=True)
        return [call.copied.get(i, result) if kind == "leaf" else result for (kind, i), result in places]

    def _write_back(self, call: Call, tensors: Iterator[torch.Tensor]) -> None:
        """Give the arguments their new state: all of it, or none where an adapter fails in the middle."""
        found = [place for name, spec in call.spec for place in adapted(spec, call.values[name])]
        before = kept([adapter.public(value) for adapter, _, value in found])
        try:
            for (adapter, spec, value), size in zip(found, self.state_sizes, strict=True):
                adapter.write_back(spec, value, [next(tensors) for _ in range(size)])
        except Exception:
            restore(before)
            raise

    def obstacle(self, call: Call) -> str:
        """Why this call must not run this entry although key and sizes fit; empty when nothing is in the way."""
        for i in self.written:
            target = call.copied.get(i, call.leaves[i])
            storage = target.untyped_storage().data_ptr()
            for j, other in enumerate(call.leaves):
                if j != i and storage == call.copied.get(j, other).untyped_storage().data_ptr() != 0:
                    return f"{call.paths[i]} is written in place and shares memory with {call.paths[j]}"
        return ""

    def difference(self, call: Call) -> str:
        """The first thing in which ``call`` differs from the call that this entry was made for, in a sentence."""
        return difference(self, call)


def build_entry(
    module: torch.nn.Module,
    call: Call,
    example: list[torch.Tensor],
    labels: Sequence[Labels],
    lowering: Lowering,
    on_capture: Callable[[], None],
) -> Entry:
    """Trace, lower and check one entry; buffers and the random state are afterwards as they were.

    Args:
        example: the tensors to trace on, with ``labels`` for their dims.
        on_capture: called before each capture, to count it.

    Raises:
        ExampleUnfit: the component does not run on this example.
        NotCompilable: the result cannot come out of a graph, or differs from eager.
        Exception: what capture or lowering raised.
    """
    with unseen(module) as world:
        if world.users:  # a trace comes before any run
            _refuse_effects(call, example, module, world.users)
        try:
            reference = Reference(module, call, example, world)
        except NotCompilable:
            raise
        except Exception as error:
            raise ExampleUnfit(f"the component does not run on a synthetic example: {first_line(error)}") from error
        for tensor in (
            *attribute_tensors(module),
            *world.stand_ins.outside(),
        ):  # bound like parameters; their sizes are no sizes of the call
            compat.mark_static(tensor)
        lowering = lowering.for_sizes(call.frequent) if call.frequent else lowering
        remake = reference.traceable
        graph = compile_call(remake(), example, labels, lowering, on_capture, module, remake, world)
        output = OutputSpec(reference.tree, reference.leaves)
        written = reference.written - call.mutable
        unread = call.unread(graph.read)
        entry = Entry(call.description(unread), graph, output, reference.state_sizes, written, unread)
        entry.max_error = reference.check(graph)
        entry.wants_gradients = _wants_gradients(call, graph)
        entry.traced_shapes = tuple([leaf.shape for leaf in example])
        if entry.wants_gradients:
            for leaves in _two_sizes(call, example, labels, graph):
                reference.check_gradients(graph, leaves)
    return entry


def _refuse_effects(call: Call, example: list[torch.Tensor], module: torch.nn.Module, users: str) -> None:
    try:
        refuse_effects_of_layers(partial(run_of, call), copies(example), module, users)
    except NotCompilable:
        raise
    except Exception as error:
        if not raised_by_the_code(error):
            raise
        raise ExampleUnfit(f"the component does not run on a synthetic example: {first_line(error)}") from error


def _wants_gradients(call: Call, graph: CompiledGraph) -> bool:
    if not torch.is_grad_enabled():
        return False
    bound = [a.tensor for a in graph.arguments if a.tensor is not None]
    return any(t.requires_grad for t in (*bound, *call.leaves))


def _two_sizes(
    call: Call, example: list[torch.Tensor], labels: Sequence[Labels], graph: CompiledGraph
) -> Iterator[list[torch.Tensor]]:
    """The example, and the call's own tensors or an example of other sizes."""
    yield example
    shapes = [leaf.shape for leaf in example]
    if [leaf.shape for leaf in call.leaves] != shapes:
        if graph.accepts(call.leaves):
            yield copies(call.leaves)
        return  # else its graph is another one
    if call.example is None:
        other = another_example(call, labels)
        if graph.accepts(other):
            yield other


def difference(entry: Entry, call: Call) -> str:
    """What in ``call`` another entry was needed for."""
    mine = entry.call
    old, new = dict(mine.spec), dict(call.spec)
    for name in {**old, **new}:
        was, now = old.get(name), new.get(name)
        if was != now and name not in entry.unread:
            return f"argument {name} is {_brief(now)}, was {_brief(was)}"
    for path, before, after in zip(call.paths, mine.key[1], call.key[1], strict=False):
        if before != after:
            return f"{path}: {_describe_metadata(after)}, was {_describe_metadata(before)}"
    accepts = entry.graph.accepts
    failing = accepts.failing(call.leaves)
    line = next((accepts.lines[c] for c in failing if c in accepts.lines), "")
    return f"sizes: {'; '.join(failing[:3])}{f' ({line})' if line else ''}"


def _brief(spec: Any) -> str:
    if spec is None:
        return "not given"
    if spec[0] == "const":
        return repr(spec[2])
    if spec[0] in ("data", "node"):
        return f"a {spec[1].__name__}"
    if spec[0] in ("object", "unread"):
        return f"a {spec[1].__name__ if spec[0] == 'unread' else spec[1]}"
    return f"{spec[1].__name__} {spec[2]}" if spec[0] == "adapted" else f"a {spec[0]}"


def _describe_metadata(metadata: tuple[Any, ...]) -> str:
    dtype, device, static, grad = metadata
    return f"{dtype} on {device}, static sizes {[s if s >= 0 else '*' for s in static]}, requires_grad={grad}"
