"""The short road: a decode step that repeats the last step on its cache.

One idea: a step is recognised by identity, and what is recognised is not looked at again. A single-token call that
took the ordinary road leaves a `Step`: what it was given, the cache layers and the very tensors in them, and its leaves
in the entry's order. The next call repeats it when

- everything round it is equal: modes, structure, names of the arguments; arguments that are no tensors are the same
  objects, and tensors are like the last ones in class, dtype, device, layout, sizes and ``requires_grad``;
- the cache has the same layer objects, holding the very tensors that the last step left there;
- the sizes that grow by one (the cache, a mask) still fulfil the entry's conditions, and no length is passed beyond
  which the decoder does something else.

Then only new leaves are put in their places, the graph runs, and the new states go back to the layers. Cache tensors
of one shape go through the same operations and keep one shape, so one of each shape is looked at in full. Of the
others the number of elements is compared: it shows a tensor that was resized in place, which identity does not.
"""

from __future__ import annotations

import weakref
from operator import itemgetter
from typing import Any

import torch
from transformers.cache_utils import Cache

from compile_policy import compat
from compile_policy.binder import StepFailed
from compile_policy.call_key import Call
from compile_policy.entry import Entry
from compile_policy_transformers.lengths import held_by
from compile_policy_transformers.step_cache import StepCache, step_cache
from compile_policy_transformers.step_inputs import StepInputs, step_inputs


class Step:
    """The last step on a cache, and how it is repeated.

    Attributes:
        here: modes and structure round it; ``leaves``: all its leaves in the entry's order.
        shapes: of the leaves; those in ``growing`` may differ from step to step, in one dim.
        left: steps until the sequence is so long that a step is another form of call.
    """

    def __init__(
        self,
        cache: weakref.ref[Cache],
        here: tuple[Any, ...],
        entry: Entry,
        leaves: list[torch.Tensor],
        held: StepCache,
        inputs: StepInputs,
        left: float,
    ) -> None:
        self.left = left
        self.cache, self.here, self.entry = cache, here, entry
        self.leaves, self.held, self.inputs = leaves, held, inputs
        for place, t in zip(held.places, held.tensors, strict=True):
            leaves[place] = t
        looked_at = [held.places[first] for first, _ in held.looked_at]
        growing = {**inputs.growing, **{place: 2 for place in looked_at if held.grows}}
        checked = [*[place for place, _ in inputs.given], *[place for place, _ in inputs.made], *looked_at]
        self._checked = itemgetter(*checked)
        self._alike = compat.alike([leaves[i] for i in checked], [growing.get(i) for i in checked])
        self._growing = list(growing)
        self._shapes = [t.shape for t in leaves]
        self._fits = entry.graph.accepts.narrowed(held.same, growing)
        self._states = slice(held.places[0], held.places[-1] + 1)
        self._results = entry.output.tensors

    def repeats(self, kwargs: dict[str, Any], cache: Any) -> bool:
        """Whether a call repeats this step; its leaves are in their places then."""
        leaves, shapes = self.leaves, self._shapes
        if not (self.inputs.fit(kwargs) and self.held.holds(cache) and self.inputs.put(kwargs, leaves)):
            return False
        if not self._alike(*self._checked(leaves)):
            return False
        for place in self._growing:
            leaf = leaves[place]
            shapes[place] = leaf.shape
            if not leaf.is_contiguous():
                return False
        return self._fits(shapes)

    def run(self) -> Any:
        """Run the entry on the leaves, and give the cache its new states."""
        entry, held = self.entry, self.held
        entry.calls += 1
        self.left -= 1
        try:
            results = entry.graph.run(self.leaves)
        except Exception as error:
            if held.grows:  # nothing but its results has to be written
                raise StepFailed from error
            raise
        if held.grows:
            held.take(results[self._results :])
            self.leaves[self._states] = held.tensors
        return entry.output.build(results, {self.inputs.cache_name: self.cache()})


class DecodeSteps:
    """The last step on each cache.

    Attributes:
        cache_name: the argument that the cache comes in.
    """

    def __init__(self, cache_name: str) -> None:
        self.cache_name = cache_name
        self._steps: dict[int, Step] = {}  # by id of the cache, which outlives its entry here by nothing

    def recognise(self, kwargs: dict[str, Any], here: tuple[Any, ...]) -> Step | None:
        """The step that this call repeats, ready to run; ``None`` for a call that has to take the ordinary road."""
        cache = kwargs.get(self.cache_name)
        step = self._steps.get(id(cache))
        if step is None or step.left <= 0 or step.here != here or step.cache() is not cache:
            return None
        if not step.repeats(kwargs, cache):
            return None
        return step

    def forget(self) -> None:
        """Let go of all steps."""
        self._steps.clear()

    def remember(
        self, kwargs: dict[str, Any], call: Call, entry: Entry, here: tuple[Any, ...], binder: Any, module: Any
    ) -> None:
        """Note a call that took the ordinary road, if the next step can repeat it."""
        carrier: Any = call.values.get(self.cache_name)
        if carrier is None:
            return
        key = id(carrier.cache)
        self._steps.pop(key, None)
        if carrier.query_length != 1:
            return  # the first step of a sequence is proved (`Region`) and remembered, the next ones repeat it
        held = step_cache(carrier.cache, call, entry)
        inputs = None
        if held is not None:
            inputs = step_inputs(kwargs, call, held, binder, module, self.cache_name, entry.unread)
        if held is not None and inputs is not None and _repeatable(call, entry, inputs):
            steps = self._steps
            cache = weakref.ref(carrier.cache, lambda _: steps.pop(key, None))
            left = binder.lengths.left(held_by(carrier.cache))
            steps[key] = Step(cache, here, entry, list(call.leaves), held, inputs, left)


def _repeatable(call: Call, entry: Entry, inputs: StepInputs) -> bool:
    """Whether the entry writes into nothing but the cache, and hands back no tensor that was made for it."""
    if entry.written or not entry.output.names <= {inputs.cache_name}:
        return False
    own = {place for place, _ in inputs.given}
    returned = [i for kind, i in entry.graph.outputs if kind == "leaf"]
    return all(i in own or call.paths[i].startswith(f"{inputs.cache_name}.") for i in returned)
