"""A Transformers cache that goes through a graph ends up exactly as one that the stock layers have updated."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionLayer,
    StaticCache,
)
from transformers.masking_utils import create_masks_for_generate

import compile_policy as cp
from compile_policy.call_key import Leaves, adapter_for
from compile_policy.errors import NotCompilable
from compile_policy_transformers import attention, cache_layers, caches
from compile_policy_transformers.cache_masks import arranged, sliding_mask
from compile_policy_transformers.tiny import tiny_config, tiny_inputs, tiny_model

KINDS = ("dynamic", "static")
TOTAL = 40


def _text_config(model_type: str) -> Any:
    config = copy.deepcopy(tiny_config(model_type).get_text_config())
    config._attn_implementation_internal = attention.DECODER
    return config


def _new_cache(kind: str, config: Any, batch: int = 2) -> Cache:
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=TOTAL)


def _update_by_policy(cache: Cache, states: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the graph does with a cache, without a graph: flatten, rebuild, update every layer, write back."""
    adapter = adapter_for(caches.CacheCall)
    assert adapter is not None
    call = caches.CacheCall(cache, states[0].shape[2])
    leaves = Leaves(lambda path, tensor: (None,) * tensor.dim())
    spec = adapter.flatten(call, leaves, "cache")
    twin = adapter.rebuild(spec, iter(leaves.tensors))
    seen = [twin.layers[i].update(s, -s) for i, s in enumerate(states)]
    seen = [(k.clone(), v.clone()) for k, v in seen]
    adapter.write_back(spec, call, adapter.state(spec, twin))
    assert adapter.public(call) is cache
    return seen


def _masks(config: Any, cache: Cache, batch: int, length: int) -> dict[str, torch.Tensor]:
    made = create_masks_for_generate(config, torch.zeros(batch, length, config.hidden_size), None, cache)
    return made if isinstance(made, dict) else dict.fromkeys(config.layer_types, made)


def _visible(states: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """For every row and query, the states that the mask lets through, in order."""
    return [states[b, :, mask[b, 0, q]] for b in range(mask.shape[0]) for q in range(mask.shape[2])]


def _assert_equal_layers(got: Cache, want: Cache) -> None:
    for mine, stock in zip(got.layers, want.layers, strict=True):
        assert type(mine) is type(stock)
        assert torch.equal(mine.keys, stock.keys) and torch.equal(mine.values, stock.values)
        assert int(mine.get_seq_length()) == int(stock.get_seq_length())
        counters = ("cumulative_length", "cumulative_length_int")
        for name in counters:
            assert int(getattr(mine, name, 0)) == int(getattr(stock, name, 0)), name


def _chunks(size: int | str) -> Iterator[int]:
    choose = random.Random(0)
    left = TOTAL
    while left:
        step = min(left, choose.randint(1, 10) if size == "mixed" else int(size))
        yield step
        left -= step


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_step_by_step(kind: str, size: int | str) -> None:
    """Full and sliding layers, below, across and beyond the window: every query sees the states that it sees with
    the stock layers, and the cache holds the same afterwards."""
    config = _text_config("gemma3")
    window = config.sliding_window
    assert 2 * window < TOTAL and "sliding_attention" in config.layer_types
    generator = torch.Generator().manual_seed(1)
    mine, stock = _new_cache(kind, config), _new_cache(kind, config)
    shapes = [cache_layers.LayerShape(torch.empty(1, 2, 0, 4), torch.empty(1, 2, 0, 4)) for _ in config.layer_types]
    cache_layers.initialise(mine, shapes, 2, torch.device("cpu"))
    assert not cache_layers.needs_initialisation(mine, shapes)
    for step in _chunks(size):
        masks = _masks(config, stock, 2, step)
        fitting = {
            k: arranged(m, mine, sliding=k == "sliding_attention") for k, m in _masks(config, mine, 2, step).items()
        }
        states = [torch.randn(2, 2, step, 4, generator=generator) for _ in config.layer_types]
        seen = _update_by_policy(mine, states)
        for i, (layer_type, new) in enumerate(zip(config.layer_types, states, strict=True)):
            keys, values = stock.layers[i].update(new, -new)
            for got, want in ((seen[i][0], keys), (seen[i][1], values)):
                pairs = zip(_visible(got, fitting[layer_type]), _visible(want, masks[layer_type]), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)
        _assert_equal_layers(mine, stock)


def test_float_sliding_mask() -> None:
    """An additive mask is rearranged like a boolean one, with the lowest number where a boolean has False."""
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(1, 1, 2, 9)
    filling, full = sliding_mask(mask, 8, 3), sliding_mask(mask, 8, 8)
    assert filling.shape == full.shape == (1, 1, 2, 10)
    assert filling[0, 0, 0].tolist() == [0.0] * 3 + [lowest] * 5 + [0.0] * 2
    assert full[0, 0, 0].tolist() == [lowest] + [0.0] * 9


def test_refused_caches() -> None:
    """A cache that is offloaded, or that has layers of an unknown kind, is refused by name."""
    config = _text_config("gemma3")
    shapes = [cache_layers.LayerShape(torch.empty(1, 2, 0, 4), torch.empty(1, 2, 0, 4)) for _ in config.layer_types]
    states = [torch.zeros(1, 2, 1, 4) for _ in config.layer_types]

    def refusal(change: Any) -> str:
        cache = DynamicCache(config=config)
        cache_layers.initialise(cache, shapes, 1, torch.device("cpu"))
        change(cache)
        with pytest.raises(NotCompilable) as error:
            _update_by_policy(cache, states)
        return error.value.reason

    class Odd(LinearAttentionAndFullAttentionLayer):
        def update(self, *args: Any, **kwargs: Any) -> Any:
            return super().update(*args, **kwargs)

    def odd(cache: Cache) -> None:
        cache.layers[0] = Odd()

    assert "offloaded" in refusal(lambda cache: setattr(cache, "offloading", True))
    assert "Odd" in refusal(odd)


LINEAR_LAYERS = (
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
)
LINEAR = [(cls, groups) for cls in LINEAR_LAYERS for groups in (("conv",), ("conv", "recurrent"))]


def _cache_of(cls: Any) -> Cache:
    static = "Static" in cls.__name__
    cache: Any = object.__new__(StaticCache if static else DynamicCache)
    layer = cls(max_cache_len=TOTAL) if static else cls()
    cache.layers, cache.layer_class_to_replicate, cache.offloading = [layer], None, False
    return cache


@pytest.mark.parametrize(("cls", "groups"), LINEAR)
def test_linear_attention_layers_step_by_step(cls: type, groups: tuple[str, ...]) -> None:
    """Convolution and recurrent states end up in place as the stock layer's; a reset cache starts from nothing."""
    generator = torch.Generator().manual_seed(1)
    mine, stock = _cache_of(cls), _cache_of(cls)
    layer: Any = mine.layers[0]
    attends = cls is not LinearAttentionLayer

    def states(length: int) -> dict[str, torch.Tensor]:
        made = {"conv": torch.randn(2, 6, length, generator=generator)}
        return made | ({"recurrent": torch.randn(2, 3, 5, generator=generator)} if "recurrent" in groups else {})

    def update(cache: Cache, new: dict[str, torch.Tensor], keys: torch.Tensor) -> list[torch.Tensor]:
        seen = [cache.update_conv_state(new["conv"], 0, conv_kernel_size=4)]
        if "recurrent" in new:
            cache.update_recurrent_state(new["recurrent"], 0)
        if attends:
            cache.layers[0].update(keys, -keys)
        return [t.clone() for t in seen]

    learnt = _cache_of(cls)
    update(learnt, states(2), torch.randn(1, 2, 2, 4))
    shapes = cache_layers.layer_shapes(learnt)
    for _ in range(2):
        cache_layers.initialise(mine, shapes, 2, torch.device("cpu"))
        assert not cache_layers.needs_initialisation(mine, shapes)
        held = layer.conv_states[0]
        for length in (3, 1, 6, 1, 1):
            new, keys = states(length), torch.randn(2, 2, length, 4, generator=generator)
            call = caches.CacheCall(mine, length)
            adapter = adapter_for(caches.CacheCall)
            assert adapter is not None
            leaves = Leaves(lambda path, tensor: (None,) * tensor.dim())
            spec = adapter.flatten(call, leaves, "cache")
            twin = adapter.rebuild(spec, iter(leaves.tensors))
            got = update(twin, new, keys)
            adapter.write_back(spec, call, adapter.state(spec, twin))
            want = update(stock, new, keys)
            # behind an empty layer the graph sees zeros where the stock layer sees no states
            assert all(
                torch.equal(a[..., -b.shape[-1] :], b) and not a[..., : -b.shape[-1]].any()
                for a, b in zip(got, want, strict=True)
            )
            theirs: Any = stock.layers[0]
            for group in ("conv_states", "recurrent_states"):
                a, b = getattr(layer, group)[0], getattr(theirs, group)[0]
                assert (a is None and b is None) or torch.equal(a, b)
            assert layer.has_previous_state == theirs.has_previous_state
            assert layer.conv_states[0] is held, "the states are written in place"
        mine.reset()
        stock.reset()


# -- through the compiled decoder -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    """Models under the policy, shared so that each kind of cache is captured once."""
    config = cp.CompilationConfig(backend="eager")
    return {name: cp.apply(tiny_model(name), config) for name in ("llama", "gemma3")}


def _graphs_and_eager_calls(model: PreTrainedModel) -> tuple[int, int]:
    row = next(c for c in cp.report(model).components if c.role == "decoder")
    return row.graphs, row.eager_calls


@torch.no_grad()
def _run(model: PreTrainedModel, ids: torch.Tensor, cache: Cache, eagerly: Sequence[bool], between: Any) -> list[Any]:
    """Logits of every chunk; ``eagerly`` says which calls go past the policy."""
    logits, start = [], 0
    for step, length in enumerate(_chunks("mixed")):
        is_eager = eagerly[step % len(eagerly)]
        with cp.eager(model) if is_eager else nullcontext():
            piece = ids[:, start : start + length]
            logits.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
        start += length
        between(step, cache)
    return logits


def _nothing(step: int, cache: Cache) -> None:
    return None


def _crop(step: int, cache: Cache) -> None:
    if step == 1:
        cache.crop(-2)


def _reorder(step: int, cache: Cache) -> None:
    cache.reorder_cache(torch.tensor([1, 0, 1]))


PATTERNS = {
    "compiled": [False],
    "prefill eager": [True] + [False] * TOTAL,
    "prefill compiled": [False] + [True] * TOTAL,
    "in turn": [False, True],
}
BETWEEN = {"nothing": _nothing, "crop": _crop, "reorder": _reorder}
FORMS = [
    (model_type, kind, pattern, between)
    for model_type, kind, pattern, between in itertools.product(("llama", "gemma3"), KINDS, PATTERNS, BETWEEN)
    if between != "crop" or (model_type, kind) == ("llama", "dynamic")  # the others cannot be cropped
]


@pytest.mark.parametrize(("model_type", "kind", "pattern", "between"), FORMS)
def test_switching_in_mid_sequence(
    models: dict[str, PreTrainedModel], model_type: str, kind: str, pattern: str, between: str
) -> None:
    """Compiled and eager calls share one cache in any order, also when it is cropped or reordered in between."""
    model = models[model_type]
    ids = tiny_inputs(model, text_len=TOTAL, batch=3)["input_ids"]
    config = model.config.get_text_config()
    want_cache, got_cache = _new_cache(kind, config), _new_cache(kind, config)
    want = _run(model, ids, want_cache, [True], BETWEEN[between])
    got = _run(model, ids, got_cache, PATTERNS[pattern], BETWEEN[between])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    for mine, stock in zip(got_cache.layers, want_cache.layers, strict=True):
        assert int(mine.get_seq_length()) == int(stock.get_seq_length())
        torch.testing.assert_close(mine.keys, stock.keys, atol=1e-4, rtol=1e-3)
    assert _graphs_and_eager_calls(model)[1] == 0


def test_one_graph_per_cache_kind(models: dict[str, PreTrainedModel]) -> None:
    """Caches of other lengths, batches and fillings need no further graph: one for dynamic, one for static."""
    for model in models.values():
        config = model.config.get_text_config()
        for length, batch in ((24, 1), (31, 2), (TOTAL, 4)):
            ids = tiny_inputs(model, text_len=20, batch=batch)["input_ids"]
            for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=length)):
                with torch.no_grad():
                    model(input_ids=ids, past_key_values=cache, use_cache=True)
                    model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        assert _graphs_and_eager_calls(model) == (2, 0)


def test_the_callers_cache_comes_back(models: dict[str, PreTrainedModel]) -> None:
    """The output holds the very cache that was passed; without one, a new DynamicCache of the usual class."""
    model = models["llama"]
    ids = tiny_inputs(model, text_len=6)["input_ids"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        assert model(input_ids=ids, past_key_values=cache).past_key_values is cache
        made = model(input_ids=ids).past_key_values
    assert type(made) is DynamicCache and made.get_seq_length() == 6


def test_a_cache_can_be_reset_and_used_again(models: dict[str, PreTrainedModel]) -> None:
    """`reset` between two sequences leaves nothing of the first behind."""
    for model in models.values():
        config = model.config.get_text_config()
        ids = tiny_inputs(model, text_len=20)["input_ids"]
        for kind in KINDS:
            cache = _new_cache(kind, config)
            with torch.no_grad():
                want = model(input_ids=ids, past_key_values=cache).logits
                cache.reset()
                got = model(input_ids=ids, past_key_values=cache).logits
            assert torch.equal(got, want)


@pytest.mark.parametrize("model_type", ["llama", "gemma3"])
def test_copied_caches(models: dict[str, PreTrainedModel], model_type: str) -> None:
    """A cache that came out of a graph can be copied, and all copies go on by themselves.

    The first call of a form may be the component's own, which the graph's differ from by rounding.
    """
    model = models[model_type]
    ids = tiny_inputs(model, text_len=18)["input_ids"]
    for kind in KINDS:
        cache = _new_cache(kind, model.config.get_text_config())
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
            other, third = copy.deepcopy(cache), copy.deepcopy(cache)
            first = model(input_ids=ids[:, :3], past_key_values=cache).logits
            second = model(input_ids=ids[:, :3], past_key_values=other).logits
            again = model(input_ids=ids[:, :3], past_key_values=third).logits
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)
        assert torch.equal(second, again)


def test_a_changed_mask_counts_in_mid_sequence(models: dict[str, PreTrainedModel]) -> None:
    """Another 2D mask in the next decode step is obeyed, and so is a cache whose tensors were replaced or edited."""
    model = models["llama"]
    inputs = tiny_inputs(model, text_len=10, batch=2)
    ids, token = inputs["input_ids"], inputs["input_ids"][:, -1:]
    usual, other = torch.ones(2, 12, dtype=torch.long), torch.ones(2, 12, dtype=torch.long)
    usual[1, :4] = other[1, :4] = 0  # left padding
    other[:, 5:8] = 0

    @torch.no_grad()
    def steps(mask: torch.Tensor, edit: Any) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        model(input_ids=ids, attention_mask=usual[:, :10], past_key_values=cache)
        model(input_ids=token, attention_mask=usual[:, :11], past_key_values=cache)
        edit(cache)
        return model(input_ids=token, attention_mask=mask, past_key_values=cache).logits

    def replace(cache: Cache) -> None:
        cache.layers[0].values = cache.layers[0].values.flip(0)

    def edit(cache: Cache) -> None:
        cache.layers[0].values.mul_(2)

    results = []
    for mask, change in ((usual, lambda _: None), (other, lambda _: None), (usual, replace), (usual, edit)):
        with cp.eager(model):
            want = steps(mask, change)
        got = steps(mask, change)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
        results.append(got)
    results.append(steps(torch.ones_like(usual), lambda _: None))
    assert all(not torch.allclose(results[0], r, atol=1e-2) for r in results[1:]), "the changes make no difference"


@pytest.mark.parametrize(
    ("model_type", "kind", "most"),
    [("qwen3_5", "dynamic", 1), ("qwen3_5", "static", 1), ("jamba", "dynamic", 1), ("dots3_note", "dynamic", 3)],
)
def test_caches_with_other_states(model_type: str, kind: str, most: int) -> None:
    """Linear attention and indexers: chunks and tokens, a cache that is copied, one that is reset."""
    model = cp.apply(tiny_model(model_type), cp.CompilationConfig(backend="eager"))
    ids = tiny_inputs(model, text_len=14, batch=2, images=())["input_ids"]
    pieces = (ids[:, :6], ids[:, 6:7], ids[:, 7:13], ids[:, 13:])

    @torch.no_grad()
    def run() -> list[torch.Tensor]:
        cache = _new_cache(kind, model.config.get_text_config())
        logits = [model(input_ids=piece, past_key_values=cache).logits for piece in pieces[:2]]
        copied = copy.deepcopy(cache)
        logits += [model(input_ids=piece, past_key_values=c).logits for piece in pieces[2:] for c in (cache, copied)]
        cache.reset()
        logits += [model(input_ids=piece, past_key_values=cache).logits for piece in pieces]
        return logits

    with cp.eager(model):
        want = run()
    got = run()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    graphs, eager_calls = _graphs_and_eager_calls(model)
    assert graphs <= most and eager_calls == 0  # more than one is what an indexer asks of sizes
