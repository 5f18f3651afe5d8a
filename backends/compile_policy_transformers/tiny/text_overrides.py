"""What the names of the fields do not tell about models of text alone: a few values per architecture."""

from __future__ import annotations

from typing import Any

_GEMMA3N = {  # the last two layers attend over the keys of the first two
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": [96] * 4,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    "num_kv_shared_layers": 2,
}
_HEAD = {"head_dim": 16}  # left open by default, and not computed
_SPARSE = {"num_experts": 4, "moe_topk": 2}  # by default there is one expert
_HYBRID = {  # one layer of attention is shared by several
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "hybrid_layer_ids": [1, 3],
}
_COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        for kind in ("sliding_attention", "full_attention")
    },
}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "ple_embed_dim": 64,
    "number_of_conv_states": 3,
    "ngram_vocab_size_base": 64,
    "eos_token_id": 1,
}

#: Field of the shrunk configuration: value.
TEXT: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"num_hidden_layers": 2},  # its caches ask for a number of layers
    "cohere_compass_text": _COMPASS,
    "gemma3n_text": _GEMMA3N,
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
        "window_size": 24,  # counted from the end of a static cache: a smaller one would leave nothing to attend to
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},  # 2 rounds of 3 and 1 through as many layers
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": {**_HEAD, **_SPARSE},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 32},
    "ministral": _HEAD,
    "musicgen": {"num_codebooks": 2},
    "musicgen_melody": {"num_codebooks": 2},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [16, 48],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "xlm": {"emb_dim": 64},
    "xlstm": {"qk_dim_factor": 1.0},  # of queries and keys too few are left
    "xmod": {"default_language": "en_XX"},
    "zamba": _HYBRID,
    "zamba2": _HYBRID,
}
