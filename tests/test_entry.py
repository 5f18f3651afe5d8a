"""From flat results back to what the component returns, and the check of a new entry against eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree
from falling import falls_back
from torch import nn

from compile_policy.call_key import Leaves, register_adapter
from compile_policy.reference import relative_error
from compile_policy.region import Region, RegionOptions, SignatureBinder


@dataclass(frozen=True)
class Options(RegionOptions):
    """Options whose lowering the test chooses."""

    lower: Any = None

    def lowering(self) -> Any:
        return self.lower or super().lowering()


class Returns(nn.Module):
    """Returns whatever the test says."""

    def __init__(self, result: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.result = result

    def forward(self, x: torch.Tensor, y: Any = None) -> Any:
        return self.result(x * self.weight, x) if y is None else self.result(x * self.weight, x, y)


def region(module: nn.Module, lower: Any = None) -> Region:
    return Region(module, role="t", binder=SignatureBinder({"x": {0: None}}), options=Options("aot_eager", lower=lower))


class Pair(NamedTuple):
    first: torch.Tensor
    second: Any


@dataclass
class Output:
    """As model outputs are: a class that pytree knows."""

    hidden: torch.Tensor
    cache: Any = None


pytree.register_dataclass(Output)

RESULTS: dict[str, Callable[..., Any]] = {
    "tensor": lambda y, x: y,
    "tuple": lambda y, x: (y, y + 1),
    "list": lambda y, x: [y, None, [y * 2]],
    "dict": lambda y, x: {"b": y, "a": {"c": (y - 1,)}},
    "named tuple": lambda y, x: Pair(y, (y, None)),
    "dataclass": lambda y, x: Output(y, {"k": y}),
    "none": lambda y, x: None,
    "constants": lambda y, x: (y, True, "text", None),
    "twice the same": lambda y, x: (y, y),
    "views": lambda y, x: (y, y.t(), y[:1], y.view(-1)),
    "only constants": lambda y, x: ("text", False),
    "empty": lambda y, x: (),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_results_come_back_as_they_are(kind: str) -> None:
    """Containers keep their type, order and nesting, constants their value, tensors their numbers."""
    ours = region(Returns(RESULTS[kind]))
    for n in (4, 2):
        x = torch.rand(n, 3)
        got, want = ours(x), ours.module.forward(x)
        assert pytree.tree_structure(got) == pytree.tree_structure(want)
        for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
            assert type(a) is type(b) and (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)
    assert ours.eager_calls == 0 and ours.graphs == 1, ours.fallback


def test_the_input_itself_comes_back_as_itself() -> None:
    """An input that is returned is the caller's tensor, also where the graph saw a contiguous copy of it."""
    ours = region(Returns(lambda y, x: (x, y)))
    for x in (torch.rand(4, 3), torch.rand(3, 4).t()):
        assert ours(x)[0] is x
    assert ours.eager_calls == 0 and ours.graphs == 1


def test_a_flag_that_depends_on_a_size_is_not_frozen() -> None:
    """A bool in the result that says something about sizes is right for every size."""
    ours = region(Returns(lambda y, x: (y, x.shape[0] > 3)))
    for n in (2, 9, 3, 4):
        assert ours(torch.rand(n, 3))[1] is (n > 3)
    assert ours.eager_calls == 0


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (lambda y, x: (y, 3), "forward returns a"),
        (lambda y, x: (y, x.shape[0]), "forward returns a"),
        (lambda y, x: (y, object()), "object cannot be traced"),
    ],
    ids=["int", "size", "object"],
)
def test_what_no_graph_can_return_runs_eager(result: Callable[..., Any], reason: str) -> None:
    """Numbers and objects in a result: eager, with the type in the reason."""
    ours = region(Returns(result))
    with falls_back(reason):
        for n in (3, 5):
            assert torch.equal(ours(torch.ones(n, 3))[0], torch.ones(n, 3))
    assert ours.eager_calls == 2 and ours.graphs == 0 and reason in str(ours.fallback)


class Wrong:
    """A lowering whose graph is not what was captured."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.change = change

    def __call__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return lambda *args: [self.change(t) for t in gm.forward(*args)]

    def ahead(self, gm: torch.fx.GraphModule) -> bool:
        return False

    def takes_any_graph(self) -> bool:
        return False

    def jit(self) -> Wrong:
        return self


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t * 1.01,
        lambda t: t + (torch.arange(t.numel()).view_as(t) == t.numel() - 1),
        lambda t: t / 0.0,
        lambda t: t * float("nan"),
        lambda t: t.double(),
        lambda t: t[:1],
        lambda t: torch.zeros_like(t),
    ],
    ids=["scaled", "one element", "infinite", "nan", "dtype", "shape", "zeros"],
)
def test_a_graph_that_differs_from_eager_is_refused(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Whatever a lowering got wrong, the graph is never used: eager answers, and the report says how wrong it was."""
    ours = region(Returns(lambda y, x: y), Wrong(change))
    x = torch.rand(4, 3)
    with falls_back("differs from eager by"):
        for _ in range(2):
            assert torch.equal(ours(x), x)
    assert ours.entry_count() == 0 and (ours.graphs, ours.eager_calls) == (1, 2)
    assert "differs from eager by" in str(ours.fallback)
    right = region(Returns(lambda y, x: y), Wrong(lambda t: t))
    right(x)
    assert right.eager_calls == 0, "control: the unchanged graph is accepted"


def test_rounding_is_no_difference_and_is_recorded() -> None:
    """Errors within the tolerance of the dtype are kept beside the entry."""
    ours = region(Returns(lambda y, x: y), Wrong(lambda t: t * (1 + 1e-5)))
    ours(torch.rand(4, 3))
    (entry,) = [e for found in ours.entries.values() for e in found]
    assert 0 < entry.max_error < 1e-4 and ours.eager_calls == 0


def test_relative_error() -> None:
    """Relative to the largest value, infinite where it makes no sense to subtract; complex parts both count."""
    one = torch.tensor([1.0, 100.0])
    inf, nan = float("inf"), float("nan")
    assert relative_error(one, one) == 0 == relative_error(torch.empty(0), torch.empty(0))
    assert relative_error(one + 1, one) == pytest.approx(0.01)
    assert relative_error(torch.tensor([0.5]), torch.tensor([0.0])) == 0.5
    for a, b in [([nan], [1.0]), ([1.0], [nan]), ([inf], [1.0]), ([1.0], [inf]), ([inf], [-inf])]:
        assert relative_error(torch.tensor(a), torch.tensor(b)) == inf
    assert relative_error(torch.tensor([nan, inf, 1.0]), torch.tensor([nan, inf, 1.0])) == 0
    assert relative_error(one.double(), one) == inf == relative_error(one[:1], one)
    assert relative_error(torch.tensor([1j]), torch.tensor([2j])) == 0.5


# -- arguments that are written into ----------------------------------------------------------------------------------


class Writes(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        x.add_(1)
        return x * 2 if y is None else y * 2


def test_a_tensor_written_in_place_is_the_caller_s() -> None:
    """The caller sees the write, also through a non-contiguous tensor that the graph saw a copy of."""
    ours = region(Writes())
    for x in (torch.zeros(4, 3), torch.zeros(3, 4).t(), torch.zeros(8, 3)[::2]):
        got = ours(x)
        assert torch.equal(x, torch.ones(4, 3)) and torch.equal(got, torch.full((4, 3), 2.0))
    assert ours.graphs == 1 and ours.eager_calls == 0


def test_a_written_tensor_that_is_passed_twice() -> None:
    """Two arguments that share memory, one of them written: the graph knows them apart, so eager answers."""
    ours = region(Writes())
    assert torch.equal(ours(torch.zeros(2, 3), torch.zeros(4, 3)), torch.zeros(4, 3))
    x = torch.zeros(4, 3)
    want = Writes()(torch.zeros(2, 3), torch.tensor([1.0, 1, 0, 0])[:, None].expand(4, 3))
    with falls_back("shares memory with"):
        assert torch.equal(ours(x[:2], x), want)
    assert ours.eager_calls == 1 and "shares memory with" in str(ours.fallback)
    ours(torch.zeros(2, 3), torch.zeros(4, 3))
    assert ours.eager_calls == 1


@dataclass
class Memory:
    """State that each call replaces."""

    total: torch.Tensor


class _MemoryAdapter:
    def flatten(self, value: Memory, out: Leaves, path: str) -> Any:
        out.add(value.total, f"{path}.total", (None,) * value.total.dim())
        return ()

    def rebuild(self, spec: Any, leaves: Iterator[torch.Tensor]) -> Memory:
        return Memory(next(leaves))

    def state(self, spec: Any, value: Memory) -> list[torch.Tensor]:
        return [value.total]

    def write_back(self, spec: Any, value: Memory, state: list[torch.Tensor]) -> None:
        (value.total,) = state

    def public(self, value: Memory) -> Memory:
        return value


register_adapter(Memory, _MemoryAdapter())


class Remembers(nn.Module):
    def forward(self, x: torch.Tensor, one: list[Memory], two: Memory) -> tuple[torch.Tensor, Memory]:
        for k, memory in enumerate([*one, two]):
            memory.total = memory.total + (k + 1) * x.sum()
        return x * two.total, two


def test_state_of_adapted_arguments_reaches_its_owner() -> None:
    """Each adapted argument, in a list or alone, gets its own new state; a returned one is the caller's object."""
    ours = region(Remembers())
    one, two = [Memory(torch.zeros(())), Memory(torch.zeros(()))], Memory(torch.zeros(()))
    for step in (1, 2):
        result, back = ours(torch.ones(2, 3), one, two)
        assert back is two
        assert [m.total.item() for m in (*one, two)] == [6.0 * step, 12.0 * step, 18.0 * step]
        assert torch.equal(result, torch.full((2, 3), 18.0 * step))
    assert ours.graphs == 1 and ours.eager_calls == 0
