"""A language model's head whose rows are split over ranks, after vLLM's ``ParallelLMHead``."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from compile_policy.layers.logits import LogitsProcessor
from compile_policy.layers.pluggable import PluggableLayer
from compile_policy.layers.records import LayerError
from compile_policy.layers.vocab import DEFAULT_PADDING, VocabParallelEmbedding, take_weights


@PluggableLayer.register("parallel_lm_head")
class ParallelLMHead(VocabParallelEmbedding):
    """Hidden states [..., embedding_dim] -> logits [..., token ids].

    With ``logits_processor`` a call gives the whole logits, as an ordinary ``lm_head`` does; without one it gives this
    rank's rows, padding included, and a `LogitsProcessor` that takes the head as argument does the rest, as in vLLM.

    Args:
        bias: whether there is one.
        logits_processor: gathers, cuts and scales.
        others: as in `VocabParallelEmbedding`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bias: bool = False,
        params_dtype: torch.dtype | None = None,
        org_num_embeddings: int | None = None,
        padding_size: int = DEFAULT_PADDING,
        *,
        group: dist.ProcessGroup | None = None,
        logits_processor: LogitsProcessor | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, params_dtype, org_num_embeddings, padding_size, group=group)
        self.logits_processor = logits_processor
        if bias:
            self.bias = self._new_parameter((self.shard.rows,), params_dtype)
            self.reset_parameters()

    @classmethod
    def from_layer(  # type: ignore[override]
        cls, layer: nn.Linear, *, group: dist.ProcessGroup | None = None, padding_size: int = 1
    ) -> ParallelLMHead:
        """Take the place of an ordinary head: every rank returns the whole logits.

        Raises:
            LayerError: the head is a class of its own.
        """
        if type(layer) is not nn.Linear:
            raise LayerError(
                f"{type(layer).__name__} is no plain Linear.", remedy="Write a layer of your own that does the same."
            )
        new: ParallelLMHead = cls(
            layer.out_features,
            layer.in_features,
            layer.bias is not None,
            layer.weight.dtype,
            padding_size=padding_size,
            group=group,
        )
        new.logits_processor = LogitsProcessor(layer.out_features)
        return take_weights(new, layer)

    def tie_weights(self, embedding: VocabParallelEmbedding) -> ParallelLMHead:
        """Use the embedding's weight, the same parameter.

        Raises:
            LayerError: the embedding is split or padded in another way.
        """
        if embedding.shards != self.shards or embedding.embedding_dim != self.embedding_dim:
            raise LayerError("The embedding is split in another way than the head.", remedy="Give both the same sizes.")
        self.weight = embedding.weight
        return self

    def local_logits(
        self, hidden_states: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """[..., embedding_dim] -> [..., rows of this rank]; ``bias`` instead of the head's own, computed in ``dtype``.

        Raises:
            LayerError: a gradient is wanted through a head that is split.
        """
        if self.group.size > 1 and torch.is_grad_enabled() and hidden_states.requires_grad:
            raise LayerError(
                "A head that is split over ranks carries no gradient.", remedy="Use torch.inference_mode()."
            )
        bias = self.bias if bias is None else bias
        if dtype is None or dtype == hidden_states.dtype:
            return F.linear(hidden_states, self.weight, bias)
        return F.linear(hidden_states.to(dtype), self.weight.to(dtype), None if bias is None else bias.to(dtype))

    # vLLM's head is an embedding too; it shares its rows with one, not its signature
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor | None:  # type: ignore[override]
        if self.logits_processor is None:
            return self.local_logits(hidden_states)
        logits: torch.Tensor | None = self.logits_processor(self, hidden_states)
        return logits
