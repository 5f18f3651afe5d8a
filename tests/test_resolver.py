"""Components are found in the module tree, hold nothing foreign, and are on the path of a call."""

from __future__ import annotations

import copy

import pytest
import torch
from calling_decoders import CallsAmong, model_with
from torch import nn
from transformers import LlamaConfig, PreTrainedModel, Qwen2_5_VLConfig

from compile_policy.errors import UnsupportedModelError
from compile_policy_transformers import compat
from compile_policy_transformers.base import _get_decoder_cls, called_components, find_components
from compile_policy_transformers.components import RULES, Found, holds, meta_model
from compile_policy_transformers.forward_parts import parts_of
from compile_policy_transformers.multimodal import _get_encoder_cls
from compile_policy_transformers.tiny import known_model_types, tiny_config, tiny_inputs, tiny_model

LANGUAGE = "model.language_model"
EXPECTED = {  # model type: decoder, encoders (role, path, modalities), head
    "qwen2_vl": (LANGUAGE, [("encoder[image]", "model.visual", "image video")], "lm_head"),
    "qwen2_5_vl": (LANGUAGE, [("encoder[image]", "model.visual", "image video")], "lm_head"),
    "qwen3_vl": (LANGUAGE, [("encoder[image]", "model.visual", "image video")], "lm_head"),
    "llava": (LANGUAGE, [("encoder[image]", "model.vision_tower", "image")], "lm_head"),
    "gemma3": (LANGUAGE, [("encoder[image]", "model.vision_tower", "image")], "lm_head"),
    "exaone4_5": (LANGUAGE, [("encoder[image]", "model.visual", "image video")], "lm_head"),
    "qwen3_5": (LANGUAGE, [("encoder[image]", "model.visual", "image video")], "lm_head"),
    "glm4v": (LANGUAGE, [("encoder[image]", "model.visual", "image video")], "lm_head"),
    "glm_ocr": (LANGUAGE, [("encoder[image]", "model.visual", "image video")], "lm_head"),
    "llama": ("model", [], "lm_head"),
    "qwen3": ("model", [], "lm_head"),
    "gemma2": ("model", [], "lm_head"),
    # get_decoder() answers a causal language model, head included
    "llama4": ("language_model.model", [("encoder[image]", "vision_model", "image")], "language_model.lm_head"),
    "blip-2": ("language_model.model.decoder", [("encoder[image]", "vision_model", "image")], "language_model.lm_head"),
    "kosmos-2": ("text_model.model", [("encoder[image]", "vision_model", "image")], "text_model.lm_head"),
    "kosmos-2.5": ("text_model.model", [("encoder[image]", "vision_model", "image")], "text_model.lm_head"),
    "vision-encoder-decoder": (
        "decoder.bert",
        [("encoder[image]", "encoder", "image")],
        "decoder.cls.predictions.decoder",
    ),
    # get_decoder() answers a module with the vision tower inside, or one that is never called
    "git": ("git.encoder", [("encoder[image]", "git.image_encoder", "image")], "output"),
    "florence2": (f"{LANGUAGE}.decoder", [("encoder[image]", "model.vision_tower", "image")], "lm_head"),
    # get_encoder() answers the model itself, or an encoder that reads token ids too
    "fuyu": (LANGUAGE, [], "lm_head"),
    "pp_formulanet": ("model.decoder", [("encoder[image]", "model.encoder", "image")], "lm_head"),
    # the decoder answers its input embeddings when asked for its head
    "udop": ("decoder", [], "lm_head"),
    "t5gemma2": ("model.decoder", [("encoder[image]", "model.encoder.vision_tower", "image")], "lm_head.out_proj"),
    "granite_speech": (LANGUAGE, [("encoder[audio]", "model.encoder", "audio")], "lm_head"),
    "qwen2_audio": (LANGUAGE, [("encoder[audio]", "model.audio_tower", "audio")], "lm_head"),
    "qwen2_5_omni": (
        "thinker.model.language_model",
        [
            ("encoder[image]", "thinker.model.visual", "image video"),
            ("encoder[audio]", "thinker.model.audio_tower", "audio"),
        ],
        "thinker.lm_head",
    ),
    "video_llava": (
        LANGUAGE,
        [("encoder[image]", "model.image_tower", "image"), ("encoder[video]", "model.video_tower", "video")],
        "lm_head",
    ),
}


def _meta(model_type: str) -> PreTrainedModel:
    return meta_model(tiny_config(model_type))


def _assert_disjoint(found: list[Found]) -> None:
    clean = [f for f in found if not f.obstacle and parts_of(f.module) is None]
    for outer in clean:
        assert not [inner.qualname for inner in found if inner is not outer and holds(outer.module, inner.module)]


@pytest.mark.parametrize("model_type", EXPECTED)
def test_components(model_type: str) -> None:
    """Decoder, encoders with their modalities, and head are the expected modules; none holds another."""
    model = _meta(model_type)
    found = find_components(model)
    decoder, encoders, head = EXPECTED[model_type]
    assert [f.qualname for f in found if f.role == "decoder"] == [decoder]
    towers = [(f.role, f.qualname, " ".join(sorted(f.modalities))) for f in found if f.role.startswith("encoder")]
    assert towers == encoders
    assert [f.qualname for f in found if f.role == "head"] == [head]
    assert all(model.get_submodule(f.qualname) is f.module and not f.obstacle for f in found)
    _assert_disjoint(found)


def test_a_head_inside_the_decoders_forward() -> None:
    """pix2struct's decoder returns logits: by a rule it is compiled with its head, which is no component then."""
    found = find_components(_meta("pix2struct"))
    decoder = next(f for f in found if f.role == "decoder")
    assert decoder.qualname == "decoder" and not decoder.obstacle and hasattr(decoder.module, "lm_head")
    assert not [f for f in found if f.role == "head"]
    _assert_disjoint(found)


def test_a_head_that_is_called_decoder() -> None:
    """``get_decoder`` of modernbert-decoder answers the output projection; the model below is the decoder."""
    model = _meta("modernbert-decoder")
    found = {f.role: f.qualname for f in find_components(model)}
    assert model.get_decoder() is model.get_submodule("decoder")
    assert (found["decoder"], found["head"]) == ("model", "decoder")


def test_inseparable_decoder_says_why() -> None:
    """Where a tower is called among the layers themselves, the obstacle names it."""
    model = model_with(CallsAmong)
    decoder = next(f for f in find_components(model) if f.role == "decoder")
    assert "CallsAmong holds Eye" in decoder.obstacle
    with pytest.raises(UnsupportedModelError, match="CallsAmong holds Eye"):
        _get_decoder_cls(model)


@pytest.mark.parametrize(
    "model_type",
    ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "gemma3", "exaone4_5", "qwen3_5", "glm4v", "glm_ocr", "llama"],
)
def test_components_are_called(model_type: str) -> None:
    """A forward pass with a picture runs decoder, encoder and head."""
    model = tiny_model(model_type)
    found = [f for f in find_components(model) if f.role != "projector"]
    images = [] if model_type == "llama" else [(56, 84)]
    inputs = tiny_inputs(model, text_len=8, images=images)
    assert called_components(model, found, inputs) == {f.qualname for f in found}


def test_probe_notices_what_is_not_called() -> None:
    """Without a picture the tower is not on the path, and the probe says so and leaves no hook behind."""
    model = tiny_model("llava")
    found = find_components(model)
    called = called_components(model, found, tiny_inputs(model, text_len=8))
    assert called == {"model.language_model", "lm_head"}
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_classes_from_a_configuration_without_memory() -> None:
    """The full-size default configuration (tens of gigabytes) is resolved on the meta device."""
    config = Qwen2_5_VLConfig()
    before = copy.deepcopy(vars(config.text_config))
    assert _get_decoder_cls(config).__name__ == "Qwen2_5_VLTextModel"
    assert _get_encoder_cls(config, "image").__name__ == "Qwen2_5_VisionTransformerPretrainedModel"
    assert all(p.is_meta for p in meta_model(config).parameters())
    assert vars(config.text_config) == before
    assert torch.get_default_device().type == "cpu"


def test_checkpoint_names_its_class() -> None:
    """The class that a checkpoint's configuration names wins over the tables."""
    assert type(meta_model(LlamaConfig(num_hidden_layers=1, architectures=["LlamaModel"]))).__name__ == "LlamaModel"


def test_model_without_an_encoder() -> None:
    """Asking a text model for an encoder is an error with a remedy; so is a modality that doesn't exist."""
    with pytest.raises(UnsupportedModelError, match=r"no separate image encoder.*--compile-mm-encoder"):
        _get_encoder_cls(LlamaConfig(num_hidden_layers=1), "image")
    with pytest.raises(UnsupportedModelError, match="audio"):
        _get_encoder_cls(_meta("qwen2_5_vl"), "audio")
    with pytest.raises(ValueError, match="image, video, audio"):
        _get_encoder_cls(_meta("llama"), "picture")


def test_base_model_is_its_own_decoder() -> None:
    """A bare decoder has an empty path and no head."""
    found = find_components(_meta("llama").model)
    assert [(f.role, f.qualname) for f in found] == [("decoder", "")]


def test_module_without_a_decoder() -> None:
    """Something else than a language model has no decoder."""
    assert [f.role for f in find_components(nn.Sequential(nn.Linear(2, 2)))] == ["projector"]


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2)])

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return self.layers[0](inputs_embeds)  # type: ignore[no-any-return]


class _AnswersItsBody(nn.Module):
    """``get_encoder`` answers the body that also holds the language model."""

    input_modalities = ("image", "text")

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.decoder = _Layers()

    def can_generate(self) -> bool:
        return True

    def get_decoder(self) -> nn.Module:
        return self.body.get_submodule("decoder")

    def get_encoder(self, modality: str) -> nn.Module:
        return self.body


def test_what_holds_the_decoder_is_no_encoder() -> None:
    """An answer of ``get_encoder`` that holds the decoder is not taken for an encoder."""
    assert [(f.role, f.qualname) for f in find_components(_AnswersItsBody())] == [("decoder", "body.decoder")]


def test_wrapped_by_peft() -> None:
    """Paths are those of the wrapper, and the modules are the same."""
    peft = pytest.importorskip("peft")
    model = tiny_model("llava")
    decoder = model.model.language_model
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    found = find_components(wrapped)
    assert [f.qualname for f in found if f.module is decoder] == ["base_model.model.model.language_model"]
    assert {f.role for f in found} == {"decoder", "encoder[image]", "head", "projector"}


WITHOUT_ENCODER = {"chameleon", "emu3", "evolla", "fuyu", "gemma4_unified", "mistral4", "udop"}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", compat.model_class_names("IMAGE_TEXT_TO_TEXT"))
def test_every_image_text_architecture(model_type: str) -> None:
    """Components are disjoint; decoder, head and image encoder are called when text and a picture come in."""
    model = tiny_model(model_type)
    found = find_components(model)
    _assert_disjoint(found)
    decoders = [f for f in found if f.role == "decoder"]
    assert len(decoders) == 1 and not decoders[0].obstacle
    assert any(f.role.startswith("encoder") for f in found) != (model_type in WITHOUT_ENCODER)
    takes_pictures = {"image", "video"} & set(model.input_modalities)
    inputs = tiny_inputs(model, text_len=12, images=[(56, 84)] if takes_pictures else ())
    # no sound and, where it has a tower of its own, no video is in these inputs
    expected = {f.qualname for f in found if f.role not in ("projector", "encoder[audio]", "encoder[video]")}
    assert expected <= called_components(model, found, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", compat.model_class_names("MULTIMODAL_LM"))
def test_every_omni_architecture(model_type: str) -> None:
    """One decoder that stands by itself, and components that are disjoint."""
    found = find_components(_meta(model_type))
    _assert_disjoint(found)
    assert len([f for f in found if f.role == "decoder"]) == 1


def test_rules_are_needed_and_true() -> None:
    """Every rule is of a known architecture and names a module that is there."""
    for rule in RULES:
        assert rule.model_type in known_model_types() and rule.why
        model = _meta(rule.model_type)
        for path in (rule.decoder, rule.inner, *(path for _, path in rule.encoders)):
            assert model.get_submodule(path) is not None


def test_compat_symbols() -> None:
    """The private symbols that the backend relies on still exist."""
    assert callable(PreTrainedModel._from_config)
    assert compat.model_class_names("CAUSAL_LM")["llama"] == "LlamaForCausalLM"
    assert compat.rope_types(_meta("llama")) == {"default"}
    assert compat.rope_types(_meta("gemma3").model.language_model) == {"default"}
