"""What a captured graph assumes about sizes, as one function.

Dynamo's shape environment collects every relation between sizes that tracing relied on. They are kept, together with
the equalities that one symbol for several dims means, and compiled to one Python expression over the leaves' shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.utils._sympy.printers import PythonPrinter

from compile_policy.compat import guard_origin, leaf_dim_of_source, symbol_sources
from compile_policy.expands import expands_where_it_differs

# Relations that say nothing about the program's result. Keep this list short; each line says why.
_IGNORABLE_ORIGINS = (
    # copy_ asks whether its target overlaps itself; an answer for other sizes never changes what is copied.
    "in meta_copy_",
    # matmul folds batch dims or expands them, by strides and by sizes 1; the product is the same either way.
    "in matmul)",
    # The packed projection of nn.MultiheadAttention asks whether a transposed tensor has to be copied.
    "in _in_projection_packed)",
    # Convolution chooses its kernel by the batch (16 or more goes to oneDNN); each gives the same result and layout.
    "in conv)",
)
# `.contiguous()` and `.reshape()` ask whether a copy is needed, which a size of 1 can answer in another way. With the
# copy or without, the values are the same; that nothing is written through an alias, the proof of each form shows.
_ASKS_FOR_COPY = re.compile(r"\.(contiguous|reshape)\(.* in run_node\)", re.DOTALL)
# An assignment to a part of a tensor leaves leading sizes of 1 out of the value, which broadcasts all the same.
_ASSIGNS = re.compile(
    r"^[\w.]+\[[^\]()]*\] = (\(|torch\.arange\(.*\)|[\w.]+(\[[^\]()]*\])?)  # .* in run_node\)", re.DOTALL
)
# nn.Linear asks whether its input is contiguous, and multiplies folded or not: as in matmul, the same product. Code for
# an input that is not holds for one that is.
_MULTIPLIES = re.compile(r"^return F\.linear\(input, self\.weight, self\.bias\)  # .* in run_node\)", re.DOTALL)
# Normalisation by the root mean square keeps the layout of its input where that is one with channels last, and asks for
# sizes of 1 to tell: the same values in another order.
_NORMALISES = re.compile(
    r"^return torch\.rms_norm\(input, normalized_shape, weight, eps\)  # nn/functional\.py:\d+ in "
)
_LEAF = re.compile(r"\bs\[(\d+)\]")
_LINE = re.compile(r"# (?!nn/)(?:\S*/)?(\w+\.py:\d+) in \w+")  # of the model, not of torch.nn
_FUNCTIONS: dict[str, Any] = {"Max": max, "Min": min, "floor": lambda x: int(x // 1), "math": math}


class ShapeConditions:
    """Callable on the leaves: whether their sizes fulfil every condition.

    Attributes:
        lines: condition -> place of the model's line that assumed it, where that is known.
        passed_over: relations that tracing relied on too, and that say nothing about the result. Tracing answers a
            question only once: one that matters may have gone by what another said.
    """

    def __init__(
        self, conditions: Sequence[str], lines: Mapping[str, str] | None = None, passed_over: Sequence[str] = ()
    ) -> None:
        self.lines = lines or {}
        self.conditions = tuple(dict.fromkeys(conditions))
        self.passed_over = tuple(r for r in dict.fromkeys(passed_over) if r not in self.conditions)
        self._test: Callable[[Sequence[Any]], bool] = eval(_source(self.conditions), dict(_FUNCTIONS))
        self._as_traced: list[Callable[[Sequence[Any]], bool]] = [
            eval(_source((relation,)), dict(_FUNCTIONS)) for relation in self.passed_over
        ]
        self._narrowed: dict[Any, Callable[[Sequence[Any]], bool]] = {}

    def __call__(self, leaves: Sequence[torch.Tensor]) -> bool:
        return bool(self._test([t.shape for t in leaves]))

    def unlike(self, leaves: Sequence[torch.Tensor]) -> tuple[str, ...]:
        """The relations passed over that do not hold for these: whether they matter is to be tried."""
        if not self.passed_over:
            return ()
        shapes = [t.shape for t in leaves]
        return tuple(r for r, holds in zip(self.passed_over, self._as_traced, strict=True) if not holds(shapes))

    def minding(self, relations: Sequence[str]) -> ShapeConditions:
        """The same conditions, and these relations, which were passed over and matter."""
        return ShapeConditions([*self.conditions, *relations], self.lines, self.passed_over)

    def narrowed(self, same: Mapping[int, int], varying: Collection[int]) -> Callable[[Sequence[Any]], bool]:
        """What is left to test when the conditions held for other shapes and only some leaves have changed since.

        Args:
            same: leaf -> the leaf whose shape it shares.
            varying: the leaves, none of which shares another's shape, that may have changed.

        Returns:
            A function of all leaves' shapes; it reads none of a leaf that shares another's.
        """
        key = (tuple(same.items()), tuple(varying))
        if key not in self._narrowed:
            renamed = [_LEAF.sub(lambda m: f"s[{same.get(int(m[1]), int(m[1]))}]", c) for c in self.conditions]
            left = [c for c in dict.fromkeys(renamed) if any(f"s[{i}]" in c for i in varying) and not _trivial(c)]
            self._narrowed[key] = eval(_source(left), dict(_FUNCTIONS))
        return self._narrowed[key]

    def failing(self, leaves: Sequence[torch.Tensor]) -> list[str]:
        """The conditions that do not hold, for people."""
        shapes = [t.shape for t in leaves]
        return [c for c in self.conditions if not eval(_source((c,)), dict(_FUNCTIONS))(shapes)]


def _trivial(condition: str) -> bool:
    left, _, right = condition.partition(" == ")
    return left == right


def _source(conditions: Sequence[str]) -> str:
    return "lambda s: " + (" and ".join(conditions) or "True")


def conditions_of(
    env: Any,
    graph: torch.fx.Graph,
    leaves: Sequence[torch.Tensor],
    shapes: Mapping[int, Sequence[Any]],
    captured: int | None = None,
) -> ShapeConditions:
    """Conditions of the graph being traced.

    Args:
        env: the trace's ``ShapeEnv``.
        graph: the captured graph.
        leaves: the example's tensors.
        shapes: leaf index -> traced (symbolic) shape, for leaves that are inputs of the graph.
        captured: number of relations that capture relied on; the others come from lowering, which asks for sizes of 1
            where the order of strides or a copy depends on them. All of them unless given.
    """
    captured = len(env.guards) if captured is None else captured
    places = [(f"s[{i}][{d}]", size) for i, shape in sorted(shapes.items()) for d, size in enumerate(shape)]
    names = _first_places(places, env, len(leaves))
    conditions = [c for place, size in places for c in _dim_condition(names, place, size)]
    passed_over: list[str] = []
    lines: dict[str, str] = {}
    printer = _Printer(names)
    for number, guard in enumerate(env.guards):
        if not guard.expr.free_symbols:
            continue
        unknown = [s for s in guard.expr.free_symbols if s not in names]
        if _ignorable(guard) or (number >= captured and _leaves_out_one(guard.expr)):
            passed_over += [] if unknown else [f"({printer.doprint(guard.expr)})"]
            continue
        if unknown:
            raise RuntimeError(f"the trace assumed {guard.expr}, and {unknown} is no size of an input")
        conditions.append(f"({printer.doprint(guard.expr)})")
        line = _LINE.search(guard_origin(guard))
        if line is not None:
            lines.setdefault(conditions[-1], line[1])
    for size in _kept_by_squeeze(graph):
        if size.free_symbols - names.keys():
            raise RuntimeError(f"the trace assumed that {size} is not 1, and it is no size of an input")
        conditions.append(f"({printer.doprint(size)} != 1)")
    return ShapeConditions(conditions, lines, passed_over)


def _kept_by_squeeze(graph: torch.fx.Graph) -> Iterator[sympy.Expr]:
    """Sizes that ``squeeze`` was traced to keep: it drops a dim of size 1, and the trace, which takes none for 1,
    notes nothing."""
    for node in graph.nodes:
        if node.target not in ("squeeze", "squeeze_", torch.squeeze, torch.ops.aten.squeeze_):
            continue
        shape = node.all_input_nodes[0].meta["example_value"].shape
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", range(len(shape)))
        for dim in [dims] if isinstance(dims, int) else dims:
            if isinstance(shape[dim], torch.SymInt):
                yield shape[dim].node.expr


def _ignorable(guard: Any) -> bool:
    origin = guard_origin(guard)
    if any(name in origin for name in _IGNORABLE_ORIGINS):
        return True
    asked = origin.strip()
    if _NORMALISES.search(asked) and _asks_for_one(guard.expr):
        return True
    if not isinstance(guard.expr, sympy.Ne):
        return False
    if _MULTIPLIES.search(asked) or expands_where_it_differs(asked):
        return True
    one = sympy.Integer(1) in guard.expr.args or _asks_for_one(guard.expr)
    return one and bool(_ASKS_FOR_COPY.search(asked) or _ASSIGNS.search(asked))


def _leaves_out_one(relation: Any) -> bool:
    """Whether all that a relation asks is that some size is neither 0 nor 1."""
    if not isinstance(relation, (sympy.GreaterThan, sympy.LessThan)):
        return _asks_for_one(relation)
    left = sympy.expand(relation.lhs - relation.rhs)
    sizes = list(left.free_symbols)
    return len(sizes) == 1 and sympy.simplify(left.subs(sizes[0], 2)) == 0 and sympy.degree(left, sizes[0]) == 1


def _asks_for_one(relation: Any) -> bool:
    """Whether all that a relation asks is that some size is not 1: ``16 * s != 16``, ``s > 1``."""
    if not isinstance(relation, (sympy.Ne, sympy.StrictGreaterThan, sympy.StrictLessThan)):
        return False
    left = sympy.expand(relation.lhs - relation.rhs)
    linear = (size for size in left.free_symbols if left.is_polynomial(size) and sympy.degree(left, size) == 1)
    return any(sympy.expand(left.subs(size, 1)) == 0 for size in linear)


def _first_places(places: Sequence[tuple[str, Any]], env: Any, n_leaves: int) -> dict[sympy.Symbol, str]:
    """symbol -> one place where its value can be read off the leaves."""
    names: dict[sympy.Symbol, str] = {}
    for place, size in places:
        if not isinstance(size, int) and isinstance(size.node.expr, sympy.Symbol):
            names.setdefault(size.node.expr, place)
    for symbol, sources in symbol_sources(env).items():
        for source in sources:
            leaf = leaf_dim_of_source(source)
            if leaf is not None and leaf[0] < n_leaves:
                names.setdefault(symbol, f"s[{leaf[0]}][{leaf[1]}]")
    return names


def _dim_condition(names: Mapping[sympy.Symbol, str], place: str, size: Any) -> list[str]:
    if isinstance(size, int):
        return [f"{place} == {size}"]
    expr = _Printer(names).doprint(size.node.expr)
    return [] if expr == place else [f"{place} == {expr}"]


class _Printer(PythonPrinter):
    """Sympy to Python, with symbols as places in ``s``."""

    def __init__(self, names: Mapping[sympy.Symbol, str]) -> None:
        super().__init__()
        self._names = names

    def _print_Symbol(self, expr: sympy.Symbol) -> str:
        return self._names[expr]

    def _print_Max(self, expr: sympy.Expr) -> str:
        return f"max({', '.join(self._print(a) for a in expr.args)})"

    def _print_Min(self, expr: sympy.Expr) -> str:
        return f"min({', '.join(self._print(a) for a in expr.args)})"

    # Those of torch's printer propagate symbols; here are numbers, in an expression that names nothing of torch.
    def _print_ToFloat(self, expr: sympy.Expr) -> str:
        return f"float({self._print(expr.args[0])})"

    def _helper_sqrt(self, expr: sympy.Expr) -> str:
        return f"math.sqrt({self._print(expr)})"
