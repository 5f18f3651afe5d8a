"""The rules that make a default configuration tiny.

A rule is chosen by the *name* of a field, never by the architecture, so that an architecture nobody has listed is
shrunk too. What the names do not tell stands in `overrides`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

VOCAB = 320
FIRST_TEXT_ID, FIRST_SPECIAL_ID = 3, 256  # ordinary text is drawn from [3, 256), special tokens live above
HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 4, 2, 16
WINDOW = 8
POSITIONS = 512

_FIXED_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TOKEN_FIELD = re.compile(r"(_token_id|_token_index|_token_ids|^im_(start|end|newline)_id|_patch_id|^codec_.*_id)$")
_LAYER_INDICES = re.compile(r"(_indexes|(?<!^out)_indices|_idxs|cross_attention_layers|_target_layers)$")
_NOT_A_MODEL = {"id2label", "label2id"}


@dataclass(frozen=True)
class Rule:
    """Fields whose name matches ``pattern`` get ``value``; ``at_most`` keeps an original that is smaller."""

    pattern: str
    value: int
    at_most: bool = True


# The first match decides. Sizes that must agree between sub-configurations (text width, projector width, ...) all
# get the same value, so that no rule has to know which field feeds which.
RULES: tuple[Rule, ...] = (
    Rule(r"^(vocab_size|vocab_size_per_layer_input|unpadded_vocab_size|mel_vocab_size)$", VOCAB, at_most=False),
    Rule(r"^((decoder|shape|pronunciation)_vocab_size)$", VOCAB),
    Rule(r"^(.*_hash_byte_group_vocab)$", 64),
    Rule(r"^(num_hidden_layers|depth|(en|de)coder_layers|layers|num_layers|n_layers?|num_blocks)$", 2),
    Rule(r"^(num_decoder_layers|num_global_layers|conf_num_hidden_layers|.*resampler_depth)$", 2),
    Rule(r"^(moe_intermediate_size|.*shared_experts?_intermediate_size|share_expert_dim|expert_dim)$", HIDDEN // 2),
    Rule(r"^(expert_ffn_hidden_size)$", HIDDEN // 2),
    Rule(r"^(.*intermediate_size(_mlp)?|(en|de)coder_ffn_dim|ffn_dim|d_ff|mlp_dim|projection_hidden_dim)$", FFN),
    Rule(r"^(ffn_hidden_size|dff|dim_ff|d_inner|feed_forward_size)$", FFN),
    Rule(r"^(hidden_size_per_layer_input|laurel_rank|.*lora_rank|hc_lowrank)$", 16),
    Rule(r"^(linear_(key_|value_)?head_dim|qk_nope_head_dim|qk_rope_head_dim|ssm_state_size|d_rel)$", 8),
    Rule(r"^(mamba_d_state)$", 16),
    Rule(r"^(.*head_dim|dim_head|.*dim_head|d_kv|d_head|query_pre_attn_scalar|mamba_d_head)$", HEAD_DIM),
    Rule(r"^(attention_head_size)$", HEAD_DIM),
    Rule(r"^(.*num_key_value_heads|num_kv_heads|linear_num_key_heads|n_groups|mamba_n_groups)$", KV_HEADS),
    Rule(r"^(.*num_attention_heads|num_heads|n_heads?|.*attention_heads|.*_n_heads|resampler_heads)$", HEADS),
    Rule(r"^(linear_num_(value_)?heads|mamba_num_heads|mamba_n_heads|n_mamba_heads)$", HEADS),
    Rule(r"^(num_(local_)?experts|n_routed_experts|moe_num_experts)$", 4),
    Rule(r"^(num_experts_per_tok|moe_topk|moe_k|num_experts_per_token|zero_expert_num)$", 2),
    Rule(r"^(n_group|num_expert_group|topk_group|n_shared_experts|moe_num_shared_experts|first_k_dense_replace)$", 1),
    Rule(r"^(hidden_size|hidden_dim|d_model|n_embd|embed_dim|out_hidden_size|.*_hidden_size|projection_dim)$", HIDDEN),
    Rule(r"^(hidden_size_global|embedding_dim|(shape|pronunciation)_embed_dim|lru_width|mamba_d_ssm)$", HIDDEN),
    Rule(r"^(image_token_embed_dim|output_dim|word_embed_proj_dim|.*projector_(in|out)put_dim)$", HIDDEN),
    Rule(r"^(num_query_tokens|latent_query_num|resampler_n_latents|resampler_num_latents)$", 4),
    Rule(r"^(sliding_window|sliding_window_size|attention_chunk_size)$", WINDOW),
    Rule(r"^(attention_window_size|local_attention_window_len)$", WINDOW),
    Rule(r"^(num_position_embeddings|posemb_grid_size)$", 64),
    Rule(r"^max_position_embeddings$", POSITIONS),
    Rule(r"^(max_source_positions)$", 32),
)

# Sizes that some configurations leave open although their model cannot do without.
_OPEN = {"num_key_value_heads": KV_HEADS, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}

# Multipliers of large models would flatten a small one; other than one, so that forgetting them shows.
_MULTIPLIERS = {
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.8,
    "logits_scaling": 0.7,
    "logit_scale": 0.7,
    "attention_multiplier": 0.3,
    "logits_mup_width_multiplier": 0.7,
    "output_multiplier": 1.5,
}


@dataclass
class _Tokens:
    """Special tokens by original id: one id in two sub-configurations stays one id."""

    used: dict[int, int]

    def remap(self, name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self.remap(name, v) for v in value]
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            return value
        if name in _FIXED_IDS:
            return _FIXED_IDS[name]
        return self.used.setdefault(value, FIRST_SPECIAL_ID + len(self.used))


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """A tiny copy of ``config`` (the dictionary of a default configuration, sub-configurations included)."""
    return _shrink(config, _Tokens({}))


def _shrink(config: dict[str, Any], tokens: _Tokens) -> dict[str, Any]:
    out: dict[str, Any] = {}
    kept = _kept_layers(config)
    for name, value in config.items():
        if name == "per_layer_config" and isinstance(value, dict):
            out[name] = _shrink_per_layer(value, kept, tokens)
        elif isinstance(value, dict):
            is_model = name not in _NOT_A_MODEL and all(isinstance(key, str) for key in value)
            out[name] = _shrink(value, tokens) if is_model else value
        elif _TOKEN_FIELD.search(name):
            out[name] = tokens.remap(name, value)
        elif isinstance(value, list):
            out[name] = _shrink_list(name, value, kept)
        else:
            out[name] = _apply(name, value, len(kept.indices))
    _agree(config, out)
    return out


def _shrink_per_layer(values: dict[Any, Any], kept: _Kept, tokens: _Tokens) -> dict[int, Any]:
    by_layer = {int(layer): value for layer, value in values.items()}
    return {new: _shrink(by_layer[old], tokens) for new, old in enumerate(kept.indices) if old in by_layer}


def _shrink_list(name: str, value: list[Any], kept: _Kept) -> list[Any]:
    """Per-layer lists keep the entries of the kept layers; lists of layer indices end at the last layer."""
    if len(value) == kept.total and name != "image_grid_pinpoints":
        if value == list(range(kept.total)):
            return list(range(len(kept.indices)))
        return [_apply(name, value[i], 0) for i in kept.indices]
    if _LAYER_INDICES.search(name) and value:
        return [max(len(kept.indices), 2) - 1]
    return value


def _apply(name: str, value: Any, layers: int) -> Any:
    if name in _MULTIPLIERS and value is not None:
        return _MULTIPLIERS[name]
    if value is None:
        return _OPEN.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    for rule in RULES:
        if re.search(rule.pattern, name):
            target = layers if name == "num_hidden_layers" and layers else rule.value
            return min(value, target) if rule.at_most else target
    return value


@dataclass(frozen=True)
class _Kept:
    total: int
    indices: tuple[int, ...]


def _kept_layers(config: dict[str, Any]) -> _Kept:
    """Which layers stay: the first of each kind, and at least two.

    A kind is what the per-layer lists (``layer_types``, ``mlp_layer_types``...) say about a layer.
    """
    total = config.get("num_hidden_layers")
    if not isinstance(total, int):
        return _Kept(-1, ())
    kinds = ("_types", "_type", "rope_layers")
    lists = [v for k, v in config.items() if k.endswith(kinds) and _is_per_layer(v, total)]
    seen: dict[tuple[Any, ...], int] = {}
    for i in range(total):
        seen.setdefault(tuple(v[i] for v in lists), i)
    indices = sorted(seen.values())
    for i in range(total):
        if len(indices) >= 2:
            break
        if i not in indices:
            indices.append(i)
    return _Kept(total if total > 1 else -1, tuple(sorted(indices)))


def _is_per_layer(value: Any, total: int) -> bool:
    return isinstance(value, list) and len(value) == total


def _agree(original: dict[str, Any], config: dict[str, Any]) -> None:
    """Fields that depend on others of the same configuration."""
    if isinstance(config.get("kv_lora_rank"), int):  # latent attention has no grouped keys
        config["num_key_value_heads"] = config["num_attention_heads"]
        if original.get("head_dim") == original.get("qk_rope_head_dim", -1):
            config["head_dim"] = config["qk_rope_head_dim"]
    if isinstance(config.get("qk_head_dim"), int) and "qk_nope_head_dim" in config:
        config["qk_head_dim"] = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    if "rotary_dim" in config and "rope_parameters" not in config:  # nothing else says how much is rotated
        config["rotary_dim"] = HEAD_DIM // 2
    _agree_on_widths(original, config)
    if config.get("image_grid_pinpoints"):
        square = config["vision_config"]["image_size"]
        config["image_grid_pinpoints"] = [[square, 2 * square], [2 * square, square]]
    patch = config.get("patch_size")
    if isinstance(patch, (list, tuple)) and len(set(patch)) == 1:
        patch = patch[0]
    if isinstance(patch, int) and ("hidden_size" in config or "embed_dim" in config):
        _shrink_pictures(config, patch)


def _agree_on_widths(original: dict[str, Any], config: dict[str, Any]) -> None:
    """Widths inside a layer that is wider than the model, and those of its heads."""
    if isinstance(original.get("attention_hidden_size"), int):  # as much wider as it was
        config["attention_hidden_size"] = HIDDEN * original["attention_hidden_size"] // original["hidden_size"]
        if "attention_head_dim" in config:
            config["attention_head_dim"] = config["attention_hidden_size"] // config["num_attention_heads"]
    for heads, dim in (("mamba_n_heads", "mamba_d_head"), ("n_mamba_heads", "mamba_headdim")):
        if heads in config and dim in config:
            inner = config.get("mamba_d_ssm") or config.get("mamba_expand", 2) * config["hidden_size"]
            config[dim] = inner // config[heads]


def _shrink_pictures(config: dict[str, Any], patch: int) -> None:
    """Four patches a side: enough for two-by-two merging and for windows."""
    if isinstance(config.get("image_size"), int):
        config["image_size"] = 4 * patch
    elif isinstance(config.get("image_size"), (list, tuple)):
        config["image_size"] = [4 * patch] * len(config["image_size"])
    if isinstance(config.get("window_size"), int):
        config["window_size"] = 4 * patch if config["window_size"] % patch == 0 else 2  # in pixels, or in patches
    if config.get("deepstack_visual_indexes"):
        config["deepstack_visual_indexes"] = [0]
