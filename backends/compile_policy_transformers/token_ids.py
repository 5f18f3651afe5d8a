"""Token ids that a decoder reads beside their embeddings, and the history of them that it keeps in its cache."""

from __future__ import annotations

from typing import Any

import torch

from compile_policy_transformers.decoder_rules import DecoderRule


class TokenIds:
    """What one decoder does with token ids; falsy for one that reads nothing but embeddings.

    Attributes:
        name: the argument that they go in.
        first: the token that its history is filled with where nothing came before.
    """

    def __init__(self, decoder: torch.nn.Module, rule: DecoderRule) -> None:
        config: Any = decoder.config
        reads = bool(rule.ids) and bool(getattr(config, rule.ids_where, None))
        self.name = rule.ids if reads else ""
        self._recover: Any = getattr(decoder, rule.ids_from) if reads else None
        end = getattr(config, "eos_token_id", None)
        self.first: int | None = None if not reads else end[0] if isinstance(end, list) else end

    def __bool__(self) -> bool:
        return bool(self.name)

    def complete(self, values: dict[str, Any], ids: torch.Tensor | None, embeds: torch.Tensor) -> None:
        """Give a call the ids (batch, sequence) that it has, or those that its embeddings are of, as eager finds them.

        Raises:
            RuntimeError: the embeddings are those of no tokens.
        """
        if self and values.get(self.name) is None:
            values[self.name] = self._recover(embeds) if ids is None else ids

    def of(self, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """Any ids, for a call with made-up embeddings (batch, sequence, hidden size)."""
        return {self.name: embeds.new_zeros(embeds.shape[:2], dtype=torch.long)} if self else {}
