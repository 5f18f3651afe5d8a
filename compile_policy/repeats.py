"""Which layers of a component do the same, so that one of them can be traced for the others.

The component runs eager twice on the example: as it is, and with only its first layers. Both runs leave a tape of
operators (`Tape`). Layers are of one kind when their tapes are equal, operator by operator and number by number, with
other parameters and other leaves of the call in the same places. A component can be traced with its first layers when
these have every kind in them, when the layers behind only hand one tensor on, and when the short run is the long one
with the other layers left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from compile_policy.example import copies
from compile_policy.shadow import announced, layer_list, with_layers
from compile_policy.shapes import Labels
from compile_policy.tape import Call, Origin, Tape
from compile_policy.tensors import tensors_of
from compile_policy.unseen import Unseen

#: Makes the function of the leaves that is traced, for a component or a stand-in.
Remake = Callable[[torch.nn.Module], Callable[..., tuple[torch.Tensor, ...]]]
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_SAVED = 2  # layers at least that need not be traced


class NotRepeated(Exception):
    """Why all layers have to be traced."""


@dataclass(frozen=True)
class Repeats:
    """A component of which only the first layers need to be traced.

    Attributes:
        path: of the list of layers.
        count: number of layers; ``traced`` is the number of those that are traced.
        stands_for: for each layer that is not traced, in order, the one that stands for it.
        others: for each of these: what takes the place of the tensors that the traced layer uses.
        results: place among the component's results -> (which of the others makes it, place of the result of the traced
            layer that it is like).
        last: place of the result that the last layer hands on, where nothing comes behind it.
        tensors: all tensors of the component by ``id``.
    """

    path: str
    count: int
    traced: int
    stands_for: tuple[int, ...]
    others: tuple[Mapping[Origin, Origin], ...]
    results: Mapping[int, tuple[int, int]]
    last: int | None
    tensors: Mapping[int, torch.Tensor]

    def short(self, module: torch.nn.Module) -> torch.nn.Module:
        """The component with the traced layers alone."""
        return with_layers(module, self.path, list(module.get_submodule(self.path).children())[: self.traced])

    def __str__(self) -> str:
        return f"{self.traced} of {self.count} {self.path.rpartition('.')[2]} were traced, which stand for the others"


def repeats(
    module: torch.nn.Module,
    remake: Remake,
    leaves: Sequence[torch.Tensor],
    labels: Sequence[Labels],
    world: Unseen | None = None,
) -> Repeats | None:
    """What need not be traced; ``None`` for a component without a list of layers.

    Args:
        world: takes what the runs write.

    Raises:
        NotRepeated: the list has to be traced as it is; the message says why.
    """
    path = layer_list(module)
    if path is None:
        return None
    layers = list(module.get_submodule(path).children())
    tensors = {id(t): t for _, t in tensors_of(module)}
    try:
        full = _Run(module, path, layers, remake, leaves, labels, tensors, world)
        traced = full.needed()
        short = _Run(module, path, layers[:traced], remake, leaves, labels, tensors, world)
    except NotRepeated:
        raise
    except Exception as error:  # the model does with its list what no stand-in can do
        raise NotRepeated(f"a run with stand-ins for the layers failed with {type(error).__name__}") from error
    return full.shortened_to(short)


class _Run:
    """One eager run on the example, cut at the borders of the layers."""

    def __init__(
        self,
        module: torch.nn.Module,
        path: str,
        layers: Sequence[torch.nn.Module],
        remake: Remake,
        leaves: Sequence[torch.Tensor],
        labels: Sequence[Labels],
        tensors: Mapping[int, torch.Tensor],
        world: Unseen | None,
    ) -> None:
        self.path = path
        self.leaves, self.labels, self.tensors = leaves, labels, tensors
        used = copies(leaves)
        tape = Tape(used, tensors.values())
        marked = [announced(x, partial(tape.mark, i), partial(tape.mark, i)) for i, x in enumerate(layers)]
        run = remake(with_layers(module, path, marked))
        if world is not None:
            world.stand_ins.allow(used)
        with nullcontext() if world is None else world.stand_ins, tape:
            results = run(*used)
        self.calls = tape.calls
        self.results = [tape.origin(r) for r in results]
        if [i for i, _ in tape.marks] != [i for i in range(len(layers)) for _ in range(2)]:
            raise NotRepeated("its layers are not called one after the other")
        places = [n for _, n in tape.marks]
        self.spans = list(zip(places[::2], places[1::2], strict=True))
        self._layers: list[int | None] = [None] * len(self.calls)
        for i, (start, end) in enumerate(self.spans):
            self._layers[start:end] = [i] * (end - start)
        self.outside = self._uses_from_outside()
        self.outer: list[tuple[Origin, ...]] = []
        self.kinds = [self._kind(i) for i in range(len(layers))]

    def layer_of(self, number: int) -> int | None:
        """The layer that a call belongs to."""
        return self._layers[number]

    def _uses_from_outside(self) -> list[dict[tuple[int, int], set[Any]]]:
        """Per layer: (call, place) of what it makes and others use -> who they are."""
        layer_of = self._layers
        found: list[dict[tuple[int, int], set[Any]]] = [{} for _ in self.spans]
        for user, call in enumerate(self.calls):
            for origin in call.tensors:
                if origin[0] == "op" and (maker := layer_of[origin[1]]) is not None and maker != layer_of[user]:
                    place = (origin[1] - self.spans[maker][0], origin[2])
                    who = "behind" if user >= self.spans[-1][1] else layer_of[user]
                    found[maker].setdefault(place, set()).add("between" if who is None else who)
        return found

    def _kind(self, i: int) -> tuple[Any, ...]:
        """Equal for layers that do the same; what they use from outside is put down in `outer`, in order."""
        start, end = self.spans[i]
        outer: dict[Origin, int] = {}
        done = []
        for call in self.calls[start:end]:
            tensors = []
            for origin in call.tensors:
                if origin[0] == "op" and origin[1] >= start:
                    tensors.append(("own", origin[1] - start, origin[2]))
                elif origin[0] == "constant":
                    tensors.append(origin)
                else:
                    tensors.append(("outer", outer.setdefault(origin, len(outer)), 0))
            done.append((call.op, call.numbers, tuple(tensors)))
        self.outer.append(tuple(outer))
        return (tuple(done), tuple([self._role(i, origin) for origin in outer]))

    def _role(self, i: int, origin: Origin) -> tuple[Any, ...]:
        """What has to be the same about a tensor that a layer uses."""
        if origin[0] == "leaf":
            return ("leaf", *_form(self.leaves[origin[1]]), self.labels[origin[1]])
        if origin[0] == "tensor":
            _require(type(self.tensors[origin[1]]) in _PLAIN, "weights of the layers are no plain tensors")
            return ("tensor", *_form(self.tensors[origin[1]]))
        if origin[0] == "op" and i > 0 and self.layer_of(origin[1]) == i - 1:
            return ("previous", origin[1] - self.spans[i - 1][0], origin[2])
        return (*origin, i) if origin[0] == "unknown" else origin

    def needed(self) -> int:
        """Number of first layers that have every kind in them."""
        first: dict[Any, int] = {kind: i for i, kind in reversed(list(enumerate(self.kinds)))}
        needed: int = max(first.values()) + 1
        if len(self.spans) - needed < _SAVED:
            if self.spans[-2][1] != self.spans[-1][0]:
                raise NotRepeated("operators run between the layers")
            raise NotRepeated(f"layer {needed - 1} does what none before it does")
        for before, after in zip(self.spans[needed - 1 :], self.spans[needed:], strict=False):
            if before[1] != after[0]:
                raise NotRepeated("operators run between the layers")
        return needed

    def shortened_to(self, short: _Run) -> Repeats:
        """Raises NotRepeated unless ``short`` is this run without its last layers."""
        traced, count = len(short.spans), len(self.spans)
        at = [max(i for i in range(traced) if short.kinds[i] == kind) for kind in self.kinds[traced:]]
        same = short.kinds == self.kinds[:traced] and short.outer == self.outer[:traced]
        _require(same, "with fewer layers, the first ones do something else")
        handed = self._handed_on
        for i, representative in zip(range(traced, count), at, strict=True):
            _require(handed(i) == handed(representative), "layers that do the same hand on different results")
        for i in range(traced - 1, count):
            users = {who for users in self.outside[i].values() for who in users}
            _require(users <= {i + 1 if i < count - 1 else "behind"}, f"what layer {i} makes is used in many places")
        end, short_end = self.spans[-1][1], short.spans[-1][1]

        def moved(origin: Origin) -> Origin:
            """Where the short run has what this one has from ``origin``."""
            if origin[0] != "op" or origin[1] < self.spans[traced - 1][0]:
                return origin
            if origin[1] >= end:
                return ("op", origin[1] - end + short_end, origin[2])
            maker = self.layer_of(origin[1])
            if maker == count - 1 and (origin[1] - self.spans[maker][0], origin[2]) == handed(maker):
                number, place = handed(traced - 1)
                return ("op", short.spans[-1][0] + number, place)
            return ("gone", maker, *origin)

        before, behind = self.calls[: self.spans[0][0]], self.calls[end:]
        same = before == short.calls[: short.spans[0][0]]
        same = same and [Call(c.op, c.numbers, tuple(map(moved, c.tensors))) for c in behind] == short.calls[short_end:]
        gaps = zip(range(traced - 1), self.spans, self.spans[1:], strict=False)
        same = same and all(self.calls[a[1] : b[0]] == short.calls[a[1] : b[0]] for _, a, b in gaps)
        _require(same, "with fewer layers, the rest of the component does something else")
        results, last = self._results(short, moved, at)
        others = [
            dict(zip(self.outer[representative], self.outer[i], strict=True))
            for i, representative in zip(range(traced, count), at, strict=True)
        ]
        return Repeats(self.path, count, traced, tuple(at), tuple(others), results, last, self.tensors)

    def _handed_on(self, i: int) -> tuple[int, int]:
        """(call, place) of the one tensor that a layer hands to the next, or to what comes behind the last."""
        last = i == len(self.spans) - 1
        found: list[tuple[int, int]] = [
            place for place, users in self.outside[i].items() if ("behind" if last else i + 1) in users
        ]
        if last and not found:  # nothing comes behind: it is a result, as the kind of layer says where
            kind = self.kinds[i]
            found = [self._handed_on(j) for j in range(i) if self.kinds[j] == kind][:1]
        _require(len(found) == 1, "layers do not hand on one tensor each")
        (place,) = found
        return place

    def _results(
        self, short: _Run, moved: Callable[[Origin], Origin], at: Sequence[int]
    ) -> tuple[dict[int, tuple[int, int]], int | None]:
        """`Repeats.results` and `Repeats.last`."""
        _require(len(self.results) == len(short.results), "with fewer layers, it has fewer results")
        traced, count = len(short.spans), len(self.spans)
        found: dict[int, tuple[int, int]] = {}
        last: int | None = None
        for place, (origin, was) in enumerate(zip(self.results, short.results, strict=True)):
            layer = self.layer_of(origin[1]) if origin[0] == "op" else None
            if layer is not None and layer >= traced - 1 and self._is_handed_on(layer, origin):
                _require(layer == count - 1 and moved(origin) == was, "a layer in the middle makes a result")
                last = place
                continue
            if layer is None or layer < traced:
                _require(was in (origin, moved(origin)), "with fewer layers, it has other results")
                continue
            start = short.spans[at[layer - traced]][0] - self.spans[layer][0]
            alike = ("op", origin[1] + start, origin[2])
            _require(was[0] == "leaf" and alike in short.results, "a result of a layer is not like that of another")
            found[place] = (layer - traced, short.results.index(alike))
        return found, last

    def _is_handed_on(self, layer: int, origin: Origin) -> bool:
        return (origin[1] - self.spans[layer][0], origin[2]) == self._handed_on(layer)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise NotRepeated(otherwise)


def _form(t: torch.Tensor) -> tuple[Any, ...]:
    layout = t.stride() if t.layout is torch.strided else t.layout
    return (type(t), t.dtype, t.device, t.layout, tuple(t.shape), layout, t.requires_grad)
