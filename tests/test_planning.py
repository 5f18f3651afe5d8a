"""The plan compiles the decoder, never the head, encoders only when asked, and says why for the rest."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from calling_decoders import CallsAmong, model_with
from torch import nn
from transformers import PreTrainedModel

from compile_policy.config import CompilationConfig
from compile_policy.errors import PolicyWarning, UnsupportedModelError
from compile_policy.layers import PluggableLayer
from compile_policy.layers.registry import registry_scope
from compile_policy.plan import Component, Plan
from compile_policy_transformers.components import meta_model
from compile_policy_transformers.planning import AUTO_COMPILE_NOTE, make_plan
from compile_policy_transformers.tiny import tiny_config, tiny_model

VISION = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "gemma3", "exaone4_5", "qwen3_5", "glm4v", "glm_ocr")
TEXT = ("llama", "qwen3", "gemma2")
DEFAULT = CompilationConfig()
WITH_ENCODER = CompilationConfig(compile_mm_encoder=True)


def _meta(model_type: str) -> PreTrainedModel:
    return meta_model(tiny_config(model_type))


def _by_role(plan: Plan) -> dict[str, Component]:
    return {c.role: c for c in plan.components}


def _quiet(model: nn.Module, config: CompilationConfig) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PolicyWarning)
        return make_plan(model, config)


def _assert_all_eager(plan: Plan, reason: str) -> None:
    assert not plan.compiled() and not plan.notes
    decoder = _by_role(plan)["decoder"]
    assert decoder.decision == "eager" and reason in decoder.reason and decoder.remedy


@pytest.mark.parametrize("model_type", VISION + TEXT)
def test_default_plan(model_type: str) -> None:
    """Only the decoder is compiled, nothing is warned about, and an eager encoder names the flag."""
    plan = _quiet(_meta(model_type), DEFAULT)
    roles = _by_role(plan)
    assert [c.role for c in plan.compiled()] == ["decoder"]
    assert roles["head"].decision == "skip" and roles["head"].reason.startswith("never compiled")
    assert plan.notes == (AUTO_COMPILE_NOTE,)
    assert all(c.reason for c in plan.components)
    if model_type in VISION:
        encoder = roles["encoder[image]"]
        assert encoder.decision == "eager" and "--compile-mm-encoder" in encoder.remedy


@pytest.mark.parametrize("model_type", VISION)
def test_encoder_when_asked(model_type: str) -> None:
    """With the flag the encoder is compiled, and one warning tells that this is experimental and when it holds."""
    with pytest.warns(PolicyWarning, match="experimental") as caught:
        plan = make_plan(_meta(model_type), WITH_ENCODER)
    assert len(caught) == 1 and "inference" in str(caught[0].message)
    assert {c.role for c in plan.compiled()} == {"decoder", "encoder[image]"}
    assert _by_role(plan)["head"].decision == "skip"


@pytest.mark.parametrize("model_type", ["llama", "fuyu"])
def test_encoder_asked_but_there_is_none(model_type: str) -> None:
    """A wish that cannot be granted is an error that says what to do."""
    with pytest.raises(UnsupportedModelError, match=r"no separate .* encoder.*Leave out --compile-mm-encoder"):
        make_plan(_meta(model_type), WITH_ENCODER)


@pytest.mark.parametrize("config", [CompilationConfig(enabled=False), CompilationConfig(mode=0)])
def test_switched_off(config: CompilationConfig) -> None:
    """Switched off: everything eager, no warning, and the plan says so."""
    _assert_all_eager(_quiet(_meta("qwen2_5_vl"), config), "switched off")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
        },
    ],
)
def test_dynamic_rope(rope: dict[str, object]) -> None:
    """A rotary embedding that follows the length of the call keeps the decoder eager, with reason and remedy."""
    config = tiny_config("llama")
    config.rope_parameters = rope
    with pytest.warns(PolicyWarning, match=f"decoder model runs eager.*{rope['rope_type']}.*rope_type"):
        plan = make_plan(meta_model(config), DEFAULT)
    _assert_all_eager(plan, "longest position")


def test_static_rope_scaling_is_compiled() -> None:
    """Scalings that are fixed at construction stand in nobody's way."""
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert _quiet(meta_model(config), DEFAULT).compiled()


def test_cpu_offload() -> None:
    """accelerate's hooks around offloaded weights keep the model eager."""
    model = cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu"))
    with pytest.warns(PolicyWarning, match=r"runs eager: weights are offloaded.*Load the model"):
        _assert_all_eager(make_plan(model, DEFAULT), "offloaded")


def test_disk_offload(tmp_path: object) -> None:
    """Weights on disk are weights that are not there."""
    model = disk_offload(tiny_model("llama"), str(tmp_path), execution_device=torch.device("cpu"))
    with pytest.warns(PolicyWarning, match="offloaded"):
        _assert_all_eager(make_plan(model, DEFAULT), "offloaded")


@pytest.mark.parametrize("places", [{"model": 0, "lm_head": "cpu"}, {"model": "cpu", "lm_head": "disk"}])
def test_mixed_device_map(places: dict[str, object]) -> None:
    """A device map with the CPU beside another device, or with the disk, means offloading."""
    model = tiny_model("llama")
    model.hf_device_map = places
    with pytest.warns(PolicyWarning, match="offloaded"):
        _assert_all_eager(make_plan(model, DEFAULT), "offloaded")


def test_some_weights_on_meta() -> None:
    """Weights missing in part are offloaded ones; a model wholly on meta is only being planned."""
    model = tiny_model("llama")
    model.lm_head.to("meta")
    with pytest.warns(PolicyWarning, match="offloaded"):
        _assert_all_eager(make_plan(model, DEFAULT), "offloaded")


def test_single_device_map_is_compiled() -> None:
    """A device map with one place is no offloading."""
    model = tiny_model("llama")
    model.hf_device_map = {"": "cpu"}
    assert _quiet(model, DEFAULT).compiled()


@pytest.mark.parametrize("compileable", [True, False])
def test_quantizer(compileable: bool) -> None:
    """The quantizer's own word decides."""
    model = tiny_model("llama")
    model.hf_quantizer = SimpleNamespace(is_compileable=compileable)
    if compileable:
        assert _quiet(model, DEFAULT).compiled()
        return
    with pytest.warns(PolicyWarning, match=r"quantizer.*cannot be compiled.*Choose"):
        _assert_all_eager(make_plan(model, DEFAULT), "quantizer")


def test_unsupported_model() -> None:
    """No decoder: a warning with reason and remedy, and an all-eager plan."""
    with pytest.warns(PolicyWarning, match=r"Sequential runs eager: unsupported model.*support_torch_compile"):
        plan = make_plan(nn.Sequential(nn.Linear(2, 2)), DEFAULT)
    assert plan.components and not plan.compiled()


def test_inseparable_decoder() -> None:
    """A decoder with the tower among its layers runs eager and the warning names the tower."""
    with pytest.warns(PolicyWarning, match="CallsAmong holds Eye"):
        plan = make_plan(model_with(CallsAmong), DEFAULT)
    _assert_all_eager(plan, "CallsAmong holds Eye")


def test_decoder_that_calls_a_tower_first() -> None:
    """A decoder that calls its tower before its layers is compiled, and so is the tower when asked."""
    plan = make_plan(_meta("idefics"), DEFAULT)
    (decoder,) = plan.compiled()
    assert decoder.qualname == "model" and "its layers alone" in decoder.reason
    with pytest.warns(PolicyWarning, match="experimental"):
        plan = make_plan(_meta("idefics"), CompilationConfig(compile_mm_encoder=True))
    assert [c.qualname for c in plan.compiled()] == ["model", "model.vision_model"]


def test_plan_is_plain_data() -> None:
    """The plan travels as dictionaries with the fixed fields."""
    row = _quiet(_meta("qwen2_5_vl"), DEFAULT).to_dict()["components"][0]
    assert row == {
        "role": "decoder",
        "qualname": "model.language_model",
        "cls": "Qwen2_5_VLTextModel",
        "decision": "compile",
        "reason": "the language decoder is always compiled",
        "remedy": "",
    }


def test_overrides_of_layers_are_notes_of_the_plan() -> None:
    """A plan says which layers are replaced by what."""
    with registry_scope():

        class Layer(PluggableLayer):
            pass

        @Layer.register_oot
        class Faster(Layer):
            pass

        notes = make_plan(tiny_model("llama"), CompilationConfig()).notes
    assert any("Layer is replaced by" in note and "Faster" in note for note in notes)
