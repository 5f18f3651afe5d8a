"""From hidden states to logits: head, gather over the ranks, soft cap, scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compile_policy.layers.pluggable import PluggableLayer
from compile_policy.layers.shards import in_id_order

if TYPE_CHECKING:
    from compile_policy.layers.head import ParallelLMHead


@PluggableLayer.register("logits_processor")
class LogitsProcessor(PluggableLayer):
    """Logits in the order of token ids, after vLLM's ``LogitsProcessor``: head, gather, cut, soft cap, scale.

    Args:
        vocab_size: number of token ids, added ones included.
        org_vocab_size: keep only this many columns; ``None`` keeps the added ids too.
        scale: factor on the logits, after the cap.
        logits_as_input: calls pass logits instead of hidden states.
        soft_cap: ``cap * tanh(logits / cap)``, as in Gemma 2.
        use_all_gather: every rank gets the logits; without it the first rank alone, the others ``None``.
        head_dtype: dtype of the projection; that of the hidden states when not given.
    """

    def __init__(
        self,
        vocab_size: int,
        org_vocab_size: int | None = None,
        scale: float = 1.0,
        logits_as_input: bool = False,
        soft_cap: float | None = None,
        *,
        use_all_gather: bool = True,
        head_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.org_vocab_size = vocab_size if org_vocab_size is None else org_vocab_size
        self.scale = scale
        self.logits_as_input = logits_as_input
        self.soft_cap = soft_cap
        self.use_all_gather = use_all_gather
        self.head_dtype = head_dtype

    def forward(
        self,
        lm_head: ParallelLMHead | None,
        hidden_states: torch.Tensor,
        embedding_bias: torch.Tensor | None = None,
        skip_gather: bool = False,
    ) -> torch.Tensor | None:
        """Logits [..., org_vocab_size] of hidden states [..., width].

        Args:
            lm_head: the head; ``None`` with ``logits_as_input``.
            hidden_states: or logits, with ``logits_as_input``.
            embedding_bias: this rank's bias instead of the head's own.
            skip_gather: return this rank's columns, padding included.

        Returns:
            The logits; ``None`` on all ranks but the first without ``use_all_gather``.
        """
        logits: torch.Tensor | None = hidden_states
        if not self.logits_as_input:
            assert lm_head is not None
            logits = lm_head.local_logits(hidden_states, embedding_bias, self.head_dtype)
            if not skip_gather:
                logits = self._gathered(lm_head, logits)
        if logits is None:
            return None
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits if self.scale == 1.0 else logits * self.scale

    def _gathered(self, lm_head: ParallelLMHead, local: torch.Tensor) -> torch.Tensor | None:
        group = lm_head.group
        whole = group.all_gather_last(local) if self.use_all_gather else group.gather_last(local)
        if whole is None:
            return None
        # A plain cut is not enough: each rank's added ids stand between its original ids and the next rank's.
        return in_id_order(whole, lm_head.shards)[..., : self.org_vocab_size]

    def extra_repr(self) -> str:
        return f"{self.vocab_size}, org_vocab_size={self.org_vocab_size}, scale={self.scale}, soft_cap={self.soft_cap}"
