"""Results put together again: what a fast constructor makes is what pytree makes."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from compile_policy.outputs import OutputSpec
from compile_policy_transformers.cache_argument import CACHE
from compile_policy_transformers.outputs import constructor


@dataclass
class Counting(ModelOutput):
    """A class with a way of its own to make its objects."""

    first: torch.Tensor | None = None
    second: torch.Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.made = True


def _same(ours: Any, usual: Any) -> None:
    assert type(ours) is type(usual)
    assert list(vars(ours)) == list(vars(usual)) and list(ours.keys()) == list(usual.keys())
    assert all(a is b for a, b in zip(vars(ours).values(), vars(usual).values(), strict=True))
    assert all(a is b for a, b in zip(ours.to_tuple(), usual.to_tuple(), strict=True))


@pytest.mark.parametrize("cls", [BaseModelOutputWithPast, CausalLMOutputWithPast])
def test_model_outputs(cls: type) -> None:
    """Same class, fields, items, order and objects; it can be changed and pickled like one of the usual make."""
    first = "logits" if cls is CausalLMOutputWithPast else "last_hidden_state"
    tensor, cache = torch.rand(2), DynamicCache()
    usual = cls(**{first: tensor, CACHE: cache})
    spec = OutputSpec(pytree.tree_structure(usual), (("tensor",), ("value", CACHE)))
    assert constructor(cls, [first, CACHE]) is not None
    ours = spec.build([tensor, torch.rand(1)], {CACHE: cache})
    _same(ours, usual)
    ours.hidden_states = usual.hidden_states = (tensor,)
    _same(ours, usual)
    assert torch.equal(pickle.loads(pickle.dumps(ours))[0], tensor)


def test_a_missing_part_is_an_attribute_without_an_item() -> None:
    """As the usual constructor has it."""
    make = constructor(BaseModelOutputWithPast, ["last_hidden_state", CACHE])
    assert make is not None
    _same(make([x := torch.rand(1), None]), BaseModelOutputWithPast(last_hidden_state=x, **{CACHE: None}))


def test_nested_results_and_odd_classes_go_through_pytree() -> None:
    """A tuple inside, or a class that makes its objects in its own way: pytree makes them."""
    x = torch.rand(2)
    usual = BaseModelOutputWithPast(last_hidden_state=x, hidden_states=(x, x))
    spec = OutputSpec(pytree.tree_structure(usual), (("tensor",),) * 3)
    assert spec.build([x, x, x], {}).hidden_states == (x, x)
    assert constructor(Counting, ["first"]) is None
    odd = OutputSpec(pytree.tree_structure(Counting(first=x)), (("tensor",),)).build([x], {})
    assert odd.made and odd.first is x
