"""The synthetic call: sizes of its own for every label, values that repeat, copies that protect the caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from compile_policy.errors import NotCompilable
from compile_policy.example import copies, examples, sizes_of, synthetic


def test_every_label_gets_a_size_of_its_own_that_is_at_least_2() -> None:
    """No two labels share a size, none is 0 or 1, and sums of labels are sums of sizes."""
    sizes = sizes_of([("batch", "past"), ("past+new", "new"), (None,)], {})
    assert sizes["past+new"] == sizes["past"] + sizes["new"]
    assert len(set(sizes.values())) == len(sizes) and min(sizes.values()) >= 2


def test_preferred_sizes_are_kept_and_not_given_twice() -> None:
    """A size asked for is used, and no other label gets it."""
    sizes = sizes_of([("a", "b", "c")], {"b": 2, "unused": 3})
    assert sizes["b"] == 2 and sizes["a"] not in (2, 3) and sizes["c"] not in (2, 3) and sizes["a"] != sizes["c"]


def test_many_preferred_sizes_leave_enough_for_the_rest() -> None:
    """Preferences use up the usual sizes; others follow."""
    usual = list(sizes_of([tuple(f"l{i}" for i in range(16))], {}).values())
    sizes = sizes_of([tuple(f"l{i}" for i in range(16))], {f"p{i}": s for i, s in enumerate(usual)})
    assert len(set(sizes.values()) | set(usual)) == 32


def test_too_many_sizes_are_no_crash() -> None:
    """A call with more dynamic sizes than an example is built for has to run eager."""
    with pytest.raises(NotCompilable, match="17 different dynamic sizes"):
        sizes_of([tuple(f"l{i}" for i in range(17))], {})


def test_static_sizes_dtypes_and_requires_grad_are_kept() -> None:
    """The example differs from the call only in its dynamic sizes and its values."""
    given = [torch.rand(9, 4, requires_grad=True), torch.ones(9, dtype=torch.long), torch.ones(9, 1, dtype=torch.bool)]
    made = synthetic(given, [("n", None), ("n",), ("n", None)], [None] * 3, {})
    assert [t.shape[1:] for t in made] == [t.shape[1:] for t in given]
    assert [t.dtype for t in made] == [t.dtype for t in given]
    assert [t.requires_grad for t in made] == [True, False, False]
    assert len({t.shape[0] for t in made}) == 1


def test_values_are_reproducible_valid_indices_and_open_masks() -> None:
    """Floats repeat from call to call, integers index any table of two rows, masks hide nothing."""
    given = [torch.zeros(5, 3), torch.zeros(5, dtype=torch.int32), torch.zeros(5, dtype=torch.bool)]
    labels: list[Any] = [("n", None), ("n",), ("n",)]
    one, two = (synthetic(given, labels, [None] * 3, {}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert one[0].std() > 0.1 and set(one[1].tolist()) == {0, 1} and one[2].all()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.uint8, torch.int8]
)
def test_every_usual_dtype_can_be_filled(dtype: torch.dtype) -> None:
    """No dtype is left out, 0-dim tensors included."""
    made = synthetic([torch.zeros(3, dtype=dtype), torch.zeros((), dtype=dtype)], [("n",), ()], [None, None], {})
    assert [t.dtype for t in made] == [dtype, dtype] and made[1].shape == ()


def test_a_filler_has_the_last_word() -> None:
    """Where random values would not do, the filler gets all sizes and the shape."""
    seen: list[Any] = []

    def filler(sizes: Mapping[str, int], shape: Any) -> torch.Tensor:
        seen.append((dict(sizes), tuple(shape)))
        return torch.full(tuple(shape), 7)

    (made,) = synthetic([torch.zeros(9, dtype=torch.long)], [("n",)], [filler], {"n": 4})
    assert made.tolist() == [7] * 4 and seen == [({"n": 4}, (4,))]


@dataclass
class Shaped:
    leaves: list[torch.Tensor]
    labels: list[Any]
    fillers: list[Any] = field(default_factory=list)
    sizes: Mapping[str, int] = field(default_factory=dict)


def test_the_second_example_is_the_call_itself_with_0_and_1_as_constants() -> None:
    """For components that treat 0 and 1 apart: the call's own tensors, copied, and their small dims static."""
    x, mask = torch.rand(6, 2), torch.rand(1, 0)
    general, given = examples(Shaped([x, mask], [("a", None), ("b", "c")], [None, None]))
    assert general[1] == [("a", None), ("b", "c")] and min(general[0][1].shape) >= 2
    assert given[1] == [("a", None), (None, None)]
    assert torch.equal(given[0][0], x) and given[0][0].data_ptr() != x.data_ptr()


def test_copies_protect_the_original() -> None:
    """Writing into a copy changes nothing; requires_grad is kept, history is not."""
    x = torch.rand(3, requires_grad=True)
    (copy,) = copies([x * 2])
    assert copy.requires_grad and copy.is_leaf
    with torch.no_grad():
        copy.zero_()
    assert x.abs().sum() > 0
