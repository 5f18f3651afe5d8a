"""A decoder that calls another model before its layers: what comes before runs eager, the layers are one graph."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from calling_decoders import (
    PICTURE,
    CallsAmong,
    CallsBefore,
    MasksItself,
    RemembersAmong,
    WithoutNorms,
    model_with,
    small_config,
)
from falling import falls_back
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel, StaticCache
from transformers.models.evolla.modeling_evolla import EvollaSequenceAlignerCrossAttention

import compile_policy as cp
from compile_policy.options import RegionOptions
from compile_policy.region import Region, SignatureBinder, region_of
from compile_policy_transformers import aligners
from compile_policy_transformers.base import find_components
from compile_policy_transformers.components import meta_model
from compile_policy_transformers.forward_parts import parts_of
from compile_policy_transformers.indexers import fingerprint
from compile_policy_transformers.matrix import _cells
from compile_policy_transformers.matrix_requests import prompts_of
from compile_policy_transformers.split_labels import SplitLabels
from compile_policy_transformers.tiny import tiny_config, tiny_inputs, tiny_model

EAGER = cp.CompilationConfig(backend="eager")


def _decoder(model_type: str) -> nn.Module:
    return next(f.module for f in find_components(meta_model(tiny_config(model_type))) if f.role == "decoder")


def _requests() -> Iterator[dict[str, Any]]:
    """Pictures, none, and more rows with padding."""
    generator = torch.Generator().manual_seed(0)
    for rows, length, side in ((1, 9, 8), (2, 12, 8), (3, 7, 0), (1, 11, 12), (2, 5, 0)):
        ids = torch.randint(8, 60, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        if rows > 1:
            mask[0, :2] = 0
        given = {"input_ids": ids, "attention_mask": mask}
        if side:
            ids[:, 2 : 2 + (side // 4) ** 2] = PICTURE
            given["pixel_values"] = torch.randn(rows, 3, side, side, generator=generator)
        yield given


def _logits(model: LlamaForCausalLM, request: dict[str, Any], kind: str) -> list[torch.Tensor]:
    """Of a request and of three tokens after it; positions that are no padding."""
    cache: Any = None
    if kind != "none":
        cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=24)
    mask = request["attention_mask"]
    out = model(**request, past_key_values=cache, use_cache=cache is not None)
    logits = [out.logits[mask.bool()]]
    for _ in range(3 if cache is not None else 0):
        mask = nn.functional.pad(mask, (0, 1), value=1)
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
        logits.append(out.logits)
    return logits


@pytest.mark.parametrize(
    ("kind", "decoder"),
    [
        *((kind, CallsBefore) for kind in ("none", "dynamic", "static")),
        pytest.param("dynamic", MasksItself, marks=pytest.mark.slow),
    ],
)
def test_a_made_up_architecture(kind: str, decoder: type[LlamaModel]) -> None:
    """One graph for pictures and none, any batch and length, and equal to eager, although the tower reads values."""
    model = model_with(decoder)
    with torch.no_grad():
        want = [_logits(model, request, kind) for request in _requests()]
        cp.apply(model, EAGER)
        got = [_logits(model, request, kind) for request in _requests()]
    for mine, theirs in zip(got, want, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    row = next(c for c in cp.report(model).components if c.role == "decoder")
    assert (row.graphs, row.eager_calls) == (1, 0), row
    assert "its layers alone" in row.reason
    blank = [{**r, "pixel_values": torch.zeros_like(r["pixel_values"])} for r in _requests() if "pixel_values" in r]
    with torch.no_grad():  # the comparison would notice
        assert (_logits(model, blank[0], kind)[0] - want[0][0]).abs().max() > 0.1


def test_who_is_taken_apart() -> None:
    """Decoders that call a model before their layers, and no others."""
    for model_type in ("idefics", "phi4_multimodal", "chameleon", "evolla"):
        parts = parts_of(_decoder(model_type))
        assert parts is not None and "hidden_states" in parts.given & parts.used, model_type
    for model_type in ("llama", "llava", "udop", "mllama"):
        assert parts_of(_decoder(model_type)) is None, model_type
    assert parts_of(CallsBefore(small_config())) is not None
    assert parts_of(CallsAmong(small_config())) is None


def _decorated(function: Any) -> Any:
    return function


class _Short(CallsBefore):
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        hidden_states = self.eye(kwargs["pixel_values"])
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.norm(hidden_states)


def test_a_norm_in_the_last_line() -> None:
    """What is called in the line that returns belongs to the part behind."""
    parts = parts_of(_Short(small_config()))
    assert parts is not None and parts.given == {"hidden_states", "layer"} and parts.used == {"hidden_states"}


class _Returns(CallsBefore):
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        hidden_states = self.eye(kwargs["pixel_values"])
        if len(input_ids) == 1:
            return hidden_states
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.norm(hidden_states)


class _Decorated(CallsBefore):
    @_decorated
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        hidden_states = self.eye(kwargs["pixel_values"])
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.norm(hidden_states)


class _Super(CallsBefore):
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        hidden_states = super().forward(input_ids, **kwargs).last_hidden_state
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.norm(hidden_states)


@pytest.mark.parametrize("cls", [_Returns, _Decorated, _Super])
def test_forwards_that_stay_whole(cls: type[LlamaModel]) -> None:
    """A result before the layers, a decorator nobody knows, a closure: such a forward is no sum of its parts."""
    assert parts_of(cls(small_config())) is None


def test_a_forward_of_the_instance_stays_whole() -> None:
    """The parts are those of the class; what somebody put on the instance is another function."""
    decoder = CallsBefore(small_config())
    decoder.forward = decoder.forward  # type: ignore[method-assign]
    assert parts_of(decoder) is None


def test_the_parts_are_the_forward() -> None:
    """One after the other they do what the forward does, under the line numbers of its file."""
    decoder = model_with(CallsBefore).model
    parts = parts_of(decoder)
    assert parts is not None
    request = next(_requests())
    with torch.no_grad():
        want = decoder(**request, use_cache=False).last_hidden_state
        local = parts.before(decoder, **request, use_cache=False)
        out = parts.layers(decoder, **{name: local[name] for name in parts.given & local.keys()})
        left = {**local, **out}
        got = parts.behind(decoder, **{name: left[name] for name in parts.used & left.keys()}).last_hidden_state
    assert torch.equal(got, want)
    assert set(out) == {"hidden_states", "norms"}  # assigned, and a list that is appended to
    lines, first = inspect.getsourcelines(parts.forward)
    start = first + next(i for i, line in enumerate(lines) if "for layer in self.layers" in line)
    assert {line for _, _, line in parts.layers.__code__.co_lines() if line} >= {start, start + 1}


def test_a_call_that_asks_for_the_layers_outputs_runs_eager() -> None:
    """Hidden states and tuples are what eager gives, and the report says what to do without."""
    model = model_with(CallsBefore)
    request = next(_requests())
    with torch.no_grad():
        want = model(**request, output_hidden_states=True)
        cp.apply(model, EAGER)
        with falls_back("the outputs of its layers are asked for"):
            got = model(**request, output_hidden_states=True)
        assert len(got.hidden_states) == len(want.hidden_states) == 3
        for mine, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
            torch.testing.assert_close(mine, theirs)
        with falls_back("a tuple is asked for"):
            assert isinstance(model.model(**request, return_dict=False), tuple)
        row = next(c for c in cp.report(model).components if c.role == "decoder")
        assert row.graphs == 0 and row.eager_calls == 2
        model(**request)  # hooks that collect are installed by now
    row = next(c for c in cp.report(model).components if c.role == "decoder")
    assert row.graphs == 1 and row.eager_calls == 2


def test_a_forward_that_is_replaced_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody puts in place of the forward later, on the instance or the class, is what runs."""
    model = model_with(CallsBefore)
    request = next(_requests())
    with torch.no_grad():
        cp.apply(model, EAGER)
        before = model(**request).logits
        stock = CallsBefore.forward

        def other(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = stock(self, *args, **kwargs)
            out.last_hidden_state = out.last_hidden_state + 1
            return out

        with monkeypatch.context() as patch:
            patch.setitem(vars(model.model), "forward", lambda *args, **kwargs: other(model.model, *args, **kwargs))
            with falls_back("its forward was replaced"):
                changed = model(**request).logits
        with monkeypatch.context() as patch:
            patch.setattr(CallsBefore, "forward", other)
            again = model(**request).logits
        assert (changed - before).abs().max() > 0.1 and torch.equal(changed, again)
        torch.testing.assert_close(model(**request).logits, before)
    row = next(c for c in cp.report(model).components if c.role == "decoder")
    assert row.eager_calls == 2 and row.fallback == "its forward was replaced"


def test_gradients_reach_the_tower() -> None:
    """Training goes through the graph and what comes before it."""
    model = model_with(CallsBefore)
    request = next(_requests())
    found = []
    for compiled in (False, True):
        if compiled:
            cp.apply(model, EAGER)
        model.zero_grad()
        model(**request, use_cache=False).logits.square().mean().backward()
        found.append([p.grad.clone() for p in model.model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 20
    for mine, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    row = next(c for c in cp.report(model).components if c.role == "decoder")
    assert (row.graphs, row.eager_calls) == (1, 0), row


def test_few_layers_stand_for_all() -> None:
    """Of layers that do the same only the first are traced, as in any other decoder."""
    model = model_with(WithoutNorms, layers=6)
    request = next(_requests())
    request.pop("pixel_values")
    with torch.no_grad():
        want = model(**request).logits
        cp.apply(model, cp.CompilationConfig(backend="eager"))
        torch.testing.assert_close(model(**request).logits, want, rtol=1e-4, atol=1e-4)
    region = region_of(model.model)
    assert region is not None
    (entry,) = [e for found in region.entries.values() for e in found]
    assert "which stand for the others" in entry.graph.depth, entry.graph.depth


class _Counts(nn.Module):
    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        length = x.shape[0]
        length += seen  # a size and a tensor: another name for the sum, not another size
        return torch.arange(x.shape[0]) + x + length


def test_a_size_that_a_tensor_is_added_to() -> None:
    """The printed graph keeps the size: idefics adds the length of a static cache to that of its text."""
    binder = SignatureBinder({"x": {0: None}})
    region = Region(_Counts(), role="decoder", binder=binder, options=RegionOptions("eager"))
    region.attach()
    for length in (3, 5):
        x, seen = torch.randn(length), torch.tensor(4)
        assert torch.equal(region.module(x, seen), region.module.forward(x, seen))
    assert (region.graphs, region.eager_calls) == (1, 0), region.fallback


def test_labels_of_one_token_are_those_of_many() -> None:
    """What a single token leaves open is known from the call before; a size that is something else now is told anew."""
    labels = SplitLabels()
    many = {"x": torch.zeros(2, 9, 8), "seen": torch.zeros(2, 5, 8), "causal_mask": torch.ones(2, 1, 9, 5).bool()}
    label = labels.of(many, 2, 9, {id(many["causal_mask"])}, None)
    want = [("batch", "sequence", None), ("batch", "seen.1", None), ("batch", None, "sequence", "sequence")]
    assert [label(path, t) for path, t in many.items()] == want
    one = {"x": torch.zeros(1, 1, 8), "seen": torch.zeros(1, 1, 8), "causal_mask": torch.ones(1, 1, 1, 1).bool()}
    label = labels.of(one, 1, 1, {id(one["causal_mask"])}, None)
    assert [label(path, t) for path, t in one.items()] == want
    other = {"seen": torch.zeros(2, 7, 8), "x": torch.zeros(2, 4, 8)}
    label = labels.of(other, 2, 7, set(), None)
    assert label("seen", other["seen"]) == want[1] and label("x", other["x"]) == ("batch", "x.1", None)


def test_the_aligner_of_evolla() -> None:
    """The twin is written against the installed code, and gives what the stock layer gives, something seen or not."""
    assert fingerprint(EvollaSequenceAlignerCrossAttention.forward) == aligners._FORWARD
    decoder: Any = tiny_model("evolla").model
    layers = aligners.asking_layers(decoder)
    assert len(layers) == len(decoder.layers)
    layer, width = layers[0], decoder.config.hidden_size
    torch.manual_seed(0)
    text, states = torch.randn(2, 4, width), torch.randn(2, 3, width)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    for rows in (torch.tensor([True, True]), torch.tensor([True, False]), torch.tensor([False, False])):
        given: dict[str, Any] = {"query_attn_mask": mask, "protein_batch_mask": rows}
        given |= {"protein_kv_states": states, "structure_kv_states": None, "msa_kv_states": None}
        with torch.no_grad():
            want = layer(text, **given)
            with aligners.attending(layers):
                got = torch.compile(layer.forward, backend="eager", fullgraph=True)(text, **given)
        torch.testing.assert_close(got, want)
        assert torch.equal(want, text) == (not rows.any())
        torch._dynamo.reset()
    assert not any("forward" in vars(m) for m in layers)


def test_the_tower_of_phi4_calls_itself_causal() -> None:
    """Where no patch is padding, Transformers leaves its mask out, and SDPA is causal then: one graph for both."""
    model = tiny_model("phi4_multimodal")
    tower = model.get_submodule("model.embed_tokens_extend.image_embed.img_processor")
    torch.manual_seed(0)
    pixels, padded = torch.randn(3, 3, 56, 56), torch.ones(3, 4, 4, dtype=torch.bool)
    padded[1, :, 3:] = False
    masks = (padded, torch.ones_like(padded), padded[:1])
    with torch.no_grad():
        want = [tower(pixels[: len(m)], patch_attention_mask=m).last_hidden_state for m in masks]
        with pytest.warns(cp.PolicyWarning, match="experimental"):
            cp.apply(model, cp.CompilationConfig(backend="eager", compile_mm_encoder=True))
        got = [tower(pixels[: len(m)], patch_attention_mask=m).last_hidden_state for m in masks]
    assert (want[0][0] - want[1][0]).abs().max() > 0.1  # the same picture, its neighbour is padded
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    row = next(c for c in cp.report(model).components if "img_processor" in c.qualname)
    assert (row.graphs, row.eager_calls) == (1, 0), row


def test_pictures_of_phi4() -> None:
    """Crops of several pictures reach the tower and change what comes out, beside sound too."""
    model = tiny_model("phi4_multimodal")
    inputs = tiny_inputs(model, text_len=6, images=[(56, 56), (112, 56)], sounds=[40])
    assert inputs["image_pixel_values"].shape[:2] == (2, 3)
    blank = {**inputs, "image_pixel_values": torch.zeros_like(inputs["image_pixel_values"])}
    with torch.no_grad():
        assert (model(**inputs).logits - model(**blank).logits).abs().max() > 0.1


def _measured(model_type: str, kinds: tuple[str, ...], requests: int) -> None:
    model = tiny_model(model_type)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prompts = prompts_of(model)[:requests]
        for kind in kinds:
            cell = _cells(model, prompts, kind, {"decoder": ("decoder",)})["decoder"]
            assert (cell.state, cell.graphs, cell.eager_calls) == ("ok", 1, 0), (kind, cell)


@pytest.mark.parametrize(("model_type", "kind"), [("idefics", "static"), ("chameleon", "dynamic")])
def test_architectures(model_type: str, kind: str) -> None:
    """One graph, equal to eager."""
    _measured(model_type, (kind,), 2)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["idefics", "phi4_multimodal", "chameleon", "evolla"])
def test_architectures_with_every_cache(model_type: str) -> None:
    """One graph for all requests with each kind of cache."""
    _measured(model_type, ("none", "dynamic", "static"), 6)


@pytest.mark.slow
@pytest.mark.parametrize("backend_of", ["chameleon", "idefics"])
def test_real_code(backend_of: str) -> None:
    """Through Inductor too: tokens and logits are eager's, and the entry is found by the next one on disk."""
    model = tiny_model(backend_of)
    inputs = tiny_inputs(model, text_len=9, images=[(56, 56)])
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        want = model.generate(**inputs, **options)
        twin = copy.deepcopy(model)
        cp.apply(model, cp.CompilationConfig())
        assert torch.equal(model.generate(**inputs, **options), want)
        cp.apply(twin, cp.CompilationConfig())
        assert torch.equal(twin.generate(**inputs, **options), want)
    made, found = (next(c for c in cp.report(m).components if c.role == "decoder") for m in (model, twin))
    assert (made.graphs, made.eager_calls) == (1, 0), made
    assert (found.graphs, found.loaded, found.eager_calls) == (0, 1, 0), found


def test_a_tower_among_the_layers_stays_eager() -> None:
    """The plan names the line; a model that is no tower fails at its line, and eager answers."""
    found = next(f for f in find_components(model_with(CallsAmong)) if f.role == "decoder")
    assert "Eye" in found.obstacle and "calls it itself" in found.obstacle
    model = model_with(RemembersAmong)
    ids = torch.arange(8, 14)[None]
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        cp.apply(model, EAGER)
        with falls_back("before this line a model inside was called"):
            torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, want)
    row = next(c for c in cp.report(model).components if c.role == "decoder")
    assert row.eager_calls == 1 and row.fallback is not None
    assert "before this line a model inside was called" in row.fallback, row.fallback
