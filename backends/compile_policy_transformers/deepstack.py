"""Visual features that some decoders take as arguments of their own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch


class DeepstackFeatures:
    """Visual features that some decoders add to their first layers; empty ones where a call has none."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        self.wanted = "deepstack_visual_embeds" in inspect.signature(decoder.forward).parameters
        self.count = 0

    def count_of(self, model: torch.nn.Module) -> None:
        vision = getattr(getattr(model, "config", None), "vision_config", None)
        self.count = len(getattr(vision, "deepstack_visual_indexes", None) or ())

    def complete(self, values: dict[str, Any], embeds: torch.Tensor) -> dict[str, Any]:
        """Make the arguments present and return how to fill their example."""
        if not self.wanted:
            return {}
        given = values.get("deepstack_visual_embeds")
        if given is not None:
            self.count = len(given)
        if self.count == 0:
            return {}  # nothing known about them yet: the model was never called with a picture
        if given is None:
            values["deepstack_visual_embeds"] = [embeds.new_empty(0, embeds.shape[2]) for _ in range(self.count)]
            values["visual_pos_masks"] = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return {"visual_pos_masks": _first_positions}


def _first_positions(sizes: Mapping[str, int], shape: Sequence[int]) -> torch.Tensor:
    """As many marked positions as the example has visual tokens."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool)
    mask.view(-1)[: sizes["visual_tokens"]] = True
    return mask
