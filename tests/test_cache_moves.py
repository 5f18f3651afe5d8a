"""Cache layers of any class go through a graph: where they put their states is asked of them, and is done by index."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from falling import falls_back
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache

import compile_policy as cp
from compile_policy.call_key import Leaves, adapter_for
from compile_policy.errors import NotCompilable
from compile_policy.proof import _copied
from compile_policy_transformers import cache_layers, cache_moves, caches
from compile_policy_transformers.own_masks import has_kinds_of_its_own
from compile_policy_transformers.tiny import tiny_config, tiny_inputs, tiny_model

KINDS = ("dynamic", "static")
TOTAL = 34
FIRST, LAST = 2, 6


class Sink(DynamicLayer):
    """Keeps the first states and the last ones."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states)
        self.seen += key_states.shape[2]
        if keys.shape[2] > FIRST + LAST:
            self.keys = torch.cat([keys[:, :, :FIRST], keys[:, :, -LAST:]], dim=2)
            self.values = torch.cat([values[:, :, :FIRST], values[:, :, -LAST:]], dim=2)
        return keys, values

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return super().get_seq_length() + query_length, self.seen - super().get_seq_length()


class Ring(DynamicLayer):
    """Slots that are written over from the start, in place."""

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys = key_states.new_zeros(*key_states.shape[:2], LAST, key_states.shape[3])
        self.values = value_states.new_zeros(*value_states.shape[:2], LAST, value_states.shape[3])
        self.next = torch.tensor(0)

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        places = (torch.arange(key_states.shape[2]) + self.next) % LAST
        self.next.add_(key_states.shape[2])
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        return self.keys.clone(), self.values.clone()


class Plain(DynamicSlidingWindowLayer):
    """A class of its own that keeps its states as its base does."""

    def __init__(self) -> None:
        super().__init__(sliding_window=LAST)


def _cache(make: Callable[[], Any], layers: int = 2) -> Cache:
    cache = DynamicCache()
    cache.layer_class_to_replicate = None
    cache.layers = [make() for _ in range(layers)]
    return cache


def _mixed() -> Cache:
    cache = _cache(Sink, 3)
    cache.layers[1] = Plain()
    return cache


def _of_unlimited_ocr(kind: str) -> Cache:
    config = tiny_config("unlimited_ocr").get_text_config()
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=TOTAL)


def _through_a_graph(cache: Cache, states: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the graph does with a cache, without a graph."""
    adapter = adapter_for(caches.CacheCall)
    assert adapter is not None
    call = caches.CacheCall(cache, states[0].shape[2])
    leaves = Leaves(lambda path, tensor: (None,) * tensor.dim())
    spec = adapter.flatten(call, leaves, "cache")
    twin = adapter.rebuild(spec, iter(leaves.tensors))
    seen = [twin.layers[i].update(s, -s) for i, s in enumerate(states)]
    adapter.write_back(spec, call, adapter.state(spec, twin))
    return seen


def _assert_equal(mine: Any, stock: Any) -> None:
    assert type(mine) is type(stock) and vars(mine).keys() == vars(stock).keys()
    for name, want in vars(stock).items():
        have = getattr(mine, name)
        if isinstance(want, torch.Tensor):
            assert torch.equal(have, want) or have.numel() == want.numel() == 0, name
        else:
            assert have == want, name


CACHES: dict[str, Callable[[], Cache]] = {
    "sink": lambda: _cache(Sink),
    "ring": lambda: _cache(Ring),
    "plain": lambda: _cache(Plain),
    "mixed": _mixed,
    "unlimited_ocr dynamic": lambda: _of_unlimited_ocr("dynamic"),
    "unlimited_ocr static": lambda: _of_unlimited_ocr("static"),
}


@pytest.mark.parametrize("steps", [(7, 1, 1, 3, 1, 9, 1, 1), (1,) * 12, (5, 5, 5, 5)])
@pytest.mark.parametrize("name", CACHES)
def test_layers_step_by_step(name: str, steps: Sequence[int]) -> None:
    """Attention sees the same states, and the layer ends up with the same attributes, as the stock update leaves."""
    generator = torch.Generator().manual_seed(1)
    mine, stock = CACHES[name](), CACHES[name]()
    shapes = [cache_layers.LayerShape(torch.empty(1, 2, 0, 4), torch.empty(1, 2, 0, 4)) for _ in mine.layers]
    cache_layers.initialise(mine, shapes, 2, torch.device("cpu"))
    if name == "ring":
        steps = [min(step, LAST) for step in steps]  # more would be written twice in one call
    for step in steps:
        states = [torch.randn(2, 2, step, 4, generator=generator) for _ in mine.layers]
        seen = _through_a_graph(mine, states)
        for i, new in enumerate(states):
            keys, values = stock.layers[i].update(new, -new)
            if not isinstance(stock.layers[i], Plain):  # whose twin shows the whole window
                assert torch.equal(seen[i][0], keys) and torch.equal(seen[i][1], values)
            _assert_equal(mine.layers[i], stock.layers[i])
    assert set(cache_moves.groups(mine)) == {i for i, x in enumerate(mine.layers) if not isinstance(x, Plain)}


def test_parts_of_one_memory_stay_parts() -> None:
    """The static layer's keys are a part of all its keys, also behind a graph and in a copy."""
    cache = _of_unlimited_ocr("static")
    for step in (4, 1):
        _through_a_graph_or_stock(cache, step)
        for layer in (cache.layers[0], copy.deepcopy(cache).layers[0], _copied(cache).layers[0]):
            layer.all_keys.fill_(7.0)
            assert (layer.keys == 7).all() and (layer.prefill_keys == 7).all() and layer.prefill_keys.numel()


def _through_a_graph_or_stock(cache: Cache, step: int) -> None:
    states = [torch.randn(2, 2, step, 4) for _ in cache.layers]
    if not cache.layers[0].is_initialized:
        cache.layers[0].update(states[0], states[0])
        cache.layers[1].update(states[1], states[1])
    else:
        _through_a_graph(cache, states)


class Scaling(DynamicLayer):
    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        return super().update(key_states * 0.5, value_states)


class Rounding(DynamicLayer):
    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        return super().update(key_states.to(torch.float16).to(key_states.dtype), value_states)


class Choosing(DynamicLayer):
    """Drops the state with the shortest key: which one that is depends on values, and differs from row to row."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states)
        keep = keys.norm(dim=-1)[0, 0].topk(max(keys.shape[2] - 1, 1)).indices.sort().values
        self.keys, self.values = keys[:, :, keep], values[:, :, keep]
        return keys, values


class Holding(DynamicLayer):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        self.log.append(key_states.shape[2])
        return super().update(key_states, value_states)


class KeysOnly(DynamicLayer):
    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states)
        return keys, values.roll(1, dims=2)


class Crossing(DynamicLayer):
    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        return super().update(key_states.roll(1, dims=1), value_states.roll(1, dims=1))


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Scaling, "computes mul of states"),
        (Rounding, "computes _to_copy of states"),
        (Choosing, "computes linalg_vector_norm of states"),
        (Holding, "holds a list in log"),
        (Crossing, "moves states from row to row"),
        (KeysOnly, "treats values in another way"),
    ],
)
def test_layers_that_do_more(cls: type, why: str) -> None:
    """What computes with states, or counts where nobody looks, is refused by name, and its cache is left alone."""
    cache = _cache(cls)
    shapes = [cache_layers.LayerShape(torch.empty(1, 2, 0, 4), torch.empty(1, 2, 0, 4))] * 2
    cache_layers.initialise(cache, shapes, 1, torch.device("cpu"))
    with pytest.raises(NotCompilable) as error:
        _through_a_graph(cache, [torch.ones(1, 2, 3, 4)] * 2)
    assert why in error.value.reason and cls.__name__ in error.value.reason
    assert cache.layers[0].get_seq_length() == 0


# -- through the compiled decoder -------------------------------------------------------------------------------------


def _graphs(model: PreTrainedModel) -> tuple[int, int]:
    row = next(c for c in cp.report(model).components if c.role == "decoder")
    return row.graphs, row.eager_calls


@pytest.mark.parametrize("make", [Sink, Plain])
def test_a_users_own_layers(make: type) -> None:
    """A cache class that Transformers does not have: prompts, tokens, several at once, one graph, equal to eager."""
    model = tiny_model("llama")
    ids = tiny_inputs(model, text_len=22, batch=2)["input_ids"]

    @torch.no_grad()
    def run() -> tuple[list[torch.Tensor], Cache]:
        cache, out, start = _cache(make), [], 0
        for step in (5, 1, 1, 1, 4, 1, 1, 6, 1, 1):
            piece = ids[:, start : start + step]
            out.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
            start += step
        return out, cache

    want, stock = run()
    cp.apply(model, cp.CompilationConfig(backend="eager"))
    got, mine = run()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    for a, b in zip(mine.layers, stock.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=1e-3)
    assert _graphs(model) == (1, 0)


def test_layers_that_no_graph_serves_run_eager() -> None:
    """The decoder runs eager, equal, and says which class it was."""
    model = tiny_model("llama")
    ids = tiny_inputs(model, text_len=6)["input_ids"]
    with torch.no_grad():
        want = model(input_ids=ids, past_key_values=_cache(Scaling)).logits
        cp.apply(model, cp.CompilationConfig(backend="eager"))
        with falls_back("Scaling"):
            got = model(input_ids=ids, past_key_values=_cache(Scaling)).logits
    row = next(c for c in cp.report(model).components if c.role == "decoder")
    assert torch.equal(got, want) and (row.graphs, row.eager_calls) == (0, 1) and "Scaling" in (row.fallback or "")


@pytest.mark.parametrize("kind", KINDS)
def test_reference_sliding_windows(kind: str) -> None:
    """unlimited_ocr far beyond its window: one graph a kind of cache, and the masks are its own forward's."""
    model = tiny_model("unlimited_ocr")
    config = model.config.get_text_config()
    assert has_kinds_of_its_own(config) and not has_kinds_of_its_own(tiny_config("gemma3").get_text_config())
    inputs = tiny_inputs(model, text_len=9, batch=2)
    options = {"cache_implementation": "static"} if kind == "static" else {}
    new = 2 * config.sliding_window
    with torch.no_grad():
        generate: Any = model.generate
        asked = {**inputs, **options, "max_new_tokens": new, "output_logits": True, "return_dict_in_generate": True}
        want = generate(**asked)
        cp.apply(model, cp.CompilationConfig(backend="eager"))
        got = generate(**asked)
    assert torch.equal(got.sequences, want.sequences) and len(got.logits) == new
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-3)
    assert _graphs(model) == (1, 0)
