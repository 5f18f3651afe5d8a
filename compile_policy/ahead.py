"""Lowering ahead of time: a captured graph as one native package, called with nothing but tensors.

AOTInductor compiles the graph to a shared library that holds no weights and needs neither Dynamo, nor guards, nor
Python to run. It takes what has no gradients; the rest goes to Inductor's JIT.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compile_policy import captured, compat
from compile_policy.blocks import BlockSummary, Piece, divide, whole
from compile_policy.compat_backward import EAGER_RANDOM
from compile_policy.compat_compiler import own_cache
from compile_policy.compat_fakes import with_own_sizes
from compile_policy.program import Package, Program, Segment, Special
from compile_policy.single import OPTIONS, has_single_row, hidden_tails, single_row

#: (slot of an input, dim, size)
Sizes = Sequence[tuple[int, int, int]]

_OPTIONS: dict[str, Any] = {
    "aot_inductor.package": True,
    # The wrapper only calls kernels; a higher level costs much of the compile time and gains a few microseconds a call.
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "size_asserts": False,  # sizes are checked once per call, by the entry's conditions
}
#: For a block whose kernels take so short that these microseconds count, and that is called many times in a step.
#: Precompiled headers are those of another level: making them for this one would cost more than they save.
_SHORT_AND_REPEATED: dict[str, Any] = {
    "aot_inductor.compile_wrapper_opt_level": "O1",
    "cpp_cache_precompile_headers": False,
}


def can_lower_ahead(gm: torch.fx.GraphModule) -> bool:
    """Whether AOTInductor can take the graph: no gradients wanted, no autocast.

    Operators implemented in Python are no obstacle: a package calls them through the dispatcher of its process.
    """
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        is_input = node.op == "placeholder" and isinstance(value, torch.Tensor)
        if is_input and value.requires_grad and torch.is_grad_enabled():
            return False
    return not torch.is_autocast_enabled("cpu")


def sizes_from_tensors(gm: torch.fx.GraphModule) -> list[int]:
    """Replace every size that ``gm`` takes as an input by the size of a tensor input that has it.

    Returns:
        The positions of the inputs that are left: the tensors.
    """
    inputs = _inputs(gm)
    tensors = [n for n in inputs if isinstance(n.meta["example_value"], torch.Tensor)]
    places: dict[Any, tuple[torch.fx.Node, int]] = {}
    for node in tensors:
        for dim, size in enumerate(node.meta["example_value"].shape):
            if isinstance(size, torch.SymInt):
                places.setdefault(size.node.expr, (node, dim))
    kept = [position for position, node in enumerate(inputs) if node in tensors]
    for node in inputs:
        if node in tensors:
            continue
        if node.users:
            with gm.graph.inserting_after(tensors[-1]):
                size = gm.graph.call_function(torch.ops.aten.sym_size.int, places[node.meta["example_value"].node.expr])
            size.meta["example_value"] = node.meta["example_value"]
            node.replace_all_uses_with(size)
        gm.graph.erase_node(node)
    gm.recompile()
    return kept


def lower_ahead(
    gm: torch.fx.GraphModule,
    sizes: Sizes = (),
    *,
    flat: bool = False,
    blocks_only: bool = False,
    make: Callable[[torch.fx.GraphModule], Package] | None = None,
) -> tuple[Program, BlockSummary]:
    """Compile ``gm``, whose inputs are all tensors: blocks that are the same code once, or ``flat`` as one package.

    Args:
        sizes: of some inputs in the most frequent calls; where that makes products of a matrix and a single row, such
            calls get packages of their own.
        blocks_only: what surrounds the blocks is not compiled, and runs as it was captured. A graph without blocks is
            compiled all the same.
        make: compiles one piece; `make_package` unless given.

    Raises:
        Exception: whatever AOTInductor raises.
    """
    make = make or make_package
    pieces, summary = (whole if flat else divide)(gm)
    summary = replace(summary, blocks_only=blocks_only)
    symbols = _symbols(gm, sizes)
    as_captured = _as_captured(pieces) if blocks_only and summary.instances else {}
    summary = replace(summary, captured=len(as_captured))
    single = {p.form for p in pieces if p.form not in as_captured and has_single_row(p.graph, symbols)}
    tails = hidden_tails(pieces, symbols, single)
    numbers: dict[tuple[Any, ...], int] = {}
    special: dict[int, int] = {}
    packages: list[Package] = []
    segments: list[Segment] = []
    slots = {node: slot for slot, node in enumerate(_inputs(gm))}
    n_inputs = len(slots)
    for piece in pieces:
        if piece.form not in numbers:
            numbers[piece.form] = len(packages)
            packages.append(as_captured.get(piece.form) or make(piece.graph))
            if piece.form in single:
                row = single_row(piece.graph, symbols, tails.get(piece.form, ()))
                if piece.block:
                    row.meta[OPTIONS] |= _SHORT_AND_REPEATED
                special[numbers[piece.form]] = len(packages)
                packages.append(make(row))
        taken = tuple(slots[node] for node in piece.inputs)
        slots.update({node: slot for slot, node in enumerate(piece.results, len(slots))})
        segments.append(Segment(numbers[piece.form], taken, tuple(slots[node] for node in piece.results)))
    results: Any = gm.graph.output_node().args[0]
    other = None
    if special:
        masks = {slots[piece.inputs[number]] for piece in pieces for number in tails.get(piece.form, ())}
        instead = tuple(special.get(s.package, s.package) for s in segments)
        other = Special(tuple(sizes), instead, tuple(sorted(masks)))
    return Program(packages, segments, tuple(slots[node] for node in results), n_inputs, other), summary


def _symbols(gm: torch.fx.GraphModule, sizes: Sizes) -> dict[Any, int]:
    """symbol -> size, for sizes that are symbols of the trace."""
    inputs = _inputs(gm)
    found = [(inputs[slot].meta["example_value"].shape[dim], size) for slot, dim, size in sizes]
    return {symbol.node.expr: size for symbol, size in found if isinstance(symbol, torch.SymInt)}


def _as_captured(pieces: Sequence[Piece]) -> dict[tuple[Any, ...], Package]:
    """Form -> package that nothing was compiled for: what surrounds blocks, where it is nothing but operators with
    names."""
    found = {}
    for piece in pieces:
        if not piece.block and piece.form not in found:
            with contextlib.suppress(captured.NotWritable):
                data = captured.written(piece.graph)
                found[piece.form] = Package(data, captured.runner(data))
    return found


def compile_hello() -> None:
    """Compile a kernel of one line anew, load it, and look at what it computes.

    Raises:
        RuntimeError: it computes something else than eager.
        Exception: whatever AOTInductor or the compiler raises.
    """
    graph = torch.fx.Graph()
    value = graph.placeholder("x")
    graph.output((graph.call_function(torch.relu, (graph.call_function(torch.sin, (value,)),)),))
    x = torch.linspace(-1.0, 1.0, 16)
    value.meta["example_value"] = x
    with torch.no_grad(), own_cache():
        (found,) = make_package(torch.fx.GraphModule({}, graph)).run([x])
    if not torch.allclose(found, torch.relu(torch.sin(x))):
        raise RuntimeError("the kernel computes something else than eager")


def make_package(gm: torch.fx.GraphModule, *, autotune: bool = False) -> Package:
    """Compile ``gm``, whose inputs are all tensors, with the options that its ``meta`` asks for; load the package."""
    options = {**_OPTIONS, **EAGER_RANDOM, **gm.meta.get(OPTIONS, {}), **({"max_autotune": True} if autotune else {})}
    with tempfile.TemporaryDirectory(prefix="compile_policy_") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own pickling of its tree specs
        path = Path(folder) / "graph.pt2"
        inputs = with_own_sizes([n.meta["example_value"] for n in _inputs(gm)])
        compat.write_package(gm, tuple(inputs), str(path), options)
        return Package(path.read_bytes(), compat.load_package(str(path)))


def _inputs(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]
