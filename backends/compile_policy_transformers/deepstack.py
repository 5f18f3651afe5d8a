"""Visual features that some decoders take as arguments of their own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

#: Argument of the features -> argument that marks the positions of visual tokens.
FEATURES = {"deepstack_visual_embeds": "visual_pos_masks", "deepstack_features": "vision_mask"}


class DeepstackFeatures:
    """Visual features that some decoders add to their first layers; empty ones where a call has none."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        known = inspect.signature(decoder.forward).parameters
        self.name = next((name for name in FEATURES if name in known), None)
        self.keys: tuple[Any, ...] = ()  # numbers of a list, or of the layers that a mapping is by

    def count_of(self, model: torch.nn.Module) -> None:
        config = getattr(model, "config", None)
        if self.name == "deepstack_features":
            self.keys = tuple(layer for _, layer in getattr(config, "deepstack_layer_map", None) or ())
        else:
            vision = getattr(config, "vision_config", None)
            self.keys = tuple(range(len(getattr(vision, "deepstack_visual_indexes", None) or ())))

    def complete(self, values: dict[str, Any], embeds: torch.Tensor) -> dict[str, Any]:
        """Make the arguments present and return how to fill their example."""
        if self.name is None:
            return {}
        given = values.get(self.name)
        if isinstance(given, Mapping):
            self.keys = tuple(given)
        elif given is not None:  # a tuple of one picture's, a list of a video's beside it
            given = values[self.name] = list(given)
            self.keys = tuple(range(len(given)))
        if not self.keys:
            return {}  # nothing known about them yet: the model was never called with a picture
        mask = FEATURES[self.name]
        if given is None:
            empty = {key: embeds.new_empty(0, embeds.shape[2]) for key in self.keys}
            by_layer = self.name == "deepstack_features"
            values[self.name] = empty if by_layer else list(empty.values())
            marked = (*embeds.shape[:2], 1) if by_layer else embeds.shape[:2]
            values[mask] = torch.zeros(marked, dtype=torch.bool, device=embeds.device)
        return {mask: _first_positions}


def _first_positions(sizes: Mapping[str, int], shape: Sequence[int]) -> torch.Tensor:
    """As many marked positions as the example has visual tokens."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool)
    mask.view(-1)[: sizes["visual_tokens"]] = True
    return mask
