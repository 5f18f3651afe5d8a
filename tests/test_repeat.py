"""The short road: a decode step is recognised by identity, and whatever changed takes the ordinary one."""

from __future__ import annotations

import copy
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from falling import falls_back
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache

import compile_policy as cp
from compile_policy.applied import regions
from compile_policy.predicate import ShapeConditions
from compile_policy.region import Region
from compile_policy_transformers import repeat
from compile_policy_transformers.cache_argument import CACHE
from compile_policy_transformers.tiny import tiny_config, tiny_model

PROMPT, SLOTS, BATCH = 6, 32, 2


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    """Models under the policy, shared so that each kind of cache is captured once."""
    config = cp.CompilationConfig(backend="eager")
    names = ("llama", "gemma3", "qwen2_5_vl")
    return {name: cp.apply(tiny_model(name), config) for name in names}


def _decoder(model: PreTrainedModel) -> Any:
    return _region(model).module


def _region(model: PreTrainedModel) -> Region:
    return next(r for r in regions(model) if r.role == "decoder")


@dataclass
class Sequence:
    """One sequence: the cache, and what the next call gets; a test changes either before a step."""

    decoder: Any
    cache: Any
    seen: int = 0
    padding: list[int] = field(default_factory=lambda: [0, 2])
    extra: dict[str, Any] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def arguments(self, new: int) -> dict[str, Any]:
        mask = torch.ones(BATCH, self.seen + new, dtype=torch.long)
        for row, n in enumerate(self.padding):
            mask[row, :n] = 0
        width = self.decoder.config.hidden_size
        static = isinstance(self.cache, StaticCache)
        return {
            "inputs_embeds": torch.randn(BATCH, new, width, generator=self.generator),
            "attention_mask": self._dense(mask, new) if static else mask,
            "position_ids": (torch.arange(self.seen, self.seen + new)[None] - torch.tensor(self.padding)[:, None]),
            CACHE: self.cache,
            "use_cache": True,
            **self.extra,
        }

    def _dense(self, mask: torch.Tensor, new: int) -> torch.Tensor:
        held = torch.zeros(BATCH, SLOTS, dtype=torch.bool)
        held[:, : self.seen + new] = mask.bool()
        past = torch.arange(SLOTS)[None] <= torch.arange(self.seen, self.seen + new)[:, None]
        return held[:, None, None, :] & past[None, None]

    @torch.no_grad()
    def call(self, new: int = 1, change: Callable[[dict[str, Any]], None] = lambda kwargs: None) -> Any:
        kwargs = self.arguments(new)
        change(kwargs)
        result = self.decoder(**kwargs)
        self.seen += new
        return result


def _start(model: PreTrainedModel, kind: str, steps: int = 3) -> Sequence:
    config = model.config.get_text_config()
    cache: Any = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=SLOTS)
    sequence = Sequence(_decoder(model), cache)
    for new in (PROMPT, *[1] * steps):
        sequence.call(new)
    return sequence


@contextmanager
def _short_road() -> Iterator[list[int]]:
    """Inside the block, a list of the places of the calls that took the short road is kept."""
    taken: list[int] = []
    run = repeat.Step.run

    def noted(self: repeat.Step) -> Any:
        taken.append(self.entry.calls)
        return run(self)

    repeat.Step.run = noted  # type: ignore[method-assign]
    try:
        yield taken
    finally:
        repeat.Step.run = run  # type: ignore[method-assign]


Edit = Callable[[Sequence], Any]


def _replace(s: Sequence) -> None:
    s.cache.layers[0].values = s.cache.layers[0].values.flip(0)


def _write(s: Sequence) -> None:
    s.cache.layers[0].values.mul_(-1)


def _copy_layer(s: Sequence) -> None:
    s.cache.layers[1] = copy.copy(s.cache.layers[1])


def _more_layers(s: Sequence) -> None:
    s.cache.layers.append(DynamicLayer())


def _strided_data(s: Sequence) -> None:
    """Every layer's memory laid out in another way, the objects as they were."""
    for layer in s.cache.layers:
        for t in (layer.keys, layer.values):
            t.data = t.data.transpose(1, 2).contiguous().transpose(1, 2)


def _reorder(s: Sequence) -> None:
    s.cache.reorder_cache(torch.tensor([1, 0]))


def _crop(s: Sequence) -> None:
    s.cache.crop(-2)
    s.seen -= 2


def _crop_data(s: Sequence) -> None:
    for layer in s.cache.layers:
        for t in (layer.keys, layer.values):
            t.data = t.data[:, :, :-2].contiguous()
    s.seen -= 2


def _more_padding(s: Sequence) -> None:
    s.padding = [3, 0]


def _eager_step(s: Sequence) -> None:
    region = next(iter([s.decoder.__dict__["_compiled_call_impl"]]), None)
    if isinstance(region, Region):
        with region.pause():
            s.call()
    else:
        s.call()


def _new_counter(s: Sequence) -> None:
    s.cache.layers[0].cumulative_length = s.cache.layers[0].cumulative_length.clone()


def _keep_constant(name: str, value: Any) -> Edit:
    return lambda s: s.extra.update({name: value})


#: What happens in mid-sequence, and whether the very next step may take the short road.
EDITS: dict[str, tuple[Edit, bool]] = {
    "nothing": (lambda s: None, True),
    "states written in place": (_write, True),
    "another padding mask": (_more_padding, True),
    "a tensor replaced": (_replace, False),
    "memory laid out otherwise": (_strided_data, False),
    "a layer replaced by its copy": (_copy_layer, False),
    "reordered": (_reorder, False),
    "an eager step": (_eager_step, False),
    "hidden states asked for": (_keep_constant("output_hidden_states", True), False),
}
DYNAMIC = {
    "cropped": (_crop, False),
    "cropped in place": (_crop_data, True),
    "a layer more": (_more_layers, False),
}
STATIC = {"counter replaced": (_new_counter, False)}
_DYNAMIC_ONLY = ("reordered", "memory laid out otherwise", "hidden states asked for")  # the last one for its time
CASES = [
    *[("llama", "dynamic", name) for name in (*EDITS, *DYNAMIC)],
    *[("llama", "static", n) for n in (*EDITS, *STATIC) if n not in _DYNAMIC_ONLY],
    *[("gemma3", "dynamic", name) for name in EDITS if "asked" not in name],
    *[("qwen2_5_vl", "dynamic", name) for name in ("nothing", "another padding mask")],
]


@pytest.mark.parametrize(("model_type", "kind", "name"), CASES)
def test_changes_in_mid_sequence(models: dict[str, PreTrainedModel], model_type: str, kind: str, name: str) -> None:
    """A change between two steps is obeyed as eager obeys it; a step unlike the last one takes the ordinary road."""
    model = models[model_type]
    edit, short = {**EDITS, **DYNAMIC, **STATIC}[name]
    short = short or (kind, name) == ("static", "an eager step")  # which wrote into the same tensors
    with cp.eager(model):
        stock = _start(model, kind)
        edit(stock)
        want = [stock.call() for _ in range(3)]
    first = _start(model, kind)  # the component itself answers the first call of each form
    edit(first)
    told = falls_back("a layer of the cache holds no states yet") if name == "a layer more" else nullcontext()
    with told:
        for _ in range(3):
            first.call()
    mine = _start(model, kind)
    edit(mine)
    got, before = [], _region(model).eager_calls
    with _short_road() as taken:
        got.append(mine.call())
        assert (len(taken) == 1) == short, "the first step after the change"
        got += [mine.call() for _ in range(2)]
    if not (model_type == "gemma3" or name == "a layer more"):  # the window overflows; a layer without states
        assert len(taken) >= 2, "the steps after it"
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.last_hidden_state, b.last_hidden_state, atol=1e-4, rtol=1e-3)
        assert (a.hidden_states is None) == (b.hidden_states is None) and a.past_key_values is mine.cache
    for layer, other in zip(mine.cache.layers, stock.cache.layers, strict=True):
        assert int(layer.get_seq_length()) == int(other.get_seq_length())
        if layer.keys is not None:
            torch.testing.assert_close(layer.keys, other.keys, atol=1e-4, rtol=1e-3)
    assert (_region(model).eager_calls > before) == (name == "a layer more")  # one without states


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_one_tensor_resized_in_place_is_seen(models: dict[str, PreTrainedModel], kind: str) -> None:
    """Identity does not show it, and eager raises: so does the ordinary road."""
    sequence = _start(models["llama"], kind)
    tensor = sequence.cache.layers[1].values
    tensor.data = tensor.data[:, :, :-1].contiguous()
    with _short_road() as taken, pytest.raises(Exception, match=r"size|shape|index|expanded"):
        sequence.call()
    assert not taken


def _strided(kwargs: dict[str, Any]) -> None:
    kwargs["inputs_embeds"] = torch.stack([kwargs["inputs_embeds"]] * 2, dim=-1)[..., 0]


def _without_mask(kwargs: dict[str, Any]) -> None:
    kwargs["attention_mask"] = None


def _boolean_mask(kwargs: dict[str, Any]) -> None:
    kwargs["attention_mask"] = kwargs["attention_mask"].bool()


def _counted_positions(kwargs: dict[str, Any]) -> None:
    kwargs["position_ids"] = kwargs["position_ids"][:1]


def _explicit_default(kwargs: dict[str, Any]) -> None:
    kwargs["output_attentions"] = False


ARGUMENTS = [_strided, _without_mask, _boolean_mask, _counted_positions, _explicit_default]


@pytest.mark.parametrize("change", ARGUMENTS)
def test_other_arguments_are_another_step(
    models: dict[str, PreTrainedModel], change: Callable[[dict[str, Any]], None]
) -> None:
    """Arguments in another form, left out or added: not the last step, also where they mean the same."""
    model = models["llama"]
    with cp.eager(model):
        stock = _start(model, "dynamic")
        want = [stock.call(change=change) for _ in range(3)]
    first = _start(model, "dynamic")  # the component itself answers the first call of each form
    for _ in range(2):
        first.call(change=change)
    mine = _start(model, "dynamic")
    with _short_road() as taken:
        got = [mine.call(change=change)]
        assert not taken
        got += [mine.call(change=change) for _ in range(2)]
        assert len(taken) == 2
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.last_hidden_state, b.last_hidden_state, atol=1e-4, rtol=1e-3)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", MODES)
def test_other_modes_are_another_step(models: dict[str, PreTrainedModel], name: str) -> None:
    """A step in another mode is told from the last one, and so is the first one back in the old mode."""
    sequence = _start(models["llama"], "dynamic")
    embeds = sequence.arguments(1)["inputs_embeds"]
    with _short_road() as taken:
        sequence.call()
        with MODES[name]():
            assert sequence.call(change=lambda kwargs: kwargs.update(inputs_embeds=embeds.clone())) is not None
        sequence.call()
        assert len(taken) == 1
        sequence.call()
        assert len(taken) == 2


def test_two_sequences_in_turn_and_at_once(models: dict[str, PreTrainedModel]) -> None:
    """Each cache has its own last step, whoever called in between, from whichever thread."""
    model = models["llama"]
    with cp.eager(model):
        stock = _start(model, "dynamic")
        want = [stock.call().last_hidden_state for _ in range(4)]
    one, two = _start(model, "dynamic"), _start(model, "static")
    results: dict[str, Any] = {"one": [], "two": []}
    with _short_road() as taken:
        for _ in range(2):
            results["one"].append(one.call())
            results["two"].append(two.call())

        def rest(name: str, sequence: Sequence) -> None:
            results[name] += [sequence.call() for _ in range(2)]

        threads = [threading.Thread(target=rest, args=(n, s)) for n, s in (("one", one), ("two", two))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(taken) == 8
    for found in results.values():
        for got, expected in zip(found, want, strict=True):
            torch.testing.assert_close(got.last_hidden_state, expected, atol=1e-4, rtol=1e-3)


def test_a_module_replaced_in_mid_sequence(models: dict[str, PreTrainedModel]) -> None:
    """torch tells of it at once, and the next step is not taken for a repetition."""
    model = models["llama"]
    layer = model.model.layers[0]

    class Halved(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) / 2

    usual = layer.mlp
    sequence = _start(model, "dynamic")
    try:
        layer.mlp = Halved(usual)
        with cp.eager(model):
            twin = copy.deepcopy(sequence)
            twin.decoder = sequence.decoder
            want = twin.call().last_hidden_state
        with _short_road() as taken:
            got = sequence.call().last_hidden_state
        assert not taken
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    finally:
        layer.mlp = usual


def test_a_dead_cache_leaves_nothing(models: dict[str, PreTrainedModel]) -> None:
    """What is remembered of a cache goes with it, tensors and all."""
    region = _region(models["llama"])
    gc.collect()
    before = len(region.binder.steps._steps)  # type: ignore[attr-defined]
    sequence = _start(models["llama"], "dynamic")
    assert len(region.binder.steps._steps) == before + 1  # type: ignore[attr-defined]
    del sequence
    gc.collect()
    assert len(region.binder.steps._steps) <= before  # type: ignore[attr-defined]


def _calls(layers: int, kind: str) -> tuple[int, int]:
    """Python functions and built-in ones that one step calls, its graph's own aside."""
    config = copy.deepcopy(tiny_config("llama"))
    config.num_hidden_layers = layers
    model: Any = cp.apply(LlamaForCausalLM(config).eval(), cp.CompilationConfig(backend="eager"))
    sequence = _start(model, kind)
    (entry,) = [e for found in _region(model).entries.values() for e in found]
    results = [torch.zeros(BATCH, 1, model.config.hidden_size)]
    if kind == "dynamic":
        grown = [torch.cat([t, t[:, :, :1]], 2) for x in sequence.cache.layers for t in (x.keys, x.values)]
        results += grown
    entry.graph.code = lambda *inputs: results
    kwargs = sequence.arguments(1)
    counts = {"call": 0, "c_call": 0}

    def count(frame: Any, event: str, argument: Any) -> None:
        if event in counts:
            counts[event] += 1

    with torch.no_grad(), _short_road() as taken:
        sys.setprofile(count)
        try:
            sequence.decoder(**kwargs)
        finally:
            sys.setprofile(None)
    assert len(taken) == 1
    return counts["call"], counts["c_call"]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_python_of_a_step_does_not_grow_with_depth(kind: str) -> None:
    """As many functions are called for 6 layers as for 2; built-in ones twice a layer, to compare keys and values."""
    shallow, deep = _calls(2, kind), _calls(6, kind)
    assert shallow[0] == deep[0] <= 40
    assert deep[1] - shallow[1] <= 2 * 4


def test_conditions_that_are_left() -> None:
    """Leaves of one shape are one, what cannot have changed is dropped, and the rest still bites."""
    conditions = ShapeConditions(
        ["s[1][0] == s[0][0]", "s[2][0] == s[0][0]", "s[2][1] == s[1][1]", "s[0][1] == 4", "(s[1][1] <= 9)"]
    )
    left = conditions.narrowed({1: 1, 2: 1}, [1])
    assert left([(3, 5), (3, 9), None])
    assert not left([(3, 5), (3, 10), None]) and not left([(3, 5), (2, 9), None])
    assert conditions.narrowed({1: 1, 2: 1}, [])([None, None, None])
