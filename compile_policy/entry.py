"""One call key's compiled code, and how its flat results become what the caller expects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree

from compile_policy.call_key import Call, adapter_for, collect_state, public_value, rebuild
from compile_policy.errors import NotCompilable
from compile_policy.example import copies
from compile_policy.lowering import CompiledGraph, Lowering, compile_call
from compile_policy.shapes import Labels

#: Largest error of a compiled entry against eager on the example, relative to the largest value of the tensor.
#: Fusion keeps intermediates in higher precision than eager does, so low precisions get room for a few roundings.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class OutputSpec:
    """How to put a component's result together.

    Attributes:
        tree: pytree structure of the result.
        leaves: per leaf ``("tensor",)``, ``("value", argument name)`` or ``("const", value)``.
    """

    tree: pytree.TreeSpec
    leaves: tuple[tuple[Any, ...], ...]

    def build(self, tensors: Iterator[torch.Tensor], values: Any) -> Any:
        return pytree.tree_unflatten([self._leaf(leaf, tensors, values) for leaf in self.leaves], self.tree)

    @staticmethod
    def _leaf(leaf: tuple[Any, ...], tensors: Iterator[torch.Tensor], values: Any) -> Any:
        if leaf[0] == "tensor":
            return next(tensors)
        return public_value(values[leaf[1]]) if leaf[0] == "value" else leaf[1]


@dataclass
class Entry:
    """One call key's compiled code."""

    call: Call
    graph: CompiledGraph
    output: OutputSpec
    state_sizes: dict[str, int]
    seconds: float = 0.0
    max_error: float = 0.0
    calls: int = field(default=0)

    def run(self, call: Call) -> Any:
        """Run the graph for a call with this entry's key and accepted sizes."""
        self.calls += 1
        tensors = iter(self.graph.run(call.leaves))
        result = self.output.build(tensors, call.values)
        for name, spec in call.spec:
            if spec[0] == "adapted":
                state = [next(tensors) for _ in range(self.state_sizes[name])]
                _write_back(spec, call.values[name], state)
        return result

    def difference(self, call: Call) -> str:
        """The first thing in which ``call`` differs from the call that this entry was made for, in a sentence."""
        return difference(self, call)


def _write_back(spec: Any, value: Any, state: list[torch.Tensor]) -> None:
    adapter = adapter_for(spec[1])
    assert adapter is not None
    adapter.write_back(spec[2], value, state)


def build_entry(
    module: torch.nn.Module,
    call: Call,
    example: list[torch.Tensor],
    labels: Sequence[Labels],
    lowering: Lowering,
    on_capture: Callable[[], None],
) -> Entry:
    """Trace, lower and check one entry.

    Args:
        example: the tensors to trace on, with ``labels`` for their dims.
        on_capture: called before each capture, to count it.

    Raises:
        NotCompilable: the result cannot come out of a graph, or differs from eager.
        Exception: what the component, capture or lowering raised.
    """
    try:
        reference = _Reference(module, call, example)
    except NotCompilable:
        raise
    except Exception as error:
        raise NotCompilable(f"the component does not run on a synthetic example: {_first_line(error)}") from error
    on_capture()
    graph = compile_call(reference.traceable(), example, labels, lowering)
    entry = Entry(call.description(), graph, reference.output, reference.state_sizes)
    entry.max_error = reference.check(graph)
    return entry


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


class _Reference:
    """The component run eager on the example: the shape of its result, and the numbers to compare with."""

    def __init__(self, module: torch.nn.Module, call: Call, example: list[torch.Tensor]) -> None:
        self.module = module
        self.call = call
        self.example = copies(example)
        self.used = copies(example)
        values, result = self._run(self.used)
        adapted = [values[name] for name, spec in call.spec if spec[0] == "adapted"]
        with_paths, tree = pytree.tree_flatten_with_path(result, is_leaf=lambda x: any(x is a for a in adapted))
        leaves = [leaf for _, leaf in with_paths]
        self.paths = [_steps(path) for path, leaf in with_paths if isinstance(leaf, torch.Tensor)]
        self.output = OutputSpec(tree, tuple(self._describe(leaf, values) for leaf in leaves))
        state = {name: collect_state(spec, values[name]) for name, spec in call.spec}
        self.state_sizes = {name: len(tensors) for name, tensors in state.items()}
        self.tensors = [x for x in leaves if isinstance(x, torch.Tensor)] + [t for ts in state.values() for t in ts]

    def _run(self, leaves: Sequence[torch.Tensor]) -> tuple[dict[str, Any], Any]:
        it = iter(leaves)
        values = {name: rebuild(spec, it) for name, spec in self.call.spec}
        return values, self.module.forward(**values)

    @staticmethod
    def _describe(leaf: Any, values: dict[str, Any]) -> tuple[Any, ...]:
        if isinstance(leaf, torch.Tensor):
            return ("tensor",)
        for name, value in values.items():
            if leaf is value and leaf is not None:
                return ("value", name)
        if leaf is None or isinstance(leaf, (bool, str)):
            return ("const", leaf)
        raise NotCompilable(f"forward returns a {type(leaf).__name__}, which a graph cannot return")

    def traceable(self) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The same run as a function of tensors that returns a flat tuple of tensors."""
        spec, paths = self.call.spec, self.paths
        forward = self.module.forward

        def component(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
            it = iter(leaves)
            values = {name: rebuild(s, it) for name, s in spec}
            result = forward(**values)
            flat = [_follow(result, path) for path in paths]
            for name, s in spec:
                flat += collect_state(s, values[name])
            return tuple(flat)

        return component

    def check(self, graph: CompiledGraph) -> float:
        """Largest relative error of the graph on the example.

        Raises:
            NotCompilable: beyond the tolerance of the dtype.
        """
        leaves = copies(self.example)
        with torch.no_grad():
            results = graph.run(leaves)
        worst = 0.0
        # Leaves that the component wrote into (a static cache) are results too.
        for got, want in zip([*results, *leaves], [*self.tensors, *self.used], strict=True):
            error = relative_error(got, want)
            worst = max(worst, error)
            if error > TOLERANCE.get(want.dtype, 0.0):
                raise NotCompilable(f"the compiled graph differs from eager by {error:.2g} on its own example")
        return worst


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max |got - want| / max(1, max |want|); infinite when shapes differ or only one has NaN somewhere."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if want.numel() == 0:
        return 0.0
    a, b = got.detach().double(), want.detach().double()
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    difference = (a - b).nan_to_num(0.0, posinf=0.0, neginf=0.0).abs().max().item()
    return float(difference / max(1.0, b.nan_to_num(0.0, posinf=0.0, neginf=0.0).abs().max().item()))


def _steps(path: Any) -> tuple[tuple[bool, Any], ...]:
    """A pytree path as (is attribute, key) pairs, which Dynamo can follow."""
    return tuple(
        (True, k.name) if isinstance(k, pytree.GetAttrKey) else (False, getattr(k, "key", getattr(k, "idx", None)))
        for k in path
    )


def _follow(value: Any, steps: tuple[tuple[bool, Any], ...]) -> Any:
    for is_attribute, key in steps:
        value = getattr(value, key) if is_attribute else value[key]
    return value


def difference(entry: Entry, call: Call) -> str:
    """What in ``call`` another entry was needed for."""
    mine = entry.call
    for (name, spec), other in zip(mine.spec, call.spec, strict=False):
        if (name, spec) != other:
            return f"argument {other[0]} is {_brief(other[1])}, was {name} {_brief(spec)}"
    if len(mine.spec) != len(call.spec):
        return f"{len(call.spec)} arguments, were {len(mine.spec)}"
    for path, was, now in zip(call.paths, mine.key[1], call.key[1], strict=False):
        if was != now:
            return f"{path}: {_describe_metadata(now)}, was {_describe_metadata(was)}"
    return "sizes: " + "; ".join(entry.graph.accepts.failing(call.leaves)[:3])


def _brief(spec: Any) -> str:
    return str(spec[2]) if spec[0] == "const" else str(spec[0])


def _describe_metadata(metadata: tuple[Any, ...]) -> str:
    dtype, device, static, grad = metadata
    return f"{dtype} on {device}, static sizes {[s if s >= 0 else '*' for s in static]}, requires_grad={grad}"
