"""Dynamo's guard entries and sources as plain data: there, and saying what they are used for."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch._dynamo import source as sources

from compile_policy import compat_guards
from compile_policy.compat_guards import GuardFacts, guard_facts, place_of

LIMITS = {"low": 1.0}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * LIMITS["low"] if hasattr(self, "linear") else x


def _facts(model: nn.Module) -> list[GuardFacts]:
    found: list[GuardFacts] = []

    def keep(entries: Any) -> list[bool]:
        found.extend(guard_facts(entry) for entry in entries)
        return [True] * len(entries)

    torch._dynamo.reset()
    torch.compile(model, backend="eager", fullgraph=True, options={"guard_filter_fn": keep})(torch.ones(3, 2))
    return found


def test_every_guard_has_kind_place_and_line() -> None:
    """Modules are reached by attributes and items, globals by name, process settings by themselves."""
    facts = _facts(Model())
    places = {f.place for f in facts}
    weight = (("local", "self"), ("attr", "_modules"), ("item", "linear"), ("attr", "_parameters"), ("item", "weight"))
    assert weight in places and (("global", "LIMITS"),) in places and (("process",),) in places
    assert not any(step[0] == "unknown" for place in places for step in place)
    (limit,) = [f for f in facts if f.kind == "CONSTANT_MATCH" and "LIMITS" in f.name]
    assert limit.detail.endswith("== 1.0") and "test_compat_guards.py:" in limit.line
    assert any(f.kind == "HASATTR" and f.word == "linear" for f in facts)


def test_a_source_without_a_word_is_unknown() -> None:
    """A link of a chain that this version does not know keeps its name, so that a refusal can say it."""
    base = sources.LocalSource("x")
    assert place_of(sources.CallMethodItemSource(base)) == (("local", "x"), ("unknown", "CallMethodItemSource"))
    assert place_of(sources.TypeSource(sources.WeakRefCallSource(base)))[1:] == (("weak",), ("type",))
    keys = sources.ConstDictKeySource(base, 1)
    assert place_of(keys)[1:] == (("key", 1),)
    assert place_of(sources.DictGetItemSource(base, keys))[1:] == (("item at", 1),)
    assert place_of(sources.DefaultsSource(base, "by", is_kw=True))[1:] == (("attr", "__kwdefaults__"), ("item", "by"))


def test_classes_that_cannot_change() -> None:
    """Built-in classes and those of C extensions refuse attributes; classes written in Python do not."""
    for cls in (int, dict, type(len), functools.partial):
        try:
            cls.anything = 1  # type: ignore[attr-defined]
        except TypeError:
            assert compat_guards.is_immutable_type(cls)
        else:
            del cls.anything  # type: ignore[attr-defined]
            assert not compat_guards.is_immutable_type(cls)
    assert not compat_guards.is_immutable_type(Model)


def test_settings_that_are_watched() -> None:
    """Each of them is among what Dynamo's own guard on the global state compares."""
    before = compat_guards.process_settings()
    stock = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = not stock
        assert compat_guards.process_settings() != before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = stock
    assert compat_guards.process_settings() == before


def test_saved_tensor_hooks_that_are_no_graphs_stay_outside() -> None:
    """Ordinary pack and unpack functions do not become part of a graph."""
    assert not compat_guards.inlined_saved_tensor_hooks()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert not compat_guards.inlined_saved_tensor_hooks()
