"""The seam between a captured graph and the code that runs: which compiler gets it, and when.

Two roads: native packages ahead of time where AOTInductor can take the graph, a backend of Dynamo otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch._dynamo.backends.registry import lookup_backend

from compile_policy.ahead import Sizes, can_lower_ahead, lower_ahead, make_package
from compile_policy.blocks import BlockSummary
from compile_policy.compat_backward import inductor_jit, keep_checkpoints
from compile_policy.program import Program


class Lowering(Protocol):
    """The seam: a captured graph and its inputs -> a callable of the same flat inputs.

    ``ahead`` says that a graph is lowered after capture and not inside Dynamo's, as a function of tensors alone.

    Attributes:
        frequent: label -> size in the most frequent calls, which may get code of their own.
    """

    frequent: Mapping[str, int]

    def __call__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]: ...

    def ahead(self, gm: torch.fx.GraphModule) -> bool: ...

    def takes_any_graph(self) -> bool:
        """Whether a graph without gradients need not be lowered inside its capture, so that it may be put together
        from parts."""

    def program(self, gm: torch.fx.GraphModule, sizes: Sizes = ()) -> tuple[Program, BlockSummary]:
        """Native packages for a graph that goes ahead of time; its inputs are all tensors by now.

        Args:
            sizes: of some inputs in the most frequent calls.
        """

    def jit(self) -> Lowering:
        """The road for what cannot be lowered ahead of time."""

    def for_sizes(self, frequent: Mapping[str, int]) -> Lowering:
        """The same lowering, told the ``frequent`` sizes."""


class InductorJit:
    """A backend of Dynamo by name: ``inductor``, ``aot_eager``, ``eager`` or any other."""

    frequent: Mapping[str, int] = {}

    def __init__(self, backend: str, *, autotune: bool = False) -> None:
        self.backend = backend
        self.autotune = autotune

    def __call__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.backend == "eager":
            keep_checkpoints(gm)
        if self.backend != "inductor":
            return lookup_backend(self.backend)(gm, list(inputs))
        return inductor_jit(gm, inputs, {"max_autotune": True} if self.autotune else {})

    def ahead(self, gm: torch.fx.GraphModule) -> bool:
        return False

    def takes_any_graph(self) -> bool:
        return self.backend == "eager"

    def program(self, gm: torch.fx.GraphModule, sizes: Sizes = ()) -> tuple[Program, BlockSummary]:
        raise AssertionError("a graph for the JIT is lowered inside its capture")

    def jit(self) -> Lowering:
        return self

    def for_sizes(self, frequent: Mapping[str, int]) -> Lowering:
        lowering = copy.copy(self)
        lowering.frequent = frequent
        return lowering


class AheadOfTime(InductorJit):
    """Native packages for graphs that AOTInductor can take, JIT for the others.

    Autotuning is for one package of everything; otherwise blocks that are the same code are compiled once, and with
    ``blocks_only`` nothing else.
    """

    def __init__(self, backend: str, *, autotune: bool = False, blocks_only: bool = False) -> None:
        super().__init__(backend, autotune=autotune)
        self.blocks_only = blocks_only

    def ahead(self, gm: torch.fx.GraphModule) -> bool:
        return can_lower_ahead(gm)

    def takes_any_graph(self) -> bool:
        return not torch.is_autocast_enabled("cpu")

    def program(self, gm: torch.fx.GraphModule, sizes: Sizes = ()) -> tuple[Program, BlockSummary]:
        make = partial(make_package, autotune=self.autotune)
        return lower_ahead(gm, sizes, flat=self.autotune, blocks_only=self.blocks_only, make=make)

    def jit(self) -> Lowering:
        return InductorJit(self.backend, autotune=self.autotune)


def lower_with(backend: str, *, autotune: bool = False, blocks_only: bool = False) -> Lowering:
    """The lowering for a backend name; ``inductor`` means packages where possible."""
    if backend == "inductor":
        return AheadOfTime(backend, autotune=autotune, blocks_only=blocks_only)
    return InductorJit(backend)
