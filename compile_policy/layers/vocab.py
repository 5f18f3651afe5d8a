"""An embedding whose rows are split over ranks.

After vLLM's ``VocabParallelEmbedding``, itself after Megatron-LM's vocabulary-parallel
embedding (Shoeybi et al., 2019). docs/layers.md lists what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from compile_policy.layers.pluggable import PluggableLayer
from compile_policy.layers.records import LayerError
from compile_policy.layers.shards import ShardGroup, in_id_order, vocab_shards

DEFAULT_PADDING = 64
V = TypeVar("V", bound="VocabParallelEmbedding")


@PluggableLayer.register("vocab_parallel_embedding")
class VocabParallelEmbedding(PluggableLayer):
    """Token ids [...] -> embeddings [..., embedding_dim], equal to ``nn.Embedding`` of the whole table.

    Split over more than one rank the weight takes no gradient: torch's collectives don't carry one.

    Args:
        num_embeddings: number of token ids, added ones included.
        embedding_dim: width of an embedding.
        params_dtype: dtype of the weight; torch's default when not given.
        org_num_embeddings: number of original ids, when some were added later.
        padding_size: the table is padded to a multiple of this.
        padding_idx: id whose row takes no gradient, as in ``nn.Embedding``.
        group: ranks that share the table; ``None`` for one rank.
        reduce_results: sum over the ranks; without it each returns zeros for ids that it doesn't hold.

    Raises:
        ValueError: sizes that make no sense.
        IndexError: on call, an id outside the vocabulary - on every rank, also where padding has a row for it.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        params_dtype: torch.dtype | None = None,
        org_num_embeddings: int | None = None,
        padding_size: int = DEFAULT_PADDING,
        *,
        padding_idx: int | None = None,
        group: dist.ProcessGroup | None = None,
        reduce_results: bool = True,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.org_vocab_size = num_embeddings if org_num_embeddings is None else org_num_embeddings
        self.padding_idx = padding_idx
        self.reduce_results = reduce_results
        self.group = ShardGroup.of(group)
        self.shards = vocab_shards(num_embeddings, self.org_vocab_size, padding_size, self.group.size)
        self.shard = self.shards[self.group.rank]
        self.weight = self._new_parameter((self.shard.rows, embedding_dim), params_dtype)
        self.register_parameter("bias", None)
        self.reset_parameters()

    def _new_parameter(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=self.group.size == 1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random rows, as in ``nn.Embedding``; zeros in the padding."""
        self.weight.zero_()
        for row, _, count in self.shard.pieces():
            self.weight[row : row + count].normal_()
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.group.size == 1 and self.org_vocab_size == self.num_embeddings:
            return F.embedding(input_ids, self.real_rows(), self.padding_idx)
        rows, owned = self._local_rows(input_ids)
        out = F.embedding(rows, self.weight)
        if self.group.size == 1:
            return out
        out = out.masked_fill(~owned.unsqueeze(-1), 0)
        return self.group.all_reduce(out) if self.reduce_results else out

    def real_rows(self) -> torch.Tensor:
        """The weight without the padding behind it; all of it when there is none."""
        return self.weight if self.shard.rows == self.num_embeddings else self.weight[: self.num_embeddings]

    def _local_rows(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(row of each id, whether it is held here). Ids of other ranks get row 0, ids of nobody a row that doesn't
        exist."""
        rows = torch.zeros_like(ids)
        owned = torch.zeros_like(ids, dtype=torch.bool)
        for row, first, count in self.shard.pieces():
            here = (ids >= first) & (ids < first + count)
            rows = torch.where(here, ids - first + row, rows)
            owned = owned | here
        # every rank raises for such an id, so that none waits for the others
        unknown = (ids < 0) | (ids >= self.num_embeddings)
        return torch.where(unknown, self.shard.rows, rows), owned

    # -- checkpoints ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_rows_(self, name: str, whole: torch.Tensor) -> None:
        """Copy this rank's rows of an ordinary tensor into ``weight`` or ``bias``; padding and what is not given are
        zero.

        Args:
            name: ``weight`` or ``bias``.
            whole: [num_embeddings, ...] or, without the added vocabulary, [org_vocab_size, ...].

        Raises:
            LayerError: any other shape.
        """
        own = getattr(self, name)
        if whole.shape[0] not in (self.num_embeddings, self.org_vocab_size) or whole.shape[1:] != own.shape[1:]:
            raise LayerError(
                f"{name} of shape {tuple(whole.shape)} does not fit a vocabulary of {self.org_vocab_size} original and "
                f"{self.num_embeddings - self.org_vocab_size} added ids of width {self.embedding_dim}.",
                remedy="Load a checkpoint of this model.",
            )
        if own.is_meta:
            own = nn.Parameter(torch.empty_like(own, device=whole.device), requires_grad=own.requires_grad)
            self.register_parameter(name, own)
        own.zero_()
        for row, first, count in self.shard.pieces():
            part = whole[first : first + count]
            own[row : row + part.shape[0]].copy_(part)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        names = [name for name, parameter in self.named_parameters(recurse=False) if parameter is not None]
        for name in names:
            whole, local = state_dict.get(prefix + name), state_dict.get(f"{prefix}{name}_shard")
            try:
                if local is not None:
                    with torch.no_grad():
                        getattr(self, name).copy_(local)
                elif whole is not None:
                    self.load_rows_(name, whole)
                elif strict:
                    missing_keys.append(prefix + name)
            except (LayerError, RuntimeError) as error:
                error_msgs.append(f"{prefix}{name}: {error}")
        known = {prefix + name + suffix for name in names for suffix in ("", "_shard")}
        direct = [k for k in state_dict if k.startswith(prefix) and "." not in k[len(prefix) :]]
        if strict:
            unexpected_keys.extend(k for k in direct if k not in known)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """One rank writes the ordinary tensor, without padding; a shard is written under a name of its own."""
        for name, parameter in self.named_parameters(recurse=False):
            tensor = parameter if keep_vars else parameter.detach()
            if self.group.size > 1:
                destination[f"{prefix}{name}_shard"] = tensor
                continue
            parts = [tensor[row : row + count] for row, _, count in self.shard.pieces() if count]
            whole = tensor if self.shard.rows == self.num_embeddings else torch.cat(parts)
            destination[prefix + name] = whole

    def whole_state_dict(self) -> dict[str, torch.Tensor]:
        """The ordinary tensors, without padding, on every rank. All ranks have to call it."""
        out = {}
        for name, parameter in self.named_parameters(recurse=False):
            columns = self.group.all_gather_last(parameter.detach().movedim(0, -1))
            out[name] = in_id_order(columns, self.shards).movedim(-1, 0).contiguous()
        return out

    @classmethod
    def from_layer(
        cls, layer: nn.Embedding, *, group: dist.ProcessGroup | None = None, padding_size: int = 1
    ) -> VocabParallelEmbedding:
        """Take the place of an ordinary embedding; on one rank without padding, with the same parameter.

        Raises:
            LayerError: the embedding does more than look up (it rescales its rows, or is a class of its own).
        """
        if type(layer) is not nn.Embedding or layer.max_norm is not None:
            raise LayerError(
                f"{type(layer).__name__} is no plain Embedding.", remedy="Write a layer of your own that does the same."
            )
        new: VocabParallelEmbedding = cls(
            layer.num_embeddings,
            layer.embedding_dim,
            layer.weight.dtype,
            padding_size=padding_size,
            padding_idx=layer.padding_idx,
            group=group,
        )
        return take_weights(new, layer)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, org_vocab_size={self.org_vocab_size}, "
            f"rows={self.shard.rows}, rank={self.group.rank}/{self.group.size}"
        )


def take_weights(new: V, old: nn.Module) -> V:
    """The parameters of an ordinary layer: the same ones where nothing is split or padded, else this rank's rows."""
    for name, parameter in old.named_parameters(recurse=False):
        if new.shard.rows == new.num_embeddings:
            new.register_parameter(name, parameter)
        else:
            new.to(parameter.device).load_rows_(name, parameter)
    return new
