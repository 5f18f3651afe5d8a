"""Annotations from which dynamic dims are inferred, and the warning where they are not."""

from __future__ import annotations

import collections.abc
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, NewType, Optional, TypedDict, TypeVar, Union

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import compile_policy as cp
from compile_policy.annotations import annotated_tensors, holds_tensors
from compile_policy.decorators import support_torch_compile, use_config
from compile_policy.region import region_of

T = TypeVar("T", bound=torch.Tensor)
Free = TypeVar("Free")
Hidden = NewType("Hidden", torch.Tensor)


class Pair(NamedTuple):
    """A tensor in a field of a named tuple."""

    first: torch.Tensor
    second: int


class Options(TypedDict, total=False):
    """A tensor under a key of a typed dict."""

    mask: torch.Tensor
    count: int


class Tree(TypedDict):
    """Names itself and holds no tensor."""

    children: list[Tree]
    word: str


@dataclass
class Data:
    """Tensors in a field of a data class."""

    states: list[torch.Tensor]


class Registered:
    """A pytree node of the user's."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts


pytree.register_pytree_node(Registered, lambda v: (v.parts, None), lambda parts, _: Registered(list(parts)))

TENSORS: list[Any] = [
    *(torch.Tensor, torch.DoubleTensor, torch.ByteTensor, torch.ShortTensor, torch.CharTensor),
    *(nn.Parameter, tuple[torch.Tensor, ...], tuple[int, torch.Tensor], list[torch.Tensor]),
    *(dict[str, torch.Tensor], Sequence[torch.LongTensor], Mapping[str, list[torch.Tensor]]),
    *(collections.abc.Iterable[torch.Tensor], typing.List[torch.Tensor]),  # noqa: UP006
    *(typing.Dict[str, torch.Tensor], typing.Tuple[torch.Tensor, ...]),  # noqa: UP006
    *(Optional[list[torch.Tensor]], Union[int, tuple[torch.Tensor, ...]]),  # noqa: UP007, UP045
    *(list[torch.Tensor] | None, Annotated[torch.Tensor, "batch"], Annotated[list[torch.Tensor], 3]),
    *(T, Hidden, tuple[tuple[T, T], ...], Pair, Options, Data, list[Data], dict[str, Pair]),
    *(Registered, cp.IntermediateTensors, "torch.Tensor | Missing", "Mapping[str, FloatTensor]"),
    *("list[Missing[torch.DoubleTensor]]", "IntermediateTensors | None", list["torch.Tensor"]),
]
OTHERS: list[Any] = [
    *(int, str, None, Any, object, tuple[int, ...], dict[str, int], list, dict, tuple),
    *(Sequence[str], Free, Tree, type[torch.Tensor], Annotated[int, torch.Tensor]),
    *(typing.Literal["Tensor"], typing.Callable[[torch.Tensor], None], "TensorLike", "Missing"),
    collections.abc.Callable[[int], torch.Tensor],
]


@pytest.mark.parametrize("hint", TENSORS, ids=str)
def test_tensors_are_found_in_an_annotation(hint: Any) -> None:
    """Alone, in containers, in the fields of classes, behind aliases and in strings."""
    assert holds_tensors(hint)


@pytest.mark.parametrize("hint", OTHERS, ids=str)
def test_no_tensors_are_found_where_there_are_none(hint: Any) -> None:
    """Also where the annotation contains the word with another meaning."""
    assert not holds_tensors(hint)


def test_each_argument_is_resolved_alone() -> None:
    """A name that exists for type checkers only leaves the others as they are; fields of kwargs count."""

    class Model(nn.Module):
        def forward(
            self,
            a: Missing,  # type: ignore[name-defined]  # noqa: F821
            b: Sequence[Hidden],
            c: int = 0,
            **kwargs: typing.Unpack[Options],
        ) -> Any:
            return a, b, c

    assert annotated_tensors(Model.forward) == ["b", "mask"]


@support_torch_compile
class Layer(nn.Module):
    """Takes tensors in every kind of container."""

    def forward(
        self,
        x: torch.Tensor,
        many: tuple[torch.Tensor, ...] = (),
        named: dict[str, torch.DoubleTensor] | None = None,
        deep: Sequence[Mapping[str, torch.Tensor]] = (),
        pair: Pair | None = None,
        data: Data | None = None,
        options: Options | None = None,
        scale: torch.Tensor | None = None,
        anything: Any = None,
        bare: list | None = None,  # type: ignore[type-arg]
        plain=None,  # type: ignore[no-untyped-def]
    ) -> torch.Tensor:
        tensors = [] if scale is None else [scale]
        tensors += many
        tensors += [] if named is None else list(named.values())
        for part in deep:
            tensors += list(part.values())
        tensors += [] if pair is None else [pair.first * pair.second]
        tensors += [] if data is None else data.states
        tensors += [] if options is None else [options["mask"]]
        for t in tensors:
            x = x + t
        for t in (anything, plain, *(bare or ())):
            if t is not None:
                x = x - (t.sum() if isinstance(t, torch.Tensor) else t)
        return x


def _made(backend: str = "eager") -> Layer:
    with use_config(cp.CompilationConfig(backend=backend, cache_dir=False)):
        return Layer()


def _graphs(layer: nn.Module) -> int:
    region = region_of(layer)
    assert region is not None
    report = region.report()
    assert report.eager_calls == 0, report.fallback
    return report.graphs


def _given(name: str, n: int) -> dict[str, Any]:
    t = torch.rand(n, 2)
    values = {
        "many": (t, t + 1),
        "named": {"a": t.double(), "b": torch.tensor(2.0)},
        "deep": [{"a": t}, {"b": t * 2}],
        "pair": Pair(t, 3),
        "data": Data([t, t]),
        "options": Options(mask=t, count=2),
        "scale": torch.tensor(2.0),
    }
    return {"x": torch.rand(n, 2), name: values[name]}


CONTAINERS = ["many", "named", "deep", "pair", "data", "options", "scale"]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *[(name, "eager") for name in CONTAINERS],
        pytest.param("deep", "inductor", marks=pytest.mark.slow),
    ],
)
def test_one_graph_for_every_size_in_a_container(name: str, backend: str) -> None:
    """Sizes differ from call to call; nothing is warned of, and results are eager's."""
    layer = _made(backend)
    for n in (3, 5, 9):
        arguments = _given(name, n)
        torch.testing.assert_close(layer(**arguments), Layer.forward(layer, **arguments))
    assert _graphs(layer) == 1


@pytest.mark.parametrize(
    ("name", "found", "better"),
    [
        ("anything", "its annotation `Any` does not say so", "anything: torch.Tensor"),
        ("plain", "it has no annotation", "plain: torch.Tensor"),
        ("bare", "does not say so", r"bare: list\[torch.Tensor\]"),
    ],
)
def test_what_cannot_be_inferred_is_warned_of(name: str, found: str, better: str) -> None:
    """Once an argument, at the user's line, with how to give its dims; not for a number in its place."""
    layer = _made()
    number: Any = [2.0] if name == "bare" else 2.0
    layer(torch.rand(3, 2), **{name: number})
    message = f"argument {name} of Layer.forward holds a tensor, and .*{found}.*{better}"
    with pytest.warns(cp.PolicyWarning, match=message) as caught:
        for n in (3, 5):
            value: Any = [torch.rand(n, 2)] if name == "bare" else torch.rand(n, 2)
            layer(torch.rand(n, 2), **{name: value})
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "{'x': 0, " in str(caught[0].message) and f"'{name}': 0}}" in str(caught[0].message)
    assert _graphs(layer) == 3


def test_the_advice_helps() -> None:
    """The dims that the warning names make one graph of all sizes, without a warning."""

    class Model(nn.Module):
        def forward(self, x: torch.Tensor, y: Any) -> torch.Tensor:
            return x + y

    support_torch_compile(dynamic_arg_dims={"x": 0, "y": 0})(Model)
    with use_config(cp.CompilationConfig(backend="eager", cache_dir=False)):
        module = Model()
    for n in (3, 5):
        module(torch.rand(n, 2), torch.rand(n, 2))
    assert _graphs(module) == 1


def test_dims_that_were_given_cause_no_warning() -> None:
    """An author who names dims has left the others out on purpose."""

    @support_torch_compile(dynamic_arg_dims={"x": 0})
    class Given(nn.Module):
        def forward(self, x: torch.Tensor, y: Any) -> torch.Tensor:
            return x + y

    with use_config(cp.CompilationConfig(backend="eager", cache_dir=False)):
        module = Given()
    with warnings.catch_warnings():
        warnings.simplefilter("error", cp.PolicyWarning)
        module(torch.rand(3, 2), torch.rand(1, 2))
    assert _graphs(module) == 1
