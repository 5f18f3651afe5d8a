"""Which rows of a vocabulary live on which rank.

The layout is vLLM's (``VocabParallelEmbedding``): original and added vocabulary are padded and split separately, and a
rank holds ``[original | padding | added | padding]``. Unlike there, padding is also a multiple of the number of ranks,
so any number of ranks works.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ShardGroup:
    """The ranks that share a vocabulary. ``handle`` is ``None`` for one rank, where nothing is communicated."""

    rank: int = 0
    size: int = 1
    handle: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> ShardGroup:
        """The group as seen from this process.

        Raises:
            ValueError: this process is not in the group.
        """
        if group is None:
            return cls()
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError("This process is not in the process group.")
        size = dist.get_world_size(group)
        return cls(rank, size, group if size > 1 else None)

    def __deepcopy__(self, memo: object) -> ShardGroup:
        return self  # a process group cannot be copied, and a copied layer talks to the same ranks

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        if self.handle is not None:
            dist.all_reduce(tensor, group=self.handle)
        return tensor

    def all_gather_last(self, tensor: torch.Tensor) -> torch.Tensor:
        """[..., n] on each rank -> [..., size * n] on every rank, in the order of the ranks."""
        if self.handle is None:
            return tensor
        out = tensor.new_empty((self.size * tensor.shape[0], *tensor.shape[1:]))
        dist.all_gather_into_tensor(out, tensor.contiguous(), group=self.handle)
        # [size, ..., n] -> [..., size, n]
        return out.view(self.size, *tensor.shape).movedim(0, -2).flatten(-2)

    def gather_last(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """[..., n] on each rank -> [..., size * n] on the first, ``None`` on the others."""
        if self.handle is None:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(tensor.contiguous(), parts, group=self.handle, group_dst=0)
        return torch.cat(parts, -1) if parts is not None else None


@dataclass(frozen=True)
class VocabShard:
    """The rows of one rank.

    Attributes:
        org: [start, end) of the original token ids here.
        org_rows: rows kept for them, padding included.
        added: [start, end) of the added token ids here.
        added_rows: rows kept for them, padding included.
    """

    org: tuple[int, int]
    org_rows: int
    added: tuple[int, int]
    added_rows: int

    @property
    def rows(self) -> int:
        return self.org_rows + self.added_rows

    def pieces(self) -> tuple[tuple[int, int, int], ...]:
        """(first row, first id, number of ids) of the original and of the added part."""
        return (
            (0, self.org[0], self.org[1] - self.org[0]),
            (self.org_rows, self.added[0], self.added[1] - self.added[0]),
        )


def vocab_shards(num_embeddings: int, org_vocab_size: int, padding_size: int, ranks: int) -> tuple[VocabShard, ...]:
    """The shard of every rank.

    Args:
        num_embeddings: number of token ids, added ones included.
        org_vocab_size: number of original ids; ids from here on are added ones.
        padding_size: each rank's rows come from a total that is a multiple of this (and of ``ranks``).
        ranks: number of ranks.

    Raises:
        ValueError: sizes that make no sense.
    """
    if not 0 < org_vocab_size <= num_embeddings:
        raise ValueError(f"org_num_embeddings is {org_vocab_size}; it must lie between 1 and {num_embeddings}.")
    if padding_size < 1:
        raise ValueError(f"padding_size is {padding_size}; it must be at least 1.")
    multiple = math.lcm(padding_size, ranks)
    org_rows = _padded(org_vocab_size, multiple) // ranks
    added_rows = _padded(num_embeddings - org_vocab_size, multiple) // ranks
    out = []
    for rank in range(ranks):
        org = [min(edge * org_rows, org_vocab_size) for edge in (rank, rank + 1)]
        added = [min(org_vocab_size + edge * added_rows, num_embeddings) for edge in (rank, rank + 1)]
        out.append(VocabShard((org[0], org[1]), org_rows, (added[0], added[1]), added_rows))
    return tuple(out)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def in_id_order(columns: torch.Tensor, shards: tuple[VocabShard, ...]) -> torch.Tensor:
    """[..., all rows of all ranks] -> [..., token ids], padding dropped: column i belongs to token i."""
    parts: list[list[torch.Tensor]] = [[], []]
    start = 0
    for shard in shards:
        for part, (row, _, count) in zip(parts, shard.pieces(), strict=True):
            part.append(columns[..., start + row : start + row + count])
        start += shard.rows
    whole = [p for p in parts[0] + parts[1] if p.shape[-1]]
    return whole[0] if len(whole) == 1 else torch.cat(whole, -1)
