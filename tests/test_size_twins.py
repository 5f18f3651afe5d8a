"""Methods that divide sizes: what is traced in their place computes the same, and only for methods that are known."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from compile_policy_transformers.base import find_components
from compile_policy_transformers.size_twins import TWINS, digest, sizes_together
from compile_policy_transformers.tiny import tiny_model


def _tower(model_type: str) -> PreTrainedModel:
    tower = next(f.module for f in find_components(tiny_model(model_type)) if f.role == "encoder[audio]")
    assert isinstance(tower, PreTrainedModel)
    return tower


@pytest.mark.parametrize("model_type", ["granite_speech", "granite_speech_plus"])
def test_padding_to_whole_blocks(model_type: str) -> None:
    """Attention in blocks is the same for every remainder of frames, none included."""
    tower: Any = _tower(model_type)
    attention = tower.layers[0].attn
    made = TWINS[0].made(inspect.unwrap(type(attention).forward))
    assert made is not None
    with torch.no_grad():
        for frames in range(1, 3 * attention.context_size + 2):
            x = torch.randn(2, frames, tower.config.hidden_dim)
            want = attention(x, attention_dists=tower.attention_dists)
            assert torch.equal(made(attention, x, attention_dists=tower.attention_dists), want)


def test_chunks_seen() -> None:
    """Which frames see which, for sizes of chunks from none to longer than the sound."""
    tower: Any = _tower("phi4_multimodal")
    made = TWINS[1].made(type(tower)._streaming_mask)
    assert made is not None
    for frames in (1, 2, 7, 12, 13, 31):
        for size, left in ((4, 0), (4, 1), (6, 2), (1, 3), (40, 18), (-1, 18)):
            want = tower._streaming_mask(frames, 2, size, left)
            assert torch.equal(made(tower, frames, 2, size, left), want), (frames, size, left)


def test_an_unknown_method_is_left_alone() -> None:
    """Other code under the same name has no twin; comments and places do not count."""

    class Changed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            remainder = x.shape[0] % self.context_size  # type: ignore[operator]
            return x[: x.shape[0] - remainder]

    with sizes_together(Changed()) as nothing:
        assert nothing is None
    module = Changed()
    with sizes_together(module):
        assert "forward" not in module.__dict__
    assert digest(len) == "" and len(digest(Changed.forward)) == 16


def test_instances_are_as_before() -> None:
    """Inside a trace the twins stand on the instances, where eager runs pass them by; afterwards they are gone."""
    tower: Any = _tower("phi4_multimodal")
    want = tower.eval()._streaming_mask(9, 2, 4, 1)
    with sizes_together(tower):
        assert "_streaming_mask" in tower.__dict__
        assert torch.equal(tower._streaming_mask(9, 2, 4, 1), want)
    assert "_streaming_mask" not in tower.__dict__
    with sizes_together(tower.train()):
        assert "_streaming_mask" not in tower.__dict__
