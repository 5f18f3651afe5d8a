"""Towers whose pictures have sizes of their own: one graph over all counts and sizes, equal to eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from transformers import PreTrainedModel

import compile_policy as cp
from compile_policy_transformers import compat, stacks
from compile_policy_transformers.applying import binder_for
from compile_policy_transformers.multimodal import find_encoders
from compile_policy_transformers.stack_calls import StackBinder
from compile_policy_transformers.stacks import stacks_of
from compile_policy_transformers.tiny import tiny_inputs, tiny_model
from compile_policy_transformers.vision import EncoderBinder

#: Compiled whole, with grids that only the right merge divides, or layouts computed inside sub-modules.
WHOLE = ("paddleocr_vl", "kimi_k25", "muse_glimmer", "muse_spark", "minimax_m3_vl", "inkling2", "minicpm_ocr")
WHOLE_TOO = ("minicpmv4_6", "minicpmv4_7")
#: Compiled from their layers on.
STACKS = ("lighton_ocr", "pix2struct", "lfm2_vl", "gemma4", "diffusion_gemma", "mllama", "hunyuan_vl", "lfm3_vl")
STACKS_TOO = ("kosmos-2.5", "nemotron_h_omni", "video_llama_3", "cosmos3_edge")
FAST = ("paddleocr_vl", "mistral3", "lighton_ocr", "pix2struct", "lfm2_vl", "lfm3_vl")
PICTURES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((56, 84),),
    ((56, 84), (56, 56)),
    ((56, 56), (84, 56), (56, 112)),
    ((84, 140),),
)

pytestmark = pytest.mark.filterwarnings("ignore::compile_policy.errors.PolicyWarning")


def _tower_calls(model: PreTrainedModel) -> tuple[nn.Module, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The image tower, and how the model calls it for several sets of pictures."""
    tower = next(f.module for f in find_encoders(model) if "image" in f.modalities)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    requests = [tiny_inputs(model, text_len=8, images=sizes, seed=seed) for seed, sizes in enumerate(PICTURES)]
    handle = tower.register_forward_pre_hook(lambda _, a, k: calls.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        for inputs in requests:
            model(**inputs)
    handle.remove()
    return tower, calls


def _tensors(out: Any) -> list[torch.Tensor]:
    parts = out if isinstance(out, (tuple, list)) else out.values() if hasattr(out, "values") else [out]
    inner = [q for p in parts if isinstance(p, tuple) for q in p]  # hidden states; None where they were not asked for
    return [p for p in [*parts, *inner] if isinstance(p, torch.Tensor)]


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(m, marks=() if m in FAST else pytest.mark.slow) for m in (*WHOLE, *WHOLE_TOO, *STACKS, *STACKS_TOO)],
)
def test_one_graph_for_all_sizes(model_type: str) -> None:
    """1, 2 and 3 pictures of mixed sizes, and a larger one: one graph, eager's features, no eager call."""
    model = tiny_model(model_type)
    tower, calls = _tower_calls(model)
    torch._dynamo.reset()
    with torch.no_grad():
        want = [_tensors(tower(*a, **k)) for a, k in calls]
        cp.apply(model, cp.CompilationConfig(backend="eager", compile_mm_encoder=True))
        for (a, k), features in zip(calls, want, strict=True):
            for got, expected in zip(_tensors(tower(*a, **k)), features, strict=True):
                torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
    rows = [r for r in cp.report(model).components if r.role == "encoder[image]" and r.decision == "compile"]
    assert rows
    assert {(r.fallback, r.graphs, r.calls, r.eager_calls) for r in rows} == {(None, 1, len(calls), 0)}


@pytest.mark.parametrize("model_type", ["lighton_ocr", "lfm2_vl"])
def test_masks_matter(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack that ignored the mask between pictures, or over padding, would be found out: it would run eager."""
    bind = StackBinder.bind

    def unmasked(self: StackBinder, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("attention_mask") is not None:
            kwargs = {**kwargs, "attention_mask": torch.ones_like(kwargs["attention_mask"])}
        return bind(self, module, args, kwargs)

    model = tiny_model(model_type)
    tower, calls = _tower_calls(model)
    torch._dynamo.reset()
    monkeypatch.setattr(StackBinder, "bind", unmasked)
    with torch.no_grad():
        args, kwargs = calls[2]
        want = _tensors(tower(*args, **kwargs))
        cp.apply(model, cp.CompilationConfig(backend="eager", compile_mm_encoder=True))
        for got, expected in zip(_tensors(tower(*args, **kwargs)), want, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
    row = next(r for r in cp.report(model).components if r.role == "encoder[image]" and r.decision == "compile")
    assert row.eager_calls == 1 and "differs from eager" in str(row.fallback)


def test_asked_for_hidden_states() -> None:
    """What the layers compute is inside the graph: a call that asks for it runs eager and gets it."""
    model = tiny_model("lighton_ocr")
    tower, calls = _tower_calls(model)
    args, kwargs = calls[0]
    with torch.no_grad():
        want = tower(*args, **kwargs, output_hidden_states=True).hidden_states
        cp.apply(model, cp.CompilationConfig(backend="eager", compile_mm_encoder=True))
        got = tower(*args, **kwargs, output_hidden_states=True).hidden_states
    assert not compat.collects_outputs()
    assert len(got) == len(want) > 1 and all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    row = next(r for r in cp.report(model).components if r.role == "encoder[image]" and r.decision == "compile")
    assert row.eager_calls == 1 and "outputs of its layers" in str(row.fallback)
    with torch.no_grad():  # Transformers has left its hooks on the layers
        got = tower(*args, **kwargs)
    torch.testing.assert_close(got.last_hidden_state, want[-1], atol=1e-4, rtol=1e-3)
    row = next(r for r in cp.report(model).components if r.role == "encoder[image]" and r.decision == "compile")
    assert (row.graphs, row.calls, row.eager_calls) == (1, 2, 1)


@pytest.mark.parametrize(
    ("model_type", "place"), [("hunyuan_vl", "HunYuanVLVisionTransformer"), ("lfm3_vl", "Lfm3VlVisionModel")]
)
def test_one_picture_after_another(model_type: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower that goes through its pictures in Python, and whose layers are no chain, runs eager; the line is named,
    and looked for only once."""
    monkeypatch.setattr(stacks, "chain_name", lambda tower: None)
    model = tiny_model(model_type)
    tower, calls = _tower_calls(model)
    with torch.no_grad():
        want = [_tensors(tower(*a, **k)) for a, k in calls]
        cp.apply(model, cp.CompilationConfig(backend="eager", compile_mm_encoder=True))
        for (a, k), features in zip(calls, want, strict=True):
            assert all(torch.equal(g, w) for g, w in zip(_tensors(tower(*a, **k)), features, strict=True))
    row = next(r for r in cp.report(model).components if r.role == "encoder[image]")
    assert (row.graphs, row.eager_calls) == (0, len(calls))
    assert f"one by one in Python: {place}, modeling_{model_type}.py:" in str(row.fallback)
    assert ".tolist()" in str(row.fallback)


def test_last_hidden_state() -> None:
    """A tower that asks for the last of its hidden states gets its last one, also where the stack runs eager."""
    model = tiny_model("mistral3")
    tower, calls = _tower_calls(model)
    assert {k["output_hidden_states"] for _, k in calls} == {-1}
    args, kwargs = calls[1]
    with torch.no_grad():
        want = tower(*args, **kwargs)
        cp.apply(model, cp.CompilationConfig(backend="eager", compile_mm_encoder=True))
        compiled = [tower(*args, **kwargs) for _ in range(2)]  # the first one is compared with eager on the way
        with cp.eager(model):
            plain = tower(*args, **kwargs)
    for got in (*compiled, plain):
        assert len(got.hidden_states) == len(want.hidden_states)
        torch.testing.assert_close(got.hidden_states[-1], want.hidden_states[-1], atol=1e-4, rtol=1e-3)
        assert not torch.equal(got.hidden_states[-1], torch.zeros_like(got.hidden_states[-1]))
    assert compat.ties_last_state(tower) and not compat.ties_last_state(tiny_model("lfm2_vl").get_encoder("image"))


def test_plan_names_the_stack() -> None:
    """The plan says that the tower is eager, why, and what is compiled in its place; without the flag nothing is."""
    model = tiny_model("lighton_ocr")
    rows = cp.plan(model, config=cp.CompilationConfig(compile_mm_encoder=True)).components
    tower, stack = (c for c in rows if c.role == "encoder[image]")
    assert (tower.decision, stack.decision) == ("eager", "compile")
    assert stack.qualname == f"{tower.qualname}.transformer"
    assert "its layers" in tower.reason
    assert [c.decision for c in cp.plan(model).components if c.role == "encoder[image]"] == ["eager"]


def test_ordinary_towers_stay_whole() -> None:
    """Towers over pictures of one size, and those whose layout is computed beforehand, are not taken apart."""
    for model_type in ("llava", "qwen2_5_vl", "paddleocr_vl"):
        tower = tiny_model(model_type).get_encoder("image")
        assert stacks_of(tower) == [] and isinstance(binder_for("encoder[image]", tower), EncoderBinder)


def test_a_tower_that_calls_its_pictures_hidden_states_is_no_stack() -> None:
    """florence2's backbone takes pictures under that name; it is compiled whole, one graph for any number of them."""
    model = tiny_model("florence2")
    tower, calls = _tower_calls(model)
    assert stacks_of(tower) == [] and isinstance(binder_for("encoder[image]", tower), EncoderBinder)
    cp.apply(model, cp.CompilationConfig(backend="eager", compile_mm_encoder=True))
    with torch.no_grad():
        for args, kwargs in calls:
            want = _tensors(tower.forward(*args, **kwargs))
            assert all(
                torch.allclose(a, b, atol=1e-5) for a, b in zip(_tensors(tower(*args, **kwargs)), want, strict=True)
            )
    row = next(c for c in cp.report(model).components if c.role == "encoder[image]")
    assert (row.graphs, row.eager_calls) == (1, 0)
