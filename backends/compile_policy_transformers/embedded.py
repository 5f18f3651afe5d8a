"""Pictures that a decoder puts among its embeddings itself (kosmos-2, kosmos-2.5): put there before the graph."""

from __future__ import annotations

from typing import Any

import torch

from compile_policy_transformers.cache_argument import cache_in

#: Features of pictures, (..., hidden size), and (batch, sequence) the places of the tokens that stand for them.
PICTURES, PLACES = "image_embeds", "image_embeds_position_mask"


def with_pictures(embeds: torch.Tensor, values: dict[str, Any]) -> torch.Tensor:
    """Embeddings (batch, sequence, hidden size) with the pictures, which leave ``values``, in their places.

    A decoder that takes them looks at pictures only as long as its cache is empty. Places may have an embedding of
    their own, as all others have: they are given always.
    """
    pictures, places, cache = values.pop(PICTURES, None), values.get(PLACES), cache_in(values)
    merged = embeds
    if pictures is not None and places is not None and (cache is None or int(cache.get_seq_length()) == 0):
        merged = embeds.clone()
        merged[places.ne(0)] = pictures.to(embeds.device, embeds.dtype).view(-1, pictures.shape[-1])
    marked = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if places is None else places.ne(0)
    values[PLACES] = marked.long()
    return merged
