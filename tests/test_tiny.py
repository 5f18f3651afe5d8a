"""Tiny models build without a download, run, and are sensitive to what a parity check must notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from compile_policy_transformers import compat
from compile_policy_transformers.tiny import known_model_types, tiny_inputs, tiny_model

GRID = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "exaone4_5", "qwen3_5", "glm4v", "glm_ocr")
FIXED = ("llava", "gemma3")
TEXT = ("llama", "qwen3", "gemma2")
PICTURES = [(56, 84), (56, 56)]


def _inputs(model: PreTrainedModel, model_type: str, **kwargs: Any) -> dict[str, Any]:
    return tiny_inputs(model, text_len=14, images=() if model_type in TEXT else PICTURES, batch=2, **kwargs)


@torch.no_grad()
def _last(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs).logits[:, -1]


@pytest.mark.parametrize("model_type", GRID + FIXED + TEXT)
def test_negative_controls(model_type: str) -> None:
    """A blank picture and an ignored padding mask change logits and greedy tokens clearly."""
    model = tiny_model(model_type)
    inputs = _inputs(model, model_type)
    logits = _last(model, inputs)
    spread = logits.std()
    tokens = model.generate(**inputs, max_new_tokens=8)
    assert tokens.shape == (2, inputs["input_ids"].shape[1] + 8)
    assert 0.2 < spread < 8, "logits are flat or saturated"
    unmasked = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
    assert (_last(model, unmasked)[1] - logits[1]).abs().max() > 0.1 * spread
    assert not torch.equal(model.generate(**unmasked, max_new_tokens=8), tokens)
    if model_type not in TEXT:
        blank = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
        assert (_last(model, blank) - logits).abs().amax(dim=1).min() > 0.1 * spread
        assert not torch.equal(model.generate(**blank, max_new_tokens=8), tokens)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "llava", "llama"])
def test_same_seed_same_model_and_inputs(model_type: str) -> None:
    """Weights and inputs follow from their seeds alone."""
    torch.manual_seed(1)
    first = tiny_model(model_type, seed=3)
    torch.manual_seed(2)
    second, other = tiny_model(model_type, seed=3), tiny_model(model_type, seed=4)
    inputs, again = _inputs(first, model_type, seed=5), _inputs(second, model_type, seed=5)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    assert torch.equal(_last(first, inputs), _last(second, inputs))
    assert not torch.allclose(_last(first, inputs), _last(other, inputs))


def test_model_is_small_and_ready() -> None:
    """Evaluation mode, float32, less than a million parameters, special tokens inside the vocabulary."""
    model = tiny_model("qwen2_5_vl")
    assert not model.training and model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert model.config.image_token_id < model.config.get_text_config().vocab_size


@pytest.mark.parametrize("model_type", ["gemma3", "exaone4_5", "gemma2"])
def test_sliding_window_is_crossed(model_type: str) -> None:
    """Both kinds of layers are there, and a short prompt is longer than the window."""
    config = tiny_model(model_type).config.get_text_config()
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert config.sliding_window <= 16


def test_rows_are_padded_on_the_left_by_different_lengths() -> None:
    """Each row after the first is shorter, and padding comes first."""
    mask = tiny_inputs(tiny_model("llama"), text_len=12, batch=3)["attention_mask"]
    assert mask.sum(1).tolist() == [12, 6, 4]
    assert (mask.diff(dim=1) >= 0).all()


def test_image_sizes_are_followed() -> None:
    """Grids and placeholders follow height and width; 28 pixels are one token for a patch of 14 merged by two."""
    inputs = tiny_inputs(tiny_model("qwen2_5_vl"), text_len=8, images=[(56, 84), (29, 27)])
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6], [1, 2, 2]]
    assert inputs["mm_token_type_ids"].sum() == 6 + 1
    assert inputs["pixel_values"].shape[0] == 24 + 4


@pytest.mark.parametrize(
    ("model_type", "runs"),
    [
        ("qwen2_5_vl", 1),  # all steps in time after one another
        ("qwen3_vl", 3),  # each with the time before it
        ("glm4v", 3),  # written with the token of pictures, between markers of a video
        ("gemma4", 1),
        ("llava_onevision", 1),
        ("molmo2", 1),  # has one token for both
    ],
)
@torch.no_grad()
def test_videos(model_type: str, runs: int) -> None:
    """Placeholders stand as the architecture reads them, every one finds its feature, and a blank video shows."""
    model = tiny_model(model_type)
    inputs = tiny_inputs(model, text_len=12, videos=[(6, 56, 84)], batch=2)
    logits = _last(model, inputs)
    blank = {**inputs, "pixel_values_videos": torch.zeros_like(inputs["pixel_values_videos"])}
    assert (_last(model, blank) - logits).abs().amax(dim=1).min() > 0.1 * logits.std()
    if "mm_token_type_ids" in inputs:
        marks = inputs["mm_token_type_ids"][0]
        assert set(marks.tolist()) == {0, 2}
        assert ((marks == 2).int().diff() == 1).sum() == runs


def test_video_sizes_are_followed() -> None:
    """Two frames are one step in time; 28 pixels are one token."""
    inputs = tiny_inputs(tiny_model("qwen2_5_vl"), text_len=8, images=[(28, 28)], videos=[(4, 56, 84), (3, 28, 56)])
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 6], [1, 2, 4]]
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 2]]
    assert inputs["mm_token_type_ids"].tolist()[0].count(2) == 2 * 6 + 2
    assert inputs["pixel_values_videos"].shape[0] == 48 + 8


@pytest.mark.parametrize(("model_type", "remedy"), [("llama", ""), ("instructblipvideo", "give them as images")])
def test_videos_for_a_model_without_are_refused(model_type: str, remedy: str) -> None:
    """A model that takes none says so; one whose pictures are clips says that."""
    images = [(56, 56)] if remedy else []
    with pytest.raises(ValueError, match=f"takes no videos.*{remedy}"):
        tiny_inputs(tiny_model(model_type), text_len=8, images=images, videos=[(4, 56, 56)])


def test_unknown_model_type_names_near_matches() -> None:
    """The error offers what was probably meant."""
    with pytest.raises(ValueError, match="qwen2_5_vl"):
        tiny_model("qwen2_5_v")


def test_images_for_a_text_model_are_refused() -> None:
    """A text-only model says so."""
    with pytest.raises(ValueError, match="no images"):
        tiny_inputs(tiny_model("llama"), text_len=8, images=[(56, 56)])


def test_missing_image_is_refused() -> None:
    """A model that cannot do without a picture says so, instead of failing inside."""
    with pytest.raises(ValueError, match="needs an image"):
        tiny_inputs(tiny_model("blip"), text_len=8)


def test_known_types_cover_transformers() -> None:
    """Image-text, audio and text-only architectures are known by their model types."""
    assert {"qwen2_5_vl", "qwen2_audio", "llama"} <= set(known_model_types())


IMAGE_TEXT = tuple(compat.model_class_names("IMAGE_TEXT_TO_TEXT"))
OMNI = tuple(compat.model_class_names("MULTIMODAL_LM").keys() - set(IMAGE_TEXT))
SOUND_ONLY = {"kyutai_speech_to_text", "voxtral_realtime"}  # forward takes no text without sound
NO_FORWARD = {"qwen2_5_omni", "qwen3_omni_moe"}  # an omni model as a whole only generates; its thinker is listed too


def _takes_pictures(model: PreTrainedModel) -> bool:
    return bool({"image", "video"} & set(model.input_modalities))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", IMAGE_TEXT)
def test_every_image_text_architecture_runs(model_type: str) -> None:
    """It builds, is sensitive to the picture, and generates four tokens from pictures and padded text."""
    model = tiny_model(model_type)
    pictures = PICTURES if _takes_pictures(model) else []
    inputs = tiny_inputs(model, text_len=14, images=pictures, batch=2)
    with torch.no_grad():
        outputs = model(**inputs)
    pixels = next((name for name in ("pixel_values", "flattened_patches") if name in inputs), None)
    if model_type == "pi0":  # actions, not tokens
        assert torch.isfinite(outputs.loss if outputs.loss is not None else outputs[0]).all()
        return
    assert torch.isfinite(outputs.logits).all()
    if pixels is not None:
        # not zeros: some processors' padding pictures are zeros, and models drop those
        other = torch.cat([inputs[pixels][..., :2], torch.full_like(inputs[pixels][..., 2:], 0.1)], dim=-1)
        with torch.no_grad():
            changed = model(**{**inputs, pixels: other}).logits
        spread = outputs.logits[outputs.logits > -1e4].std()  # chameleon forbids image tokens by the lowest float
        assert (changed - outputs.logits).abs().max() > 0.1 * spread
    assert model.generate(**inputs, max_new_tokens=4) is not None


@pytest.mark.slow
@pytest.mark.parametrize("model_type", OMNI)
def test_audio_and_omni_architectures_run_on_text(model_type: str) -> None:
    """They build, and those that can do without sound generate four tokens from padded text."""
    model = tiny_model(model_type)
    if model_type in SOUND_ONLY | NO_FORWARD:
        return
    inputs = tiny_inputs(model, text_len=14, batch=2)
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
    assert model.generate(**inputs, max_new_tokens=4).shape == (2, 18)
