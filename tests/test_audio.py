"""Encoders of sound: one graph for every number and length of pieces, equal to eager."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import compile_policy as cp
from compile_policy_transformers import audio, sound_examples
from compile_policy_transformers.base import find_components
from compile_policy_transformers.origins import Derived, origin
from compile_policy_transformers.prologue import Prologue
from compile_policy_transformers.tiny import tiny_inputs, tiny_model
from compile_policy_transformers.tiny.sounds import SOUNDS

#: Masked pieces; packed chunks with layout functions; chunks counted on a mask; one length only; a remainder of
#: frames; a cache of paddings.
FAST = ("fun_asr_nano", "qwen2_5_omni_thinker", "qwen3_asr", "voxtral", "granite_speech", "vibevoice_asr")
MORE = (
    *("dots3_note", "glmasr", "inkling_mm_model", "moss_transcribe_diarize", "qwen2_audio", "qwen3_omni_moe_thinker"),
    *("gemma4", "granite_speech_plus", "muse_spark", "nemo_speechlm", "phi4_multimodal"),
)
LENGTHS = (((40,), 1), ((72, 37), 2), ((130,), 3), ((24, 105, 61), 1))
INPUTS = (*FAST, *MORE, "gemma4_unified")

pytestmark = pytest.mark.filterwarnings("ignore::compile_policy.errors.PolicyWarning")


def _some(fast: tuple[str, ...], names: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("model_type", _some(FAST[:2], INPUTS))
def test_sound_reaches_the_model(model_type: str) -> None:
    """Silence changes the logits clearly, and four tokens are generated from sound and padded text."""
    model = tiny_model(model_type)
    inputs = tiny_inputs(model, text_len=9, sounds=(64, 37), batch=2)
    name = next(name for name in SOUNDS if name in inputs)
    logits = []
    for sound in (inputs[name], torch.zeros_like(inputs[name])):
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # vibevoice adds noise
            torch.manual_seed(0)
            logits.append(model(**{**inputs, name: sound}).logits)
    assert (logits[0] - logits[1]).abs().max() > 0.1 * logits[0].abs().max()
    length = inputs["input_ids"].shape[1]
    assert model.generate(**inputs, max_new_tokens=4, min_new_tokens=4).shape == (2, length + 4)


def test_models_that_do_not_hear_say_so() -> None:
    """Sound for a model that takes none is the caller's mistake."""
    with pytest.raises(ValueError, match="takes no sound"):
        tiny_inputs(tiny_model("llama"), text_len=9, sounds=(40,))


def _tower_calls(model: PreTrainedModel) -> tuple[nn.Module, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    tower = next(f.module for f in find_components(model) if f.role == "encoder[audio]")
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    with torch.no_grad():
        batches = [tiny_inputs(model, text_len=9, sounds=sounds, batch=batch) for sounds, batch in LENGTHS]
        handle = tower.register_forward_pre_hook(lambda _, a, k: calls.append((a, dict(k))), with_kwargs=True)
        for inputs in batches:
            model(**inputs)
    handle.remove()
    return tower, calls


def _features(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else next(v for v in out.values() if isinstance(v, torch.Tensor))


def _run(
    model: PreTrainedModel,
    tower: nn.Module,
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]],
    backend: Literal["eager", "inductor"] = "eager",
) -> Any:
    """Run eager and compiled, compare, and give the report's row of the tower."""
    torch._dynamo.reset()
    with torch.no_grad():
        want = [_features(tower(*a, **k)) for a, k in calls]
        cp.apply(model, cp.CompilationConfig(backend=backend, compile_mm_encoder=True))
        for (a, k), features in zip(calls, want, strict=True):
            room = 1e-4 * max(1.0, float(features.abs().max()))
            torch.testing.assert_close(_features(tower(*a, **k)), features, atol=room, rtol=1e-3)
    return next(row for row in cp.report(model).components if row.role == "encoder[audio]")


@pytest.mark.parametrize("model_type", _some(FAST, (*FAST, *MORE)))
def test_one_graph_for_all_lengths(model_type: str) -> None:
    """One piece and many, short ones and ones of several chunks: one graph, eager's features, no eager call."""
    model = tiny_model(model_type)
    tower, calls = _tower_calls(model)
    row = _run(model, tower, calls)
    assert (row.fallback, row.graphs, row.calls, row.eager_calls) == (None, 1, len(calls), 0)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["granite_speech", "vibevoice_asr"])
def test_one_graph_through_inductor(model_type: str) -> None:
    """The same with lowered code, on other lengths as well: multiples of a block, and one beside them."""
    model = tiny_model(model_type)
    tower, calls = _tower_calls(model)
    (sound,), named = calls[1]
    for frames in (24, 25, 35, 36):
        calls.append(((sound.narrow(sound.shape.index(72), 0, frames)[: 1 + frames % 2],), named))
    row = _run(model, tower, calls, "inductor")
    assert (row.fallback, row.graphs, row.eager_calls) == (None, 1, 0)


@pytest.mark.slow
def test_long_sound_in_chunks() -> None:
    """A tower that encodes long sound chunk by chunk has a graph for each number of chunks, not for each length."""
    model = tiny_model("nemo_speechlm")
    tower, calls = _tower_calls(model)
    for config in (tower.config.diarization_config, tower.diarization_model.config):  # type: ignore[union-attr]
        config.chunk_length, config.chunk_left_context, config.chunk_right_context = 9, 3, 2  # type: ignore[union-attr]
    row = _run(model, tower, calls)  # 5, 9, 17 and 14 frames
    assert row.eager_calls == 0 and row.graphs <= 3


def test_lengths_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layout of other lengths than the call's would be found out: the call would run eager."""
    run = Prologue.run

    def of_one_piece(self: Prologue, values: Any) -> dict[str, Any]:
        layout = run(self, values)
        ends = layout["cu_seqlens"]
        return {**layout, "cu_seqlens": torch.cat([ends[:1], ends[-1:]])}

    model = tiny_model("qwen2_5_omni_thinker")
    tower, calls = _tower_calls(model)
    torch._dynamo.reset()
    monkeypatch.setattr(Prologue, "run", of_one_piece)
    row = _run(model, tower, calls[2:3])
    assert row.eager_calls == 1 and "differs from eager" in str(row.fallback)


def test_frames_are_found_by_trying() -> None:
    """Bins stay static, frames and their mask vary together; a tower for one length has no dynamic frames."""
    for model_type, frames in (("fun_asr_nano", {"input_features": 1, "input_features_mask": 1}), ("voxtral", {})):
        model = tiny_model(model_type)
        tower, calls = _tower_calls(model)
        binder = audio.SoundBinder(tower)
        with torch.no_grad():
            bound = binder.bind(tower, *calls[0])
        for name, value in bound.values.items():
            if isinstance(value, torch.Tensor):
                labels = bound.label(name, value)
                assert labels[0] == audio.PIECES
                assert [d for d, label in enumerate(labels) if label == sound_examples.FRAMES] == (
                    [frames[name]] if name in frames else []
                )


def test_what_is_counted_on_a_mask() -> None:
    """Frames of each piece, and of each chunk, are recognised as counts of a mask."""
    mask = (torch.arange(12) < torch.tensor([[12], [5]])).long()
    assert origin(torch.tensor([12, 5]), {"mask": mask}) == Derived("mask", summed=0)
    chunks = origin(torch.tensor([4, 4, 4, 4, 1, 0]), {"mask": mask})
    assert chunks == Derived("mask", summed=4)
    assert chunks is not None and chunks.of({"mask": mask[:, :8]}).tolist() == [4, 4, 4, 1]
    assert origin(torch.tensor([12, 4]), {"mask": mask}) is None
