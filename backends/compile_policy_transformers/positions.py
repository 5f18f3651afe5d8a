"""Position ids that a call did not give, as the decoder makes them itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache


class OwnPositions:
    """How one decoder numbers positions where that is not by counting tokens from 0.

    Two kinds are known, told by the embedding of positions: one that counts along the padding mask (OPT) unless the
    decoder counts tokens first (BioGPT), and sinusoidal ones whose numbers begin behind that of the padding token
    (M2M-100).
    """

    def __init__(self, decoder: torch.nn.Module) -> None:
        self.table: Any = getattr(decoder, "embed_positions", None)
        forward = getattr(self.table, "forward", None)
        names = list(inspect.signature(forward).parameters) if forward is not None else []
        counts = "arange" in inspect.unwrap(type(decoder).forward).__code__.co_names
        self.by_mask = names[:1] == ["attention_mask"] and "position_ids" in names and not counts
        self.by_token = hasattr(self.table, "create_position_ids_from_inputs_embeds") and "position_ids" in names

    def __bool__(self) -> bool:
        """Whether the decoder numbers positions in a way of its own."""
        return self.by_mask or self.by_token

    def make(
        self, values: Mapping[str, Any], ids: torch.Tensor | None, embeds: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor | None:
        """Positions (batch, sequence) of a call with these arguments; ``None`` where counting tokens does.

        Args:
            ids: (batch, sequence) token ids, if the call gives them.
            embeds: (batch, sequence, hidden size).
        """
        if values.get("position_ids") is not None:
            return None
        seen = int(cache.get_seq_length()) if cache is not None else 0
        if self.by_mask:
            mask = values.get("attention_mask")
            if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
                return None
            counted = (torch.cumsum(mask, dim=1) * mask - 1).long()
            return counted[:, seen:]
        made: torch.Tensor | None = None
        if self.by_token and ids is not None:
            made = self.table.create_position_ids_from_input_ids(ids, self.table.padding_idx, seen)
        elif self.by_token:
            made = self.table.create_position_ids_from_inputs_embeds(embeds, seen, self.table.padding_idx)
        return made
