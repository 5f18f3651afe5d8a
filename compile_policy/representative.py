"""The guards of a traced layer, asked again of every layer that it stands for.

A guard says what the trace of a layer depended on. Where the same holds for another layer, at the same place in it,
tracing that layer would have taken the same way. Its place is accounted for like the others', so that a change in it is
noticed later too.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from compile_policy.compat_guards import GuardFacts, Place
from compile_policy.places import Places, expression
from compile_policy.repeats import NotRepeated, Repeats

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Represented:
    """Which layers have to do what a traced one does."""

    def __init__(self, repeats: Repeats, module: torch.nn.Module, places: Places) -> None:
        self.places = places
        self.layers = list(module.get_submodule(repeats.path).children())
        self.numbers = {id(layer): i for i, layer in enumerate(self.layers[: repeats.traced])}
        self.others: dict[int, list[int]] = {}
        for i, representative in enumerate(repeats.stands_for, repeats.traced):
            self.others.setdefault(representative, []).append(i)
        self._known: dict[Place, int | None] = {}

    def again(self, facts: GuardFacts) -> Iterator[GuardFacts]:
        """The guard, for every layer that the guarded one stands for.

        Raises:
            NotRepeated: it does not hold for one of them.
        """
        self._check_numbered(facts.place)
        found = self._prefix(facts.place) or (self._prefix(facts.other) if facts.other is not None else None)
        if found is None:
            return
        prefix, layer = found
        for i in self.others.get(layer, ()):
            instead = self._instead(prefix, i)
            place = _moved(facts.place, prefix, instead)
            other = None if facts.other is None else _moved(facts.other, prefix, instead)
            there = replace(facts, place=place, other=other, name=expression(place), detail=f"as in layer {layer}")
            self._check(facts, there, layer, i)
            yield there

    def _prefix(self, place: Place) -> tuple[Place, int] | None:
        """The part of a place that leads to a traced layer, and its number."""
        for end in range(1, len(place) + 1):
            prefix = place[:end]
            if prefix not in self._known:
                try:
                    self._known[prefix] = self.numbers.get(id(self.places.node(prefix).value))
                except Exception:  # the account says what is wrong with the place
                    return None
            layer = self._known[prefix]
            if layer is not None:
                return prefix, layer
        return None

    def _instead(self, prefix: Place, i: int) -> Place:
        kind, key = (*prefix[-1], "")[:2]
        instead = (*prefix[:-1], (kind, type(key)(i)))
        if kind != "item" or self.places.node(instead).value is not self.layers[i]:
            raise NotRepeated(f"a layer is reached by way of {expression(prefix)}")
        return instead

    def _check(self, facts: GuardFacts, there: GuardFacts, layer: int, i: int) -> None:
        try:
            mine, its = self.places.node(facts.place).value, self.places.node(there.place).value
            holds = alike(mine, its, layer, i) and _asked(facts, mine) == _asked(there, its)
            if facts.other is not None and there.other is not None:
                both = mine is self.places.node(facts.other).value, its is self.places.node(there.other).value
                holds = holds and both[0] == both[1]
        except Exception as error:
            raise NotRepeated(f"{there.name} cannot be read: {error}") from error
        if not holds:
            raise NotRepeated(f"{there.name} is not what {facts.name} is")

    def _check_numbered(self, place: Place) -> None:
        """What a list holds under the number of a traced layer, it has to hold for those that the layer stands for.

        A configuration that all layers share is reached by way of the first, whichever of them reads it.
        """
        if place[0] != ("local", "forward"):  # all else belongs to the call, not to the component
            return
        for end, step in enumerate(place):
            if step[0] != "item" or type(step[1]) is not int or step[1] not in self.others:
                continue
            if place[end - 1][0] == "mro" or str(place[end - 1][-1]).startswith("__"):
                continue  # bases of a class, defaults and cells of a function: numbered, but not by layer
            held = self.places.node(place[:end]).value
            if not isinstance(held, (list, tuple, dict)) or len(held) < len(self.layers):
                continue
            for i in self.others[step[1]]:
                there = i in held if isinstance(held, dict) else True
                if not there or not alike(held[step[1]], held[i], step[1], i):
                    raise NotRepeated(f"{expression(place[:end])} holds another value for layer {i}")


def _moved(place: Place, prefix: Place, instead: Place) -> Place:
    return (*instead, *place[len(prefix) :]) if place[: len(prefix)] == prefix else place


def _asked(facts: GuardFacts, value: Any) -> Any:
    """The answer to a guard that asks for a word."""
    if facts.kind == "HASATTR":
        return hasattr(value, facts.word)
    if facts.kind == "NOT_PRESENT_IN_GENERIC_DICT":
        return facts.word in vars(value)
    if facts.kind in ("DICT_CONTAINS", "DICT_NOT_CONTAINS", "SET_CONTAINS", "SET_NOT_CONTAINS"):
        return facts.word in (vars(value) if isinstance(value, type) else value)
    return None


def alike(a: Any, b: Any, i: int, j: int) -> bool:
    """Whether layer ``j`` has the like of what layer ``i`` has: the same value, its own number, or an object of the
    same kind, about whose parts there are guards of their own."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, _PLAIN):
        return repr(a) == repr(b) or (type(a) is int and (a, b) == (i, j))
    if isinstance(a, torch.Tensor):
        return _form(a) == _form(b)
    if isinstance(a, types.FunctionType):
        return a.__code__ is b.__code__
    if isinstance(a, types.MethodType):
        return alike(a.__func__, b.__func__, i, j)
    if isinstance(a, dict):
        return len(a) == len(b) and [k for k in a if isinstance(k, str)] == [k for k in b if isinstance(k, str)]
    if isinstance(a, (list, tuple, set, frozenset)):
        return len(a) == len(b)
    return not isinstance(a, type)


def _form(t: torch.Tensor) -> tuple[Any, ...]:
    layout = t.stride() if t.layout is torch.strided else t.layout
    return (t.dtype, t.device, t.layout, tuple(t.shape), layout, t.requires_grad)
