"""Containers in and out of graphs: pytree nodes, named tuples, data classes and model outputs, on the default road."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree
from falling import falls_back
from torch import nn
from transformers.utils import ModelOutput

from compile_policy import CompilationConfig, IntermediateTensors, containers
from compile_policy.decorators import support_torch_compile, use_config
from compile_policy.plan import ComponentReport
from compile_policy.region import region_of


class Pair(NamedTuple):
    """Two tensors and a word."""

    hidden: torch.Tensor
    residual: torch.Tensor
    word: str = "pair"


@dataclass
class Data:
    """A data class that pytree does not know, with one of its kind inside."""

    hidden: torch.Tensor
    residual: torch.Tensor
    word: str = "data"
    inner: Any = field(default=None)


@dataclass(frozen=True)
class Frozen:
    """A data class that refuses attributes."""

    hidden: torch.Tensor
    residual: torch.Tensor


@dataclass(slots=True)
class Slotted:
    """A data class without a dictionary."""

    hidden: torch.Tensor
    residual: torch.Tensor


@dataclass
class Output(ModelOutput):
    """What models of Transformers return."""

    hidden: torch.Tensor | None = None
    residual: torch.Tensor | None = None


class Node:
    """A class of the user's that is registered, with no names for its parts."""

    def __init__(self, hidden: torch.Tensor, residual: torch.Tensor, scale: int) -> None:
        self.hidden, self.residual, self.scale = hidden, residual, scale


pytree.register_pytree_node(Node, lambda n: ([n.hidden, n.residual], n.scale), lambda parts, scale: Node(*parts, scale))

MAKERS: dict[str, Any] = {
    "IntermediateTensors": lambda h, r: IntermediateTensors({"hidden": h, "residual": r}),
    "NamedTuple": lambda h, r: Pair(h, r),
    "dataclass": lambda h, r: Data(h, r, inner=Data(r, h)),
    "frozen": lambda h, r: Frozen(h, r),
    "slots": lambda h, r: Slotted(h, r),
    "ModelOutput": lambda h, r: Output(hidden=h, residual=r),
    "registered": lambda h, r: Node(h, r, 3),
    "OrderedDict": lambda h, r: OrderedDict(hidden=h, residual=r),
    "nested": lambda h, r: {"a": [Pair(h, r), Data(h, r)], "b": IntermediateTensors({"x": r})},
}


class Stage(nn.Module):
    """Takes and returns a container of each kind."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(4, 4)
        self.make = make

    def forward(self, x: torch.Tensor, given: Any = None) -> Any:
        h = x
        if given is not None:
            for leaf in pytree.tree_leaves(given):
                if isinstance(leaf, torch.Tensor):
                    h = h + leaf
        if isinstance(given, Data | Frozen | Slotted):
            h = h + given.hidden - 2 * given.residual
        return self.make(self.lin(h), h)


class Keeps(nn.Module):
    """Writes into what it was given."""

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        given["seen"] = x
        return x + 1


def _compiled(module: nn.Module, backend: str, dims: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    dims = dims or {"x": 0, "given": 0}
    cls = support_torch_compile(type(module), dynamic_arg_dims=dims)  # type: ignore[call-overload]
    with use_config(CompilationConfig(backend=backend, **{"cache_dir": False, **options})):
        return cls(*[module.make] if hasattr(module, "make") else []).eval()


def _report(module: nn.Module) -> ComponentReport:
    region = region_of(module)
    assert region is not None
    return region.report()


def _same(a: Any, b: Any) -> None:
    """Same classes, names and values at every depth."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b)
        return
    parts, others = containers.parts_of(a), containers.parts_of(b)
    if parts is None or others is None:
        assert a == b
        return
    assert [step for step, _ in parts] == [step for step, _ in others]
    for (_, part), (_, other) in zip(parts, others, strict=True):
        _same(part, other)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_container_goes_in_and_out_of_one_graph(kind: str) -> None:
    """Two graphs, with and without the argument, for all sizes; results have eager's class, order and values."""
    module = _compiled(Stage(MAKERS[kind]), "eager")
    with torch.no_grad():
        for n in (3, 5):
            x = torch.randn(n, 4)
            first = module(x)
            _same(first, module.forward(x))
            _same(module(x, first), module.forward(x, first))
    report = _report(module)
    assert (report.graphs, report.eager_calls, report.fallback) == (2, 0, None)


@pytest.mark.parametrize("kind", ["IntermediateTensors", "dataclass", "ModelOutput"])
def test_the_default_road_keeps_containers_on_disk(kind: str, tmp_path: Path) -> None:
    """Inductor compiles them, and another component loads the entry and returns the same."""
    x, results = torch.randn(3, 4), []
    for made in (1, 0):
        module = _compiled(Stage(MAKERS[kind]), "inductor", cache_dir=str(tmp_path))
        with torch.no_grad():
            results.append(module(x))
            _same(results[-1], module.forward(x))
        report = _report(module)
        assert (report.graphs, report.loaded, report.eager_calls) == (made, 1 - made, 0)
    _same(*results)


def test_an_argument_that_is_returned_is_the_callers_own() -> None:
    """As eager has it, and not a copy."""

    class Passes(nn.Module):
        def forward(self, x: torch.Tensor, given: Any) -> Any:
            return x + given["hidden"], given

    module = _compiled(Passes(), "eager")
    for n in (3, 5):
        given = IntermediateTensors({"hidden": torch.randn(n, 4)})
        assert module(torch.randn(n, 4), given)[1] is given
    assert (_report(module).graphs, _report(module).eager_calls) == (1, 0)


def test_a_forward_that_writes_into_a_container_runs_eager() -> None:
    """A graph would leave the caller's container as it was; the reason names the argument."""
    module = _compiled(Keeps(), "eager")
    with falls_back("changes the argument given"):
        for _ in range(2):
            given: dict[str, torch.Tensor] = {}
            module(torch.ones(3), given)
            assert given["seen"].shape == (3,)
    report = _report(module)
    assert report.eager_calls == 2 and "changes the argument given" in str(report.fallback)
