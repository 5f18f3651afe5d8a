"""What the names of the fields do not tell: a few values per architecture."""

from __future__ import annotations

from typing import Any

from .text_overrides import TEXT

_CONVOLUTIONAL = {
    "model_type": "resnet",
    "hidden_size": 64,
    "hidden_sizes": [16, 64],
    "depths": [1, 1],
    "embedding_size": 16,
    "layer_type": "basic",
}

# Arguments of the default configuration, before it is shrunk: sub-configurations that default to nothing.
FILL_IN: dict[str, dict[str, Any]] = {
    "gemma4": {"vision_config": {}, "audio_config": {}},
    "gemma4_unified": {"vision_config": {}, "audio_config": {}},
    "diffusion_gemma": {"vision_config": {}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},  # its attention needs both
    # see FROM_TIMM
    "fast_vlm": {"vision_config": _CONVOLUTIONAL},
    "perception_lm": {"vision_config": {"model_type": "clip_vision_model", "model_args": {"embed_dim": 64}}},
}

# Their towers are those of the package timm, in fixed sizes; a tower with outputs of the same form stands in.
FROM_TIMM = ("fast_vlm", "gemma3n", "perception_lm")

# As above, for a configuration that takes one class of tower only, so that it is put in afterwards.
STAND_INS: dict[str, dict[str, dict[str, Any]]] = {
    "gemma3n": {"vision_config": {**_CONVOLUTIONAL, "rms_norm_eps": 1e-6, "vocab_offset": 300, "vocab_size": 10}},
}

_GEMMA3 = {"mm_tokens_per_image": 4}  # 4x4 patches pooled to 2x2 tokens
_CODES = range(16)
IMAGE_ID = 310  # for configurations that leave the placeholder to the tokenizer
_MINICPM = {
    "image_token_id": IMAGE_ID,
    "video_token_id": IMAGE_ID + 1,
    "insert_layer_id": 0,
    "text_config.rope_parameters.partial_rotary_factor": 0.5,
}
_GRANITE_SPEECH = {"encoder_config.context_size": 12}  # several blocks in a short piece of sound
_OMNI = {"vision_start_token_id": 312, "vision_end_token_id": 313}


def _text(model_type: str) -> dict[str, Any]:
    """What a text model has, for the same one inside a larger one."""
    return {f"text_config.{name}": value for name, value in TEXT[model_type].items()}


# Dotted path below the shrunk configuration: value.
OVERRIDES: dict[str, dict[str, Any]] = {
    **TEXT,
    "aria": {"projector_patch_to_query_dict": {16: 8}, "max_value_projector_patch_to_query_dict": 8},
    "chameleon": {
        # an image code is named by its digits, written as letters
        "vocabulary_map": {
            "<image>": 256,
            **{f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z": 260 + i for i in _CODES},
        },
        "vq_config.num_embeddings": 16,
        "vq_config.embed_dim": 16,
        "vq_config.latent_channels": 16,
        "vq_config.base_channels": 32,
        "vq_config.channel_multiplier": [1, 1],
        "vq_config.num_res_blocks": 1,
        "vq_config.resolution": 8,
    },
    "cohere_compass": _text("cohere_compass_text"),
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.num_experts_per_tok": 2,
        "vision_config.sam_config.downsample_channels": [64, 64],
        "vision_config.sam_config.output_channels": 64,
    },
    "emu3": {
        "vocabulary_map": {
            "<image>": 256,
            "<|extra_200|>": 257,
            **{f"<|visual token {i:06d}|>": 260 + i for i in _CODES},
        },
        "vq_config.codebook_size": 16,
        "vq_config.hidden_size": 32,
        "vq_config.base_channels": 32,
        "vq_config.channel_multiplier": [1, 1],
        "vq_config.num_res_blocks": 1,
    },
    "gemma3n": {
        "vision_soft_tokens_per_image": 64,
        "audio_soft_tokens_per_image": 24,
        # pictures and sounds have ids of their own at the end of the vocabulary
        "eoi_token_id": 300,
        "image_token_id": 301,
        "eoa_token_id": 310,
        "audio_token_id": 311,
        "audio_config.vocab_offset": 310,
        "audio_config.vocab_size": 10,
        **_text("gemma3n_text"),
    },
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},  # height and width are interleaved
    "glmasr": {"audio_config.intermediate_size": 256},  # four frames of the tower's width become one token
    "granite_speech": _GRANITE_SPEECH,
    "granite_speech_plus": _GRANITE_SPEECH,
    "phi4_multimodal": {
        "vision_config.crop_size": 56,  # the size of its pictures
        "audio_config.nemo_conv_channels": 64,
        "audio_config.ext_pw_out_channel": 64,
        "audio_config.depthwise_separable_out_channel": 64,
    },
    "qwen3_asr": {"audio_config.n_window_infer": 200},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "gemma3": _GEMMA3,
    "llama4": {"vision_config.intermediate_size": 256, "vision_config.vision_output_dim": 64},
    "shieldgemma2": _GEMMA3,
    "gemma4_unified": {
        "vision_config.mm_embed_dim": 64,
        "vision_config.mm_posemb_size": 64,
        "vision_config.output_proj_dims": 64,
    },
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[1, 0]],
        "spatial_target_layers": [0, 1, 0, 1],
    },
    "hunyuan_vl": {"text_config.head_dim": 16, "text_config.rope_parameters.mrope_section": [2, 2, 2, 2]},
    "inkling_mm_model": {"vision_config.patch_size": 8, "vision_config.n_layers": 5},  # fewer layers need scipy
    "molmo2": {"vision_config.num_position_embeddings": 16, "adapter_config.vision_feature_layer": [1, 0]},
    "qwen2_5_omni_thinker": {**_OMNI, "audio_config.n_window": 8},
    "qwen3_omni_moe_thinker": {**_OMNI, "audio_config.n_window_infer": 200},
    # a quarter of head_dim 16 is too little for three rotary sections
    "qwen3_5": {"text_config.rope_parameters.partial_rotary_factor": 0.5, "text_config.head_dim": 32},
    "qwen4_exp": _text("qwen4_exp_text"),
    "step3p7": {
        "text_config.layer_types": ["full_attention", "sliding_attention"],
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.sliding_window": 8,
        "text_config.rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        },
    },
    "blip-2": {"image_token_index": IMAGE_ID},
    "instructblip": {"image_token_index": IMAGE_ID},
    "instructblipvideo": {"video_token_index": IMAGE_ID},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32,
        "canvas_length": 8,
    },
    "dots3_note": {
        "vision_config.adapter_in_dim": 64,
        "vision_config.adapter_out_dim": 64,
        "audio_config.adapter_input_size": 64,
        "audio_config.adapter_out_dim": 64,
        "audio_config.conv_output_size": 1024,
    },
    "florence2": {
        "vision_config.embed_dim": [32, 32, 32, 64],
        "vision_config.depths": [1, 1, 1, 1],
        "vision_config.num_heads": [2, 2, 2, 2],
        "vision_config.num_groups": [2, 2, 2, 2],
        "vision_config.window_size": 2,
    },
    "janus": {
        "vq_config.base_channels": 32,
        "vq_config.channel_multiplier": [1, 1],
        "vq_config.latent_channels": 16,
        "vq_config.num_embeddings": 16,
        "vq_config.num_res_blocks": 1,
    },
    "kyutai_speech_to_text": {"codec_config.upsample_groups": 64},
    "minicpm_ocr": _MINICPM,
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM,
    "mllama": {"vision_config.vision_output_dim": 128},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256},
    "nemo_speechlm": {  # its values have as many heads as its queries
        "audio_config.asr_config.num_key_value_heads": 4,
        "audio_config.diarization_config.audio_config.num_key_value_heads": 4,
    },
    "nemotron_h_omni": {"image_token_id": IMAGE_ID, "video_token_id": IMAGE_ID + 1},
    "t5gemma2": {"encoder.mm_tokens_per_image": 4},
    "unlimited_ocr": {
        "vision_config.sam_config.downsample_channels": [64, 64],
        "vision_config.sam_config.output_channels": 64,
    },
    "qwen2_5_omni": {
        **{f"thinker_config.{name}": value for name, value in {**_OMNI, "audio_config.n_window": 8}.items()},
        "token2wav_config.bigvgan_config.upsample_initial_channel": 64,
    },
    "qwen3_omni_moe": {
        **{f"thinker_config.{name}": value for name, value in {**_OMNI, "audio_config.n_window_infer": 200}.items()},
        "talker_config.text_config.shared_expert_intermediate_size": 32,
        "talker_config.spatial_merge_size": 2,
    },
    "vibevoice_asr": {
        f"{kind}_tokenizer_encoder_config.{name}": value
        for kind in ("acoustic", "semantic")
        for name, value in {"depths": [1, 1, 1], "downsampling_ratios": [2, 2], "num_filters": 8}.items()
    },
    "voxtral": {"audio_token_id": IMAGE_ID, "audio_config.intermediate_size": 256},
    "vipllava": {"vision_feature_layers": [-2, -1]},
}
