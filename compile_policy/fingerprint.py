"""Identity of the structure behind a region: what a graph takes for granted about the module itself.

Covered: the module tree and its classes with their methods and class attributes (whole numbers aside), a ``forward``
set on an instance, hooks of sub-modules (those of the component itself run round its graph), training flags, Python
attributes that a forward may read (numbers, strings, flags, functions such as activations, configuration objects),
and the identity, class, dtype, device and layout of every parameter and buffer. Values of tensors are not: they are
inputs of the graph. What a graph took for granted beyond that is watched value by value (`Fingerprint.watch`). Two
equal fingerprints, whose watched values hold, trace to the same graph with the same bound tensors.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence, Sized
from typing import Any

import torch

from compile_policy import compat, wording
from compile_policy.errors import NotCompilable
from compile_policy.glance import Glance
from compile_policy.layers.registry import registry_state
from compile_policy.walk import Walk, hooks_below
from compile_policy.watch import structure_epoch, unwatch, watch
from compile_policy.watched import Watched, same

_lock = threading.RLock()  # one for all: a fingerprint is small, and a forked child must find it free
compat.renew_after_fork(_lock)


class Structure:
    """One structure that was seen: its number, what the walk found, and the values watched beside it."""

    def __init__(self, number: int, walked: tuple[Any, ...], watched: Sequence[Watched] = ()) -> None:
        self.number = number
        self.walked = walked
        self.watched = {w.place: w for w in watched}

    def holds(self) -> bool:
        return all(w.holds() for w in self.watched.values())


class Fingerprint:
    """Remembers the fingerprint of a module and looks again when asked, or when something was registered with it.

    A look costs about a microsecond per sub-module where nothing changed, and ten where a walk is needed; so it is done
    where a sequence starts and not once a token.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._known: dict[tuple[Any, ...], list[Structure]] = {}
        self._by_number: list[Structure] = []
        self._current: int | None = None
        self._epoch = self._hooks_made = -1
        self._hooked: list[tuple[Sized, int]] = []
        #: The registry of layers, what a walk found, and the structures that were seen with both.
        self._last: tuple[Any, Glance, list[Structure]] | None = None

    @property
    def number(self) -> int | None:
        """The structure's number as last looked at; looked at again when something was registered since."""
        if self._current is not None and self._registered():
            return self.current(look_again=True)
        return self._current

    def current(self, *, look_again: bool) -> int:
        """A small number that stands for the structure; another structure has another number."""
        if self._current is None or look_again or self._registered():
            epoch, hooks_made = structure_epoch(), compat.hooks_made()
            layers, last = registry_state(), self._last
            if last is None or layers != last[0] or not last[1].holds():
                self._current, self._last = None, None  # should the look fail, the old number is nobody's
                glance = Glance(self._module)
                self._hooked = [(found, len(found)) for found in hooks_below(self._module)]
                with _lock:
                    last = layers, glance, self._known.setdefault((layers, glance.walked), [])
            self._current = self._number_of((layers, last[1].walked), last[2])
            self._last, self._epoch, self._hooks_made = last, epoch, hooks_made
        return self._current

    def _registered(self) -> bool:
        """Whether a sub-module, parameter, buffer or hook came, or a hook went, since the last look."""
        if self._epoch != structure_epoch() or self._hooks_made != compat.hooks_made():
            return True
        return bool(self._hooked) and any(len(found) != count for found, count in self._hooked)

    def _number_of(self, walked: tuple[Any, ...], seen: list[Structure]) -> int:
        with _lock:
            for structure in seen:
                if structure.holds():
                    return structure.number
            places = {place: w for structure in seen for place, w in structure.watched.items()}
            new = Structure(len(self._by_number), walked, [w.again() for w in places.values()])
            seen.append(new)
            self._by_number.append(new)
            return new.number

    def watch(self, number: int, watched: Sequence[Watched]) -> None:
        """Let structure ``number`` hold only while these values do: an entry made for it took them for granted.

        Raises:
            NotCompilable: one of them is not what it was at capture, so that no later look could tell.
        """
        with _lock:
            known = self._by_number[number].watched
            for w in watched:
                earlier = known.get(w.place, w)
                if not w.holds() or not same(earlier.value, w.value):
                    raise NotCompilable(
                        f"{w.name} changed while the component was compiled" + (f" ({w.line})" if w.line else ""),
                        remedy="Keep it as it is while the model runs.",
                    )
            known.update({w.place: w for w in watched if w.place not in known})

    def forget(self) -> None:
        """Let go of the objects that are watched and compared; numbers that were given are given to no other."""
        with _lock:
            self._known.clear()
            self._last = None
            self._hooked = []
            for structure in self._by_number:
                structure.watched = {}

    def attach(self) -> None:
        """From now on, notice at once what is registered with the module or below it."""
        watch(self, self._module)

    def detach(self) -> None:
        unwatch(self)

    def difference(self, was: int, now: int) -> str:
        """The first place in which two structures differ, in words."""
        before, after = self._by_number[was], self._by_number[now]
        if before.walked == after.walked:
            values = after.watched
            return next(
                (
                    wording.watched_change(w.name, w.value, values[p].value)
                    for p, w in before.watched.items()
                    if p in values and not same(w.value, values[p].value)
                ),
                "a watched value changed",
            )
        (layers, structure), (layers_now, structure_now) = before.walked, after.walked
        return "the registry of layers changed" if layers != layers_now else difference(structure, structure_now)


def fingerprint(module: torch.nn.Module) -> tuple[Any, ...]:
    """The structure of ``module`` and everything below it as nested tuples."""
    return Walk().tree(module)


def difference(was: tuple[Any, ...], now: tuple[Any, ...]) -> str:
    """The first module, and what about it, in which two fingerprints differ, with both values."""
    for (name, before), (other, after) in zip(was, now, strict=False):
        if name != other:
            break
        where = name or "the component"
        cls, training, hooks, attributes, tensors = before
        cls_now, training_now, hooks_now, attributes_now, tensors_now = after
        if cls != cls_now:
            return wording.class_change(cls, cls_now, where)
        if training != training_now:
            return f"training flag of {where} is {training_now}, was {training}"
        if hooks != hooks_now:
            return wording.hook_change(hooks, hooks_now, where)
        if attributes != attributes_now:
            changed = _first_changed(attributes, attributes_now)
            if changed == "_modules":
                break
            return wording.attribute_change(attributes, attributes_now, changed, where)
        if tensors != tensors_now:
            return wording.tensor_change(tensors, tensors_now, where)
    gone = [name for name in dict(was) if name not in dict(now)]
    new = [name for name in dict(now) if name not in dict(was)]
    names = ", ".join([*[f"{n} is gone" for n in gone[:3]], *[f"{n} is new" for n in new[:3]]]) or "in another order"
    return f"the module tree has {len(now)} modules, had {len(was)}: {names}"


def _first_changed(was: tuple[tuple[str, Any], ...], now: tuple[tuple[str, Any], ...]) -> str:
    old, new = dict(was), dict(now)
    by_name = (n for n in {**old, **new} if old.get(n) != new.get(n))
    by_place = (b[0] for a, b in itertools.zip_longest(was, now, fillvalue=("", None)) if a != b)
    return next(by_name, "") or next(by_place, "")
