"""What operations cost, estimated from their shapes: floating-point operations, and bytes that go through memory.

An estimate counts a multiplication with an addition as two, an element of a pointwise operation as one, and nothing for
what only moves data. Bytes are those of inputs and results, each once: what a kernel reads twice may cost more, what
stays in a cache less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compile_policy.graphs.sizes import evaluated
from compile_policy.graphs.values import Value

_BITS = {"f64": 64, "i64": 64, "c64": 64, "f32": 32, "i32": 32, "f16": 16, "bf16": 16, "i16": 16, "c128": 128}
_VIEWS = frozenset(
    (
        "view",
        "reshape",
        "transpose",
        "permute",
        "unsqueeze",
        "squeeze",
        "expand",
        "expand_as",
        "getitem",
        "split",
        "chunk",
        "unbind",
        "detach",
        "t",
        "select",
        "slice",
        "flatten",
        "unflatten",
        "as_strided",
        "split_with_sizes",
        "alias",
        "narrow",
        "_unsafe_view",
    )
)
_MOVES = frozenset(
    (
        "to",
        "float",
        "half",
        "contiguous",
        "clone",
        "cat",
        "stack",
        "pad",
        "embedding",
        "index",
        "gather",
        "repeat",
        "repeat_interleave",
        "zeros",
        "ones",
        "full",
        "arange",
        "empty",
        "copy_",
        "_to_copy",
        "convert_element_type",
    )
)
_REDUCTIONS = frozenset(
    (
        "sum",
        "mean",
        "max",
        "min",
        "amax",
        "amin",
        "argmax",
        "argmin",
        "prod",
        "softmax",
        "log_softmax",
        "cumsum",
        "argsort",
        "sort",
    )
)


@dataclass(frozen=True)
class Cost:
    """Of one operation, or of many.

    Attributes:
        flops: floating-point operations.
        bytes: read and written.
        unknown: operations whose sizes are not known, and that are not counted.
    """

    flops: int = 0
    bytes: int = 0
    unknown: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.unknown + other.unknown)


def short_name(op: str) -> str:
    """``torch.ops.aten.add.Tensor`` and ``torch.add`` as ``add``."""
    parts = op.split(".")
    return parts[-2] if len(parts) >= 3 and parts[-1] in ("default", "Tensor", "Scalar", "int", "dim") else parts[-1]


def op_cost(op: str, value: Value, inputs: Sequence[Value], sizes: Mapping[str, int]) -> Cost:
    """Of one operation whose result is ``value``."""
    name = short_name(op)
    tensors = [known for known in inputs if known.shape is not None]
    if name in _VIEWS or value.shape is None:
        return Cost()
    shapes = [evaluated(known.shape, sizes) for known in (value, *tensors)]
    known_shapes = [shape for shape in shapes if shape is not None]
    if len(known_shapes) != len(shapes):
        return Cost(unknown=1)
    moved = sum(_bytes(v, shape) for v, shape in zip((value, *tensors), known_shapes, strict=True))
    return Cost(_flops(name, known_shapes[0], known_shapes[1:]), moved)


def _flops(name: str, out: tuple[int, ...], inputs: list[tuple[int, ...]]) -> int:
    elements = math.prod(out)
    if name in ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm") and inputs:
        factor = inputs[1] if name in ("addmm", "baddbmm") and len(inputs) > 1 else inputs[0]
        return 2 * elements * (factor[-1] if factor else 1)
    if name.startswith("conv") and len(inputs) > 1:
        return 2 * elements * math.prod(inputs[1][1:])
    if "attention" in name and len(inputs) > 1 and len(out) >= 2:
        return _attention(inputs[0], inputs[1])
    if name in _MOVES:
        return 0
    return math.prod(inputs[0]) if name in _REDUCTIONS and inputs else elements


def _attention(query: tuple[int, ...], key: tuple[int, ...]) -> int:
    """Two matrix products of every query with every key, as if nothing were masked.

    Four dims are (batch, heads, length, width); three are packed pictures, (length, heads, width).
    """
    if len(query) < 4:
        return 4 * math.prod(query) * (key[0] if key else 1)
    return 4 * math.prod(query) * key[-2]


def _bytes(value: Value, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * max(_BITS.get(value.dtype, 8) // 8, 1)


class Traffic:
    """What kernels move through memory, worked out on the lowered graph."""

    def __init__(self, graph: Mapping[str, Value], sizes: Mapping[str, int]) -> None:
        self.graph = graph
        self.sizes = sizes
        self._roots: dict[str, str] = {}
        self._readers: dict[str, set[str]] = {}
        for value in graph.values():
            root = value.inputs[0] if _is_view(value) and value.inputs else value.name
            self._roots[value.name] = self._roots.get(root, root)
            for name in () if _is_view(value) else value.inputs:
                self._readers.setdefault(self._roots[name], set()).add(value.name)

    def bytes(self, members: Sequence[str]) -> int | None:
        """Of one kernel: what its operations read from outside of it, and what is read outside of what they make.

        Returns:
            ``None`` where one of the operations, or a size, is not known.
        """
        known = [self.graph[name] for name in members if name in self.graph]
        if not known or len(known) != len(members):
            return None
        made = {value.name for value in known if not _is_view(value)}
        read = {self._roots[name] for value in known for name in value.inputs} - made
        kept = {name for name in made if self._readers.get(name, set()) - made}
        return self._sum(read | (kept or made))

    def _sum(self, names: set[str]) -> int | None:
        total = 0
        for value in (self.graph[name] for name in names):
            shape = evaluated(value.shape, self.sizes)
            if shape is not None:
                total += _bytes(value, shape)
            elif value.shape is not None:
                return None
        return total


def _is_view(value: Value) -> bool:
    return value.text.startswith("torch.ops.aten.") and short_name(value.text.partition("(")[0]) in _VIEWS
