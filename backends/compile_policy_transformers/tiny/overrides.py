"""What the names of the fields do not tell: a few values per architecture.

Keys are dotted paths below the configuration; a path that does not exist there is an error, so the table cannot rot.
"""

from __future__ import annotations

from typing import Any

OVERRIDES: dict[str, dict[str, Any]] = {
    # 4x4 patches pooled to 2x2 tokens
    "gemma3": {"mm_tokens_per_image": 4},
    # a quarter of head_dim 16 is too little for three rotary sections
    "qwen3_5": {"text_config.rope_parameters.partial_rotary_factor": 0.5, "text_config.head_dim": 32},
}
