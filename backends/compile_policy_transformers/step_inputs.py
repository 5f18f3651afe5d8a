"""The leaves of a decode step that do not come from its cache: taken from the call as they are, or made from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from compile_policy import compat
from compile_policy.call_key import CONSTANTS, Call
from compile_policy_transformers.cache_twins import states_to_keep
from compile_policy_transformers.step_cache import StepCache

#: Makes a leaf from the call's arguments and the leaves before it; ``None`` where the ordinary road has to.
Make = Callable[[dict[str, Any], list[torch.Tensor]], torch.Tensor | None]
_KINDS = {"full_attention": DynamicLayer, "sliding_attention": DynamicSlidingWindowLayer}
_FEATURES = ("deepstack_visual_embeds", "visual_pos_masks")


class Binding(Protocol):
    """What of a decoder's binder is needed here."""

    def position_ids(self, ids: Any, embeds: torch.Tensor, cache: Any) -> Any:
        """Full position ids."""


class StepInputs:
    """Where each new leaf of a step comes from, and what the call's arguments have to be like.

    Attributes:
        cache_name: the argument that the cache comes in.
        names: of all arguments; ``constants``: those that are no tensors, which must be the same objects.
        given: place of a leaf and the argument that it is; ``made``: place of a leaf and how it is made.
        raw: tensors among the arguments that are no leaves, but may be made into one.
        growing: place of each leaf that may be larger in the next step -> the dim.
    """

    def __init__(self, kwargs: Mapping[str, Any], call: Call, cache_name: str, unread: Collection[str] = ()) -> None:
        self.cache_name = cache_name
        self.names = frozenset(kwargs)
        read = [(name, value) for name, value in kwargs.items() if name not in unread]
        self.constants = [(name, value) for name, value in read if isinstance(value, CONSTANTS)]
        self.given = [(i, path) for i, path in enumerate(call.paths) if call.leaves[i] is kwargs.get(path)]
        self.made: list[tuple[int, Make]] = []
        self.growing: dict[int, int] = {}
        taken = {name for _, name in self.given}
        raw = {n: v for n, v in kwargs.items() if isinstance(v, torch.Tensor) and n not in taken}
        self.raw = list(raw)
        dims = [value.dim() - 1 if name == "attention_mask" else None for name, value in raw.items()]
        self._raw_alike = compat.alike(list(raw.values()), dims) if raw else None

    def fit(self, kwargs: dict[str, Any]) -> bool:
        """Whether the arguments are like the last step's, as far as they are no leaves."""
        if kwargs.keys() != self.names:
            return False
        for name, value in self.constants:
            if kwargs[name] is not value:
                return False
        return self._raw_alike is None or self._raw_alike(*[kwargs[name] for name in self.raw])

    def put(self, kwargs: dict[str, Any], leaves: list[torch.Tensor]) -> bool:
        """Put the new leaves in their places; ``False`` where one cannot be made."""
        for place, name in self.given:
            leaves[place] = kwargs[name]
        for place, make in self.made:
            leaf = make(kwargs, leaves)
            if leaf is None:
                return False
            leaves[place] = leaf
        return True


def step_inputs(
    kwargs: Mapping[str, Any],
    call: Call,
    held: StepCache,
    binder: Binding,
    module: Any,
    cache_name: str,
    unread: Collection[str] = (),
) -> StepInputs | None:
    """How the next step's leaves come from its arguments; ``None`` where it needs the ordinary road.

    Args:
        unread: arguments on which the graph does not depend.
    """
    for name, value in kwargs.items():
        if name in unread:
            continue
        if isinstance(value, (torch.Tensor, *CONSTANTS)) or name == cache_name:
            continue
        if name != "attention_mask" or type(value) is not dict:
            return None
    inputs = StepInputs(kwargs, call, cache_name, unread)
    given = dict(inputs.given)
    masks = [i for i, path in enumerate(call.paths) if path.startswith("attention_mask")]
    for place, path in enumerate(call.paths):
        name = path.split("[")[0].split(".")[0]
        make: Make | None = None
        if place in given or (name in _FEATURES and kwargs.get(name) is None):
            continue  # features that were not given are empty, in every step
        if path.endswith((".keys", ".values", ".cumulative_length")):
            continue
        if ".select[" in path:
            make = _select(int(path.rpartition("[")[2][:-1]), dict(call.spec)[cache_name], held)
            inputs.growing[place] = 0
        elif place in call.copied and call.copied[place] is kwargs.get(path):
            make = _contiguous(path)
        elif name == "inputs_embeds":
            make = _embedded(module)
        elif name == "position_ids":
            make = _positions(binder, call.paths.index("inputs_embeds"), cache_name)
        elif name == "attention_mask":
            make = _mask(kwargs.get(name), masks.index(place), call.leaves[place], call, held)
        if make is None:
            return None
        inputs.made.append((place, make))
    if held.grows:
        inputs.growing.update((i, call.leaves[i].dim() - 1) for i in masks)
    return inputs


def _contiguous(name: str) -> Make:
    return lambda kwargs, leaves: kwargs[name].contiguous()


def _embedded(module: Any) -> Make:
    return lambda kwargs, leaves: module.get_input_embeddings()(kwargs["input_ids"])


def _positions(binder: Binding, embeds: int, cache_name: str) -> Make:
    def positions(kwargs: dict[str, Any], leaves: list[torch.Tensor]) -> torch.Tensor:
        ids = binder.position_ids(kwargs.get("position_ids"), leaves[embeds], kwargs[cache_name])
        made: torch.Tensor = ids.contiguous()
        return made

    return positions


def _select(number: int, cache_spec: Any, held: StepCache) -> Make:
    """Which states the sliding layers of one window keep; the same ones in every step once they are full."""
    layers = cache_spec[2][1]
    layer = layers.index(("sliding", number))
    window = held.layers[layer].sliding_window
    last: tuple[int, torch.Tensor] | None = None

    def select(kwargs: dict[str, Any], leaves: list[torch.Tensor]) -> torch.Tensor:
        nonlocal last
        states = held.states(layer)
        if last is None or last[0] != states:
            last = states, states_to_keep(window, states, 1, held.tensors[0].device)
        return last[1]

    return select


def _mask(given: Any, number: int, leaf: torch.Tensor, call: Call, held: StepCache) -> Make | None:
    """The mask of one kind of layers, made from a padding mask, from none, or found among prepared ones."""
    spec = dict(call.spec)["attention_mask"]
    name: Any = spec[1][number][0] if spec[0] == "dict" else None
    if type(given) is dict:
        return _prepared(name, frozenset(given)) if given.get(name) is leaf and not held.sliding else None
    full = held.first(DynamicLayer)
    layer = held.first(_KINDS[name]) if name in _KINDS else None
    if name is None:
        layer = full if full is not None else held.first(DynamicSlidingWindowLayer)
    if layer is None or not (given is None or given.dim() == 2):
        return None
    # Whatever else the ordinary road put into this mask would be missing in the next one.
    plain = leaf.dtype is torch.bool and leaf.shape[1:3] == (1, 1)
    same = plain and torch.equal(_row(given, leaf.shape[0], leaf.shape[3], leaf.device), leaf)
    return _rows(layer, full, leaf, held) if same else None


def _prepared(name: str, names: frozenset[str]) -> Make:
    def prepared(kwargs: dict[str, Any], leaves: list[torch.Tensor]) -> torch.Tensor | None:
        masks = kwargs["attention_mask"]
        return masks[name] if type(masks) is dict and masks.keys() == names else None

    return prepared


def _rows(layer: int, full: int | None, leaf: torch.Tensor, held: StepCache) -> Make:
    batch, device = leaf.shape[0], leaf.device

    def row(kwargs: dict[str, Any], leaves: list[torch.Tensor]) -> torch.Tensor | None:
        padding = kwargs.get("attention_mask")
        states = held.states(layer)
        if padding is not None and full is not None:
            seen = states if full == layer else held.states(full)
            if padding.shape[1] != seen + 1:
                return None
        return _row(padding, batch, states + 1, device)

    return row


def _row(padding: torch.Tensor | None, batch: int, states: int, device: torch.device) -> torch.Tensor:
    """(batch, 1, 1, states): which of the held states and the new one count.

    A single token sees all that its cache holds, so its row of a causal or sliding mask is the padding mask.
    """
    if padding is None:
        return torch.ones((batch, 1, 1, states), dtype=torch.bool, device=device)
    counts = padding.to(torch.bool)
    if counts.shape[1] != states:
        counts = counts[:, -states:]
    return counts.view(batch, 1, 1, -1).contiguous()
