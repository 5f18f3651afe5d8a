"""One example call -> one compiled graph.

Dynamo captures the call ``fullgraph`` on a small synthetic example in which every label has its own size >= 2, so
that no size is mistaken for another or for a constant. Its guards are not kept: each is accounted for (`audit`),
and what the graph assumes about sizes becomes one predicate (`ShapeConditions`).
The captured graph is lowered once and called flat afterwards, without Dynamo.
"""

from __future__ import annotations

import itertools
import operator
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.decorators

from compile_policy.audit import Account, account_for
from compile_policy.compat import graph_argument, leaf_dim_of_source, traced_code, tracing_shape_env
from compile_policy.compat_backward import any_size
from compile_policy.compat_buffers import plain_buffers
from compile_policy.compat_sizes import sizes_kept
from compile_policy.compiled import AheadFault, Argument, CompiledGraph
from compile_policy.lowering import Lowering
from compile_policy.predicate import conditions_of
from compile_policy.repeats import NotRepeated, Remake, Repeats, repeats
from compile_policy.shapes import UNBACKED
from compile_policy.shortage import shortage
from compile_policy.stand_ins import Substitutes
from compile_policy.stitch import Stitching
from compile_policy.unseen import Unseen
from compile_policy.watch import suspended
from compile_policy.watched import hidden_builtins

_serial = itertools.count()
_IN_PLACE: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
}


def compile_call(
    fn: Callable[..., tuple[torch.Tensor, ...]],
    leaves: list[torch.Tensor],
    labels: Sequence[Sequence[str | None]],
    lowering: Lowering,
    on_capture: Callable[[], None] = lambda: None,
    module: torch.nn.Module | None = None,
    remake: Remake | None = None,
    world: Unseen | None = None,
) -> CompiledGraph:
    """Capture ``fn(*leaves)`` as one graph and lower it.

    Of layers that do the same, one is traced for the others where ``remake`` allows it (`repeats`). A graph that was to
    be lowered ahead of time and cannot be is captured once more for the JIT.

    Args:
        fn: a pure function of the leaves (besides bound parameters), returning a flat tuple of tensors.
        leaves: the example; every label has one size >= 2 of its own.
        labels: per leaf and dim, the label, or ``None`` for a static dim.
        on_capture: called before each capture, to count it.
        module: the component that ``fn`` runs, which the fingerprint walks; without it more is watched.
        remake: makes ``fn`` for a stand-in of ``module``.
        world: what trial runs wrote into; the graph's own trial runs write into copies of that.

    Raises:
        NotCompilable: the graph depends on something that nothing covers.
        Exception: whatever capture or lowering raises; the caller decides what it means.
    """
    depth = ""
    try:
        if module is not None and remake is not None and lowering.takes_any_graph() and not _wants_gradients(module):
            try:
                found = repeats(module, remake, leaves, [tuple(names) for names in labels], world)
                if found is not None:
                    return _compile_once(fn, leaves, labels, lowering, on_capture, module, (remake, found), world)
            except NotRepeated as reason:
                depth = f"all layers were traced: {reason}"
        graph = _compile_once(fn, leaves, labels, lowering, on_capture, module, world=world)
    except AheadFault as fault:
        if shortage(fault):  # what this process lacks, the other road needs too
            raise (fault.__cause__ or fault) from None
        graph = _compile_once(fn, leaves, labels, lowering.jit(), on_capture, module, world=world)
        graph.why_jit = fault.reason
    graph.depth = depth
    return graph


def _wants_gradients(module: torch.nn.Module) -> bool:
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())


def _compile_once(
    fn: Callable[..., tuple[torch.Tensor, ...]],
    leaves: list[torch.Tensor],
    labels: Sequence[Sequence[str | None]],
    lowering: Lowering,
    on_capture: Callable[[], None],
    module: torch.nn.Module | None,
    shorter: tuple[Remake, Repeats] | None = None,
    world: Unseen | None = None,
) -> CompiledGraph:
    on_capture()
    catcher = _Catcher(_with_own_code(fn), leaves, lowering, module)
    if world is not None:
        catcher.written = world.stand_ins.written
    traced = catcher.traced
    if shorter is not None:
        assert module is not None
        remake, catcher.repeats = shorter
        catcher.short = catcher.repeats.short(module)
        traced = _with_own_code(remake(catcher.short))
    for leaf, names in zip(leaves, labels, strict=True):
        for dim, label in enumerate(names):
            if label is None:
                torch._dynamo.mark_static(leaf, dim)
            elif label.startswith(UNBACKED):
                torch._dynamo.decorators.mark_unbacked(leaf, dim, shape_id=label)
    with _capture_settings(), plain_buffers(module):
        compiled = torch.compile(
            traced,
            backend=catcher,
            fullgraph=True,
            dynamic=True,
            options={"guard_filter_fn": catcher.drop_guards},
        )
        results = compiled(*leaves)
        graph = catcher.finish(results)
        if catcher.deferred is not None:
            graph.lower_ahead(catcher.deferred, labels, lowering)
    catcher.graph = catcher.captured = catcher.deferred = catcher.short = None  # Dynamo keeps its backend
    return graph


@contextmanager
def _capture_settings() -> Iterator[None]:
    """Integers and floats are constants of the trace, sizes are symbols that are never assumed to be 0 or 1."""
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(specialize_int=True, specialize_float=True))
        stack.enter_context(suspended())
        stack.enter_context(sizes_kept())
        stack.enter_context(any_size())
        yield


def _with_own_code(fn: Callable[..., Any]) -> types.FunctionType:
    """``fn`` with a code object that no other function has.

    Dynamo files compiled code under the code object; with guards dropped, two entries that share one would be
    taken for each other.
    """
    assert isinstance(fn, types.FunctionType)
    code = fn.__code__.replace(co_name=f"{fn.__name__}_{next(_serial)}")
    return types.FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)


class _Catcher:
    """A Dynamo backend that notes what was captured and lowers it."""

    def __init__(
        self,
        traced: types.FunctionType,
        leaves: list[torch.Tensor],
        lowering: Lowering,
        module: torch.nn.Module | None,
    ) -> None:
        self.traced = traced
        self.leaves = leaves
        self.lowering = lowering
        self.module = module
        self.repeats: Repeats | None = None
        self.short: torch.nn.Module | None = None  # what is traced instead of the module
        self.problem: Exception | None = None
        self.account = Account((), ())
        self.captured: torch.fx.GraphModule | None = None
        self.graph: CompiledGraph | None = None
        self.deferred: torch.fx.GraphModule | None = None
        self.outputs: Sequence[Any] = ()
        self.written: frozenset[int] = frozenset()  # memory that the component writes into

    def drop_guards(self, entries: Sequence[Any]) -> list[bool]:
        try:
            self.account = account_for(entries, self.traced, self.leaves, self.module, self.repeats)
        except NotRepeated as reason:  # told when Dynamo is through
            self.problem = reason
        return [False] * len(entries)

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        assert self.graph is None, "a fullgraph capture yields one graph"
        _name_sums(gm)
        arguments = [self._argument(n) for n in gm.graph.nodes if n.op == "placeholder"]
        env = tracing_shape_env()
        metadata = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
        shapes = {a.leaf: m.shape for a, m in zip(arguments, metadata, strict=True) if a.kind == "leaf"}
        for others in () if self.repeats is None else self.repeats.others:
            alike = {b[1]: shapes[a[1]] for a, b in others.items() if a[0] == b[0] == "leaf" and a[1] in shapes}
            shapes = {**alike, **shapes}
        self.captured = gm
        ahead = self.lowering.ahead(gm)
        captured = len(env.guards)  # lowering a graph that has gradients assumes more
        code: Callable[..., Any] = gm.forward if ahead or self.repeats else self.lowering(gm, example_inputs)
        accepts = conditions_of(env, gm.graph, self.leaves, shapes, captured)
        self.deferred = gm if ahead else None
        self.graph = CompiledGraph(code, arguments, [], accepts, traced=traced_code())

        def run_and_note(*inputs: Any) -> Any:
            taking_their_place = Substitutes(self.written)
            self.outputs = code(*[taking_their_place.of(value) for value in inputs])
            return self.outputs

        return run_and_note

    def _argument(self, node: torch.fx.Node) -> Argument:
        example, source = graph_argument(node)
        if isinstance(example, torch.Tensor):
            for i, leaf in enumerate(self.leaves):
                if leaf is example:
                    return Argument("leaf", leaf=i)
            return Argument("tensor", tensor=example)
        place = leaf_dim_of_source(source)
        assert place is not None, f"{node.name} is neither a tensor nor a size of a leaf"
        return Argument("size", leaf=place[0], dim=place[1])

    def finish(self, results: Sequence[torch.Tensor]) -> CompiledGraph:
        assert self.graph is not None, "capture ended without a graph"
        assert self.captured is not None
        if self.problem is not None:
            raise self.problem
        self.account.check()
        self.graph.guards = list(self.account.records)
        self.graph.read = self.account.read
        self.graph.watched = (*self.account.watched, *hidden_builtins(self.graph.traced))
        self.graph.outputs = [self._output(r) for r in results]
        self.graph.written = self.written
        gm = self.captured if self.repeats is None else self._stitched(self.captured, self.repeats)
        self.graph.readable = gm.print_readable(print_output=False)
        self.graph.sources = [_source_record(n) for n in gm.graph.nodes if n.op.startswith("call")]
        return self.graph

    def _stitched(self, gm: torch.fx.GraphModule, repeats: Repeats) -> torch.fx.GraphModule:
        """The graph of all layers in place of that of the traced ones."""
        assert self.graph is not None and self.short is not None
        if self.deferred is None and self.lowering.jit() is not self.lowering:
            raise NotRepeated("the graph has to be lowered inside its capture")
        layers = list(self.short.get_submodule(repeats.path).children())
        whole = Stitching(gm, self.graph.arguments, self.graph.outputs, repeats, layers).run()
        self.graph.arguments, self.graph.outputs = whole.arguments, whole.outputs
        self.graph.code, self.graph.depth = whole.graph.forward, str(repeats)
        self.deferred = None if self.deferred is None else whole.graph
        return whole.graph

    def _output(self, result: torch.Tensor) -> tuple[str, int]:
        """Graph output or leaf that ``result`` is: an alias of neither would be computed outside the graph."""
        for i, out in enumerate(self.outputs):
            if out is result:
                return ("graph", i)
        for i, leaf in enumerate(self.leaves):
            if leaf is result:
                return ("leaf", i)
        raise RuntimeError("an output of the component is neither a result of the graph nor one of its inputs")


def _name_sums(gm: torch.fx.GraphModule) -> None:
    """Write ``size += tensor`` as the sum that it is.

    Dynamo notes it as an operator in place, and fx prints that as ``size += tensor``: from there on the size's name
    stands for the sum. Drop this once Dynamo notes it as ``operator.add``.
    """
    for node in gm.graph.nodes:
        plain = _IN_PLACE.get(node.target) if node.op == "call_function" else None
        first = node.args[0] if plain else None
        if isinstance(first, torch.fx.Node) and not isinstance(first.meta.get("example_value"), torch.Tensor):
            node.target = plain
            gm.recompile()


def _source_record(node: torch.fx.Node) -> dict[str, Any]:
    value = node.meta.get("example_value")
    modules = list((node.meta.get("nn_module_stack") or {"": ("", None)}).values())
    return {
        "module": modules[-1][0],
        "name": node.name,
        "op": str(node.target),
        "shape": [str(s) for s in value.shape] if isinstance(value, torch.Tensor) else None,
        "stack": str(node.meta.get("stack_trace") or ""),
    }
