"""What the plan calls a decoder continues a text; encoders, depth maps and masks of pictures are what they are."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as t
from torch import nn

import compile_policy as cp
from compile_policy.errors import PolicyWarning
from compile_policy_transformers.components import meta_model

_TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_PICTURE = {"image_size": 32, "patch_size": 8}
_BERT = t.BertConfig(**_TEXT, **_LAYERS)
_VIT = t.ViTConfig(**_LAYERS, **_PICTURE)
_T5 = t.T5Config(**_TEXT, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
_CLIP = t.CLIPConfig(text_config={**_TEXT, **_LAYERS}, vision_config={**_LAYERS, **_PICTURE})
_SIGLIP = t.SiglipConfig(text_config={**_TEXT, **_LAYERS}, vision_config={**_LAYERS, **_PICTURE})
_SAM = t.SamConfig(
    vision_config={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "output_channels": 16,
        "mlp_dim": 48,
        "global_attn_indexes": [1],
        "window_size": 2,
        "num_pos_feats": 8,
    },
    prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
    mask_decoder_config={
        "hidden_size": 16,
        "mlp_dim": 32,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
        "num_hidden_layers": 2,
    },
)
_DINO = t.Dinov2Config(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=56,
    patch_size=14,
    out_features=["stage1", "stage2"],
    reshape_hidden_states=False,
    apply_layernorm=True,
)
_DEPTH = t.DepthAnythingConfig(
    backbone_config=_DINO,
    reassemble_hidden_size=64,
    patch_size=14,
    neck_hidden_sizes=[16, 32],
    fusion_hidden_size=16,
    head_hidden_size=16,
    reassemble_factors=[2, 1],
)
_MAE = t.ViTMAEConfig(
    **_LAYERS,
    **_PICTURE,
    decoder_hidden_size=32,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=4,
    decoder_intermediate_size=48,
)
_SEGFORMER = t.SegformerConfig(
    num_encoder_blocks=2,
    depths=[1, 1],
    sr_ratios=[2, 1],
    hidden_sizes=[16, 32],
    patch_sizes=[7, 3],
    strides=[4, 2],
    num_attention_heads=[1, 2],
    mlp_ratios=[2, 2],
    decoder_hidden_size=16,
)
_LLAMA = t.LlamaConfig(**_TEXT, **_LAYERS)

#: Class, configuration, role -> path of what the plan finds besides heads and projectors.
ROLES: list[tuple[type, t.PreTrainedConfig, dict[str, str]]] = [
    (t.BertModel, _BERT, {"encoder[text]": ""}),
    (t.BertForMaskedLM, _BERT, {"encoder[text]": "bert"}),
    (t.T5EncoderModel, _T5, {"encoder[text]": ""}),
    (t.ModernBertModel, t.ModernBertConfig(**_LAYERS, **_TEXT, cls_token_id=3, sep_token_id=4), {"encoder[text]": ""}),
    (t.ViTModel, _VIT, {"encoder[image]": ""}),
    (t.ViTForImageClassification, _VIT, {"encoder[image]": "vit"}),
    (t.CLIPModel, _CLIP, {"encoder[text]": "text_model", "encoder[image]": "vision_model"}),
    (t.SiglipModel, _SIGLIP, {"encoder[text]": "text_model", "encoder[image]": "vision_model"}),
    (t.DepthAnythingForDepthEstimation, _DEPTH, {"encoder[image]": "backbone"}),
    (t.ViTMAEForPreTraining, _MAE, {"encoder[image]": "vit"}),
    (t.SamModel, _SAM, {"encoder[image]": "vision_encoder"}),
    (t.SegformerForSemanticSegmentation, _SEGFORMER, {"encoder[image]": "segformer"}),
    (t.LlamaModel, _LLAMA, {"decoder": ""}),
    (t.LlamaForSequenceClassification, _LLAMA, {"decoder": "model"}),
    (t.GPT2Model, t.GPT2Config(**_TEXT, n_embd=32, n_layer=2, n_head=4), {"decoder": ""}),
    (t.MambaModel, t.MambaConfig(**_TEXT, hidden_size=32, num_hidden_layers=2), {"decoder": ""}),
    (t.T5Model, _T5, {"decoder": "decoder"}),
]


def _meta(cls: type, config: t.PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = cls(config)
    return model.to("meta").eval()


@pytest.mark.parametrize(("cls", "config", "roles"), ROLES, ids=lambda value: getattr(value, "__name__", ""))
def test_roles_are_true(cls: type, config: t.PreTrainedConfig, roles: dict[str, str]) -> None:
    """Role and path of each; without a language decoder nothing is compiled, and the remedy names what would be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PolicyWarning)
        plan = cp.plan(_meta(cls, config))
    rows = [row for row in plan.components if row.role not in ("head", "projector")]
    assert {row.role: row.qualname for row in rows} == roles
    for row in rows:
        assert (row.decision == "compile") == (row.role == "decoder")
        if row.role == "encoder[text]" and len(rows) == 1:
            assert "encodes text" in row.reason and "support_torch_compile" in row.remedy and row.cls in row.remedy
        elif row.role == "encoder[image]":
            assert "--compile-mm-encoder" in row.remedy


PICTURES: list[tuple[type, t.PreTrainedConfig, int]] = [
    (t.DepthAnythingForDepthEstimation, _DEPTH, 56),
    (t.ViTForImageClassification, _VIT, 32),
]


@pytest.mark.parametrize(("cls", "config", "size"), PICTURES, ids=lambda value: getattr(value, "__name__", ""))
@torch.no_grad()
def test_a_model_of_pictures_is_run_without_a_wasted_compile(cls: type, config: t.PreTrainedConfig, size: int) -> None:
    """Told once, when the policy is applied; calls are eager's, and nothing is captured."""
    model = cls(config).eval()
    pixels = torch.randn(2, 3, size, size)
    want = model(pixel_values=pixels)[0]
    with pytest.warns(PolicyWarning, match="encoders and no language decoder.*--compile-mm-encoder"):
        cp.apply(model, cp.CompilationConfig(backend="eager"))
    assert torch.equal(model(pixel_values=pixels)[0], want)
    assert all(row.graphs == row.calls == 0 and row.state == "eager" for row in cp.report(model).components)


@torch.no_grad()
def test_the_remedy_for_pictures() -> None:
    """With the flag, the encoder of a classifier is compiled: one graph for one picture and for many."""
    model = t.ViTForImageClassification(_VIT).eval()
    calls = [torch.randn(n, 3, 32, 32) for n in (2, 1, 3)]
    want = [model(pixel_values=pixels).logits for pixels in calls]
    with pytest.warns(PolicyWarning, match="experimental"):
        cp.apply(model, cp.CompilationConfig(backend="eager", compile_mm_encoder=True))
    for pixels, expected in zip(calls, want, strict=True):
        torch.testing.assert_close(model(pixel_values=pixels).logits, expected, atol=1e-5, rtol=1e-5)
    (row,) = [row for row in cp.report(model).components if row.role == "encoder[image]"]
    assert (row.state, row.graphs, row.calls, row.eager_calls) == ("compiled", 1, 3, 0)


@torch.no_grad()
def test_the_remedy_for_text() -> None:
    """A text encoder whose class is decorated: one graph for all batches and lengths, padded or not."""

    class Decorated(t.BertModel):
        pass

    dims = dict.fromkeys(("input_ids", "attention_mask"), (0, 1))
    cp.support_torch_compile(dynamic_arg_dims=dims)(Decorated)
    plain = t.BertModel(_BERT).eval()
    with cp.use_config(cp.CompilationConfig(backend="eager")):
        model = Decorated(_BERT).eval()
    model.load_state_dict(plain.state_dict())
    for batch, length in ((2, 7), (1, 5), (3, 9)):
        ids = torch.randint(3, 64, (batch, length))
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        want = plain(input_ids=ids, attention_mask=mask).last_hidden_state
        got = model(input_ids=ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    (row,) = cp.report(model).components
    assert (row.state, row.graphs, row.calls, row.eager_calls) == ("compiled", 1, 3, 0)


def test_a_class_that_allocates_while_it_is_built() -> None:
    """It is planned without memory all the same."""
    config = t.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)
    model = meta_model(config)
    assert all(p.is_meta for p in model.parameters())
    (decoder,) = [row for row in cp.plan(model).components if row.role == "decoder"]
    assert decoder.decision == "compile"
