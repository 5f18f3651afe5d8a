"""What tells two calls apart, and what does not."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from compile_policy import IntermediateTensors
from compile_policy.call_key import (
    Call,
    Leaves,
    adapted,
    adapter_for,
    collect_state,
    flatten,
    make_call,
    rebuild,
    register_adapter,
)
from compile_policy.errors import NotCompilable


def call(*, dynamic: bool = True, **values: Any) -> Call:
    def label(path: str, t: torch.Tensor) -> tuple[str | None, ...]:
        return ("n" if dynamic and t.dim() else None, *(None,) * (t.dim() - 1))[: t.dim()]

    return make_call(values, label)


def again(made: Call) -> dict[str, Any]:
    leaves = iter(made.leaves)
    return {name: rebuild(spec, leaves) for name, spec in made.spec}


class Colour(enum.Enum):
    RED = 1
    ONE = 1  # noqa: PIE796 (an alias on purpose)


class Level(enum.IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, True),
        (0, False),
        (1, 1.0),
        (0.0, -0.0),
        (1, Level.ONE),
        (complex(0.0, 0.0), complex(0.0, -0.0)),
        ("1", 1),
        ("a", b"a"),
        (None, False),
        (torch.float32, torch.float64),
        (torch.device("cpu"), torch.device("meta")),
        (torch.Size([2]), torch.Size([3])),
        ([1], (1,)),
        ([1, 2], [2, 1]),
        ({"a": 1}, {"a": 2}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (int, bool),
    ],
    ids=str,
)
def test_constants_that_a_program_can_tell_apart_have_different_keys(a: Any, b: Any) -> None:
    """``==`` is not enough: 1 == True == 1.0, and 0.0 == -0.0, but programs do different things with them."""
    assert call(c=a).key != call(c=b).key
    assert call(c=a).key == call(c=a).key and hash(call(c=a).key) == hash(call(c=a).key)


def test_not_a_number_is_one_constant() -> None:
    """Every NaN is the same constant, although it is unequal to itself: else each call would be compiled anew."""
    assert call(c=float("nan")).key == call(c=math.inf - math.inf).key


def test_the_name_of_an_argument_belongs_to_the_key() -> None:
    """One value under two names makes two calls."""
    assert call(a=1).key != call(b=1).key


def test_metadata_belongs_to_the_key_and_dynamic_sizes_do_not() -> None:
    """Dtype, device, number of dims, static sizes and requires_grad tell calls apart; dynamic sizes don't."""
    x = torch.zeros(3, 4)
    base = call(x=x).key
    for other in (
        x.double(),
        x.to("meta"),
        x[0],
        torch.zeros(3, 5),
        torch.zeros(3, 4, requires_grad=True),
        x.int(),
    ):
        assert call(x=other).key != base
    for same in (torch.ones(3, 4), torch.zeros(7, 4), torch.zeros(0, 4), torch.zeros(1, 4)):
        assert call(x=same).key == base
    assert call(x=torch.zeros(3, 4), dynamic=False).key != call(x=torch.zeros(7, 4), dynamic=False).key


def test_tensor_and_constant_of_equal_value_differ() -> None:
    """A number and a tensor that holds it are different arguments."""
    assert call(x=torch.tensor(1)).key != call(x=1).key


def test_containers_come_back_as_they_were() -> None:
    """Lists, tuples and dicts, nested, are rebuilt with their types, and a dict with its own order."""
    a, b, c = torch.rand(2), torch.rand(3), torch.rand(4)
    values = {"v": [a, (b, {"z": c, "a": 3}), None, "s"], "w": {}}
    made = call(**values)
    back = again(made)
    assert len(made.leaves) == 3
    assert type(back["v"]) is list and type(back["v"][1]) is tuple
    assert back["v"][0] is a and back["v"][1][0] is b and back["v"][1][1]["z"] is c
    assert list(back["v"][1][1]) == ["z", "a"], "a component may rely on the order of a dict"
    assert back["w"] == {} and back["v"][2:] == [None, "s"]
    assert made.paths == ["v[0]", "v[1][0]", "v[1][1]['z']"]


def test_strides_are_no_part_of_the_key_and_the_original_is_kept() -> None:
    """A non-contiguous tensor has the key of a contiguous one; the graph gets a copy, and the original is known."""
    x = torch.rand(4, 3)
    view = x.t().contiguous().t()
    assert not view.is_contiguous()
    made = call(x=view)
    assert made.key == call(x=x).key
    assert made.leaves[0].is_contiguous() and torch.equal(made.leaves[0], view)
    assert made.copied[0] is view and not call(x=x).copied


def test_a_written_tensor_must_be_contiguous() -> None:
    """What the graph writes into cannot be replaced by a copy."""
    leaves = Leaves(lambda path, t: (None,) * t.dim())
    leaves.add(torch.zeros(2, 2), "cache", mutable=True)
    assert leaves.mutable == {0}
    with pytest.raises(NotCompilable, match="cache is written in place and is not contiguous"):
        leaves.add(torch.zeros(2, 3).t(), "cache", mutable=True)


class Tagged(torch.Tensor):
    """A tensor subclass: its operations may mean anything."""


class TaggedParameter(torch.nn.Parameter):
    """The same, as a parameter."""


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.zeros(2).as_subclass(Tagged), "x is a Tagged, a tensor subclass"),
        (TaggedParameter(torch.zeros(2)), "x is a TaggedParameter, a tensor subclass"),
        (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
        (torch.ones(2, dtype=torch.complex64).conj(), "lazy conjugate"),
        (object(), "x is a builtins.object, which cannot be passed"),
        ([object()], r"x\[0\] is a builtins.object"),
        (lambda: None, "builtins.function"),
    ],
    ids=["subclass", "parameter subclass", "sparse", "conjugate", "object", "nested object", "function"],
)
def test_what_cannot_be_passed_is_refused_by_name(value: Any, reason: str) -> None:
    """A tensor with rules of its own, or an object of an unknown type, is refused with its place in the call."""
    with pytest.raises(NotCompilable, match=reason):
        flatten(value, Leaves(lambda path, tensor: (None,) * tensor.dim()), "x")


def test_an_object_alone_may_turn_out_not_to_be_read() -> None:
    """Objects of one class are one call, of two classes they are not; beside a tensor they are refused."""
    assert call(x=object()).key == call(x=object()).key != call(x=[object()]).key
    with pytest.raises(NotCompilable, match=r"x\[1\] is a builtins.object"):
        call(x=[torch.zeros(2), object()])


def test_a_parameter_is_a_tensor() -> None:
    """A plain parameter may be passed like any tensor."""
    assert call(x=torch.nn.Parameter(torch.zeros(2))).leaves[0].requires_grad


@dataclass
class Counter:
    """A stateful argument: a sum that every call adds to."""

    total: torch.Tensor
    steps: int = 0


class _CounterAdapter:
    def flatten(self, value: Counter, out: Leaves, path: str) -> Any:
        out.add(value.total, f"{path}.total")
        return ("counter",)

    def rebuild(self, spec: Any, leaves: Iterator[torch.Tensor]) -> Counter:
        return Counter(next(leaves))

    def state(self, spec: Any, value: Counter) -> list[torch.Tensor]:
        return [value.total]

    def write_back(self, spec: Any, value: Counter, state: list[torch.Tensor]) -> None:
        (value.total,) = state
        value.steps += 1

    def public(self, value: Counter) -> Counter:
        return value


register_adapter(Counter, _CounterAdapter())


def test_adapters_serve_subclasses_and_are_found_at_any_depth() -> None:
    """An adapter stands for its type and the subclasses; state is found inside containers too, in order."""

    class Special(Counter):
        pass

    assert adapter_for(Special) is adapter_for(Counter) and adapter_for(int) is None
    values = {
        "a": [Counter(torch.tensor([1.0])), {"k": Special(torch.tensor([2.0]))}],
        "b": Counter(torch.tensor([3.0])),
    }
    made = call(**values)
    assert [t.item() for t in made.leaves] == [1.0, 2.0, 3.0]
    states = [s for name, spec in made.spec for s in collect_state(spec, values[name])]
    assert [[t.item() for t in s] for s in states] == [[1.0], [2.0], [3.0]]
    assert [type(v) for name, spec in made.spec for _, _, v in adapted(spec, values[name])] == [
        Counter,
        Special,
        Counter,
    ]
    assert call(a=Counter(torch.zeros(1))).key != call(a=Special(torch.zeros(1))).key


def test_intermediate_tensors_travel_by_name() -> None:
    """The registered container flattens to its tensors; other names are another call."""
    held = IntermediateTensors({"h": torch.rand(3, 2), "r": torch.rand(3, 2)})
    back = again(call(x=held))["x"]
    assert back == held and call(x=held).paths == ["x['h']", "x['r']"]
    assert call(x=held).key != call(x=IntermediateTensors({"h": torch.rand(3, 2)})).key


def test_a_description_holds_nothing_alive() -> None:
    """What an entry keeps of its call holds neither tensors nor arguments."""
    made = call(x=torch.zeros(2, 2).t(), y=torch.zeros(3, 2).t())
    kept = made.description()
    assert kept.key == made.key and not kept.leaves and not kept.values and not kept.copied
