"""A component run eager on the example: the shape of its result, and the numbers to compare an entry with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from compile_policy import compat, compat_precision, containers
from compile_policy.call_key import CONSTANTS, Call, adapted, collect_state, rebuild
from compile_policy.compiled import CompiledGraph
from compile_policy.effects import ChangesItself
from compile_policy.errors import NotCompilable, first_line
from compile_policy.example import copies
from compile_policy.failure import place_in
from compile_policy.fingerprint import difference, fingerprint
from compile_policy.gradients import TOLERANCE as GRADIENT_TOLERANCE
from compile_policy.gradients import (
    comparable,
    cotangents_of,
    gradient_difference,
    gradients_of,
    numbered,
    wanted_of,
)
from compile_policy.random_state import drawn_states, same_states, seed_for_comparison
from compile_policy.reach import Reached
from compile_policy.unseen import Unseen, refuse_effects

#: Largest error of a compiled entry against eager on the example, relative to the largest value of the tensor.
#: Fusion keeps intermediates in higher precision than eager does, so low precisions get room for a few roundings.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}

#: Room for weights of few bits: activations are rounded to as few steps, and the last digit decides which way.
QUANTIZED = 5e-2


def tolerances(module: torch.nn.Module, table: Mapping[torch.dtype, float] = TOLERANCE) -> Mapping[torch.dtype, float]:
    """Accepted errors by dtype: never less than for the precision that products are computed in, whatever dtype their
    sums are given back in, and wider where the weights are quantized: tensors of another class, or whole numbers."""
    least = table.get(product_dtype(module), 0.0)
    table = {dtype: max(error, least) for dtype, error in table.items()}
    quantized = any(
        type(t) not in (torch.nn.Parameter, torch.Tensor) or (t.dtype.itemsize == 1 and t.dtype is not torch.bool)
        for t in module.parameters()
    )
    return {dtype: max(error, QUANTIZED) for dtype, error in table.items()} if quantized else table


def product_dtype(module: torch.nn.Module) -> torch.dtype:
    """The least precise dtype of matrix products: that of autocast, of float32 products, or of weights."""
    found = {p.dtype for p in module.parameters() if p.dim() > 1 and p.is_floating_point()}
    found |= {dtype for _, dtype in compat.autocast_state()}
    found |= compat_precision.product_dtypes()
    known = [dtype for dtype in found if dtype in TOLERANCE]
    return max(known, key=TOLERANCE.__getitem__, default=torch.float32)


class Reference:
    """The component run eager on the example.

    Attributes:
        tree: pytree structure of the result; ``leaves``: for each of its leaves what `OutputSpec` says.
        state_sizes: number of state tensors of each adapted argument, in order.
        written: places of leaves that the component writes into.

    Raises:
        NotCompilable: the result cannot come out of a graph, or the run changes the component itself.
    """

    def __init__(self, module: torch.nn.Module, call: Call, example: list[torch.Tensor], world: Unseen) -> None:
        self.module = module
        self.world = world
        self.call = call
        self.example = copies(example)
        self.used = copies(example)
        self.drawn: tuple[Any, ...] = ()
        values, result = self._settled()
        mine = [v for name, spec in call.spec for _, _, v in adapted(spec, values[name])]
        mine += [v for v in values.values() if not isinstance(v, (torch.Tensor, *CONSTANTS))]
        with_paths, self.tree = containers.flattened(result, lambda x: any(x is a for a in mine))
        leaves = [leaf for _, leaf in with_paths]
        self.paths = [path for path, leaf in with_paths if isinstance(leaf, torch.Tensor)]
        self.flags = [(path, int(leaf)) for path, leaf in with_paths if isinstance(leaf, bool)]
        self.words = [(path, leaf) for path, leaf in with_paths if leaf is None or isinstance(leaf, str)]
        self.leaves = tuple(_describe(leaf, values, module) for leaf in leaves)
        state = [tensors for name, spec in call.spec for tensors in collect_state(spec, values[name])]
        self.state_sizes = [len(tensors) for tensors in state]
        self.tensors = [x for x in leaves if isinstance(x, torch.Tensor)] + [t for ts in state for t in ts]
        places = enumerate(zip(self._versions, self.used, self.example, strict=True))
        self.written = frozenset(i for i, (v, t, was) in places if _version(t) != v or relative_error(t, was) > 0)

    def _settled(self) -> tuple[dict[str, Any], Any]:
        """Run, once more if the first run changed the component (a lazily built table), until it changes no more."""
        changed: list[str] = []
        for _ in range(3):  # another thread may be at it too
            before, reached = fingerprint(self.module), Reached(self.module)
            self.used = copies(self.example)
            self._versions = [_version(t) for t in self.used]
            seed_for_comparison()
            values, result = self._run(self.used)
            self.drawn = drawn_states()
            after = fingerprint(self.module)
            changed = reached.changed()
            if changed and self.world.users:  # only where nothing is compiled, or in a layer that was not traced
                refuse_effects(run_of(self.call, self.module), copies(self.example), self.module, self.world.users)
                changed = []
            if after == before and not changed:
                return values, result
        what = difference(before, after) if after != before else ", ".join(changed[:3])
        raise ChangesItself(f"every call changes the component: {what}")

    def _run(self, leaves: Sequence[torch.Tensor]) -> tuple[dict[str, Any], Any]:
        it = iter(leaves)
        values = {name: rebuild(spec, it) for name, spec in self.call.spec}
        own = [v for name, spec in self.call.spec for _, _, v in adapted(spec, values[name])]

        def is_leaf(value: Any) -> bool:
            return any(value is one for one in own)

        before = {name: containers.contents(value, is_leaf) for name, value in values.items()}
        self.world.stand_ins.allow(leaves)
        with self.world.stand_ins:
            result = self.module.forward(**values)
        for name, held in before.items():
            if not containers.same_contents(held, containers.contents(values[name], is_leaf)):
                raise containers.changed(name)
        return values, result

    def traceable(self, module: torch.nn.Module | None = None) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The same run as a function of tensors that returns a flat tuple of tensors; of a stand-in ``module``."""
        spec, paths, flags, words = self.call.spec, self.paths, self.flags, self.words
        forward = (module or self.module).forward

        def component(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
            it = iter(leaves)
            values = {name: rebuild(s, it) for name, s in spec}
            result = forward(**values)
            flat = [containers.follow(result, path) for path in paths]
            for path, expected in flags:  # a flag that depends on a size becomes a condition on that size
                seen = 1 if containers.follow(result, path) else 0
                if seen != expected:
                    raise NotCompilable("a flag in the result differs between two runs")
            for path, word in words:  # read here, or an argument that is only returned would count as unread
                if containers.follow(result, path) != word:
                    raise NotCompilable("a word in the result differs between two runs")
            for name, s in spec:
                for tensors in collect_state(s, values[name]):
                    flat += tensors
            return tuple(flat)

        return component

    def check(self, graph: CompiledGraph) -> float:
        """Largest relative error of the graph on the example.

        Raises:
            NotCompilable: beyond the tolerance of the dtype.
        """
        leaves = copies(self.example)
        tolerance = tolerances(self.module)
        seed_for_comparison()
        with torch.no_grad():
            results = graph.run_unseen(leaves)
        worst = 0.0
        # Leaves that the component wrote into (a static cache) are results too.
        for got, want in zip([*results, *leaves], [*self.tensors, *self.used], strict=True):
            error = relative_error(got, want)
            worst = max(worst, error)
            if error > tolerance.get(want.dtype, 0.0):
                raise NotCompilable(f"the compiled graph differs from eager by {error:.2g}")
        if not same_states(drawn_states(), self.drawn):
            raise NotCompilable("the compiled graph draws other random numbers than eager")
        return worst

    def check_gradients(self, graph: CompiledGraph, leaves: Sequence[torch.Tensor]) -> None:
        """Compare the gradients that go back through the graph with eager's.

        Args:
            leaves: the example, or a call of other sizes.

        Raises:
            NotCompilable: they differ, or none go back through the graph, which may write into what they need.
        """
        theirs, mine = copies(leaves), copies(leaves)
        names = [f"leaf {i}" for i in range(len(leaves))]
        self.world.stand_ins.allow(theirs)
        with comparable(), self.world.stand_ins:
            seed_for_comparison()
            expected = numbered(self.traceable()(*theirs))
            cotangents = cotangents_of(expected)
            wanted = wanted_of(self.module, dict(zip(names, theirs, strict=True)))
            eager = gradients_of(expected, cotangents, wanted)
        seed_for_comparison()
        wanted = wanted_of(self.module, dict(zip(names, mine, strict=True)))
        try:
            found = gradients_of(numbered(graph.run_unseen(mine)), cotangents, wanted)
        except RuntimeError as error:
            if self.call.mutable:
                raise NotCompilable(
                    "gradients do not go back through the graph, which writes its states in place",
                    remedy="Call it under torch.no_grad() where none are needed, else with use_cache=False.",
                ) from error
            raise NotCompilable(f"the backward of the compiled graph fails with {first_line(error)}") from error
        reason = gradient_difference(found, eager, tolerances(self.module, GRADIENT_TOLERANCE))
        if reason:
            raise NotCompilable(f"of the compiled graph, {reason}")


def run_of(call: Call, module: torch.nn.Module) -> Callable[..., Any]:
    """The component's forward as a function of the leaves of a call."""
    spec, forward = call.spec, module.forward

    def run(*leaves: torch.Tensor) -> Any:
        it = iter(leaves)
        return forward(**{name: rebuild(s, it) for name, s in spec})

    return run


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max |got - want| / max(1, max |want|); infinite when shapes differ or only one has NaN somewhere."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if want.numel() == 0:
        return 0.0
    a, b = _wide(got), _wide(want)
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    if not torch.equal(a.isinf(), b.isinf()) or not torch.equal(a[a.isinf()], b[b.isinf()]):
        return float("inf")
    finite = b.isfinite()
    if not finite.any():
        return 0.0
    return float((a[finite] - b[finite]).abs().max().item() / max(1.0, b[finite].abs().max().item()))


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t.detach().to(torch.complex128 if t.is_complex() else torch.float64)


def _version(t: torch.Tensor) -> int | None:
    """How often a tensor was written into; tensors of inference mode do not count."""
    return None if t.is_inference() else t._version


def _describe(leaf: Any, values: dict[str, Any], module: torch.nn.Module) -> tuple[Any, ...]:
    if isinstance(leaf, torch.Tensor):
        return ("tensor",)
    for name, value in values.items():
        if leaf is value and not isinstance(leaf, CONSTANTS):
            return ("value", name)
    if leaf is None or isinstance(leaf, (bool, str)):
        return ("const", leaf)
    where = place_in(type(module).forward, "return", last=True)
    raise NotCompilable(
        f"{type(module).__name__}.forward returns a {type(leaf).__name__} ({where}), which a graph cannot return",
        remedy="Do not ask for it, or leave it out in a subclass (compile_policy.layers.override, replace_layers_).",
    )
