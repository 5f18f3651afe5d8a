"""Arguments that nobody reads: they make no call of their own, and those that somebody reads do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compile_policy import CompilationConfig
from compile_policy.applied import apply, remove, report
from compile_policy_transformers.tiny import tiny_inputs, tiny_model
from compile_policy_transformers.unread import without_unread


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("vision_aspect_ratio", "anyres_max_9", False),  # of the model around the tower
        ("return_dict", True, False),  # what it returns anyway
        ("return_dict", False, True),
        ("output_hidden_states", True, True),
        ("output_hidden_states", False, False),  # as the configuration has it
        ("use_cache", True, True),
        ("is_causal", True, True),  # attention looks for it
        ("interpolate_pos_encoding", True, True),  # in its signature
        ("never_heard_of", 3, True),  # a number is not in the form that is proved
    ],
)
def test_what_a_tower_does_not_read(name: str, value: object, kept: bool) -> None:
    tower = tiny_model("llava_onevision").model.vision_tower
    assert (name in without_unread(tower, {"pixel_values": 1, name: value})) is kept


def test_an_output_that_the_configuration_asks_for() -> None:
    """Then an explicit no is no default."""
    tower = tiny_model("llava_onevision").model.vision_tower
    tower.config.output_hidden_states = True
    assert "output_hidden_states" in without_unread(tower, {"output_hidden_states": False})


def test_code_without_source_may_read_everything() -> None:
    """Of a class that was made in a string nothing is known."""
    namespace: dict[str, type[nn.Module]] = {}
    exec(
        "class Tower(nn.Module):\n    def forward(self, x, **kwargs): return x",
        {"nn": nn, "__name__": __name__ + "_"},
        namespace,
    )
    assert without_unread(namespace["Tower"](), {"mode": "a"}) == {"mode": "a"}


def test_a_forward_in_the_place_of_another_counts() -> None:
    """Its code is looked at too, wherever it stands."""
    tower = tiny_model("llava_onevision").model.vision_tower
    layer = tower.encoder.layers[0]
    before = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        assert kwargs.get("wish_of_mine") is None
        return before(*args, **kwargs)

    assert "wish_of_mine" not in without_unread(tower, {"wish_of_mine": "a"})
    layer.forward = forward
    assert "wish_of_mine" in without_unread(tower, {"wish_of_mine": "a"})


@pytest.mark.filterwarnings("ignore:Encoder compilation is experimental")
@pytest.mark.parametrize("model_type", ["llava_onevision", "glm_ocr"])
@torch.no_grad()
def test_pictures_and_videos_share_a_graph(model_type: str) -> None:
    """The model hands its tower other arguments with a video than with a picture, which say nothing to it."""
    model = tiny_model(model_type)
    prompts = [tiny_inputs(model, text_len=9, images=[(56, 84)]), tiny_inputs(model, text_len=7, videos=[(4, 56, 56)])]
    expected = [model(**prompt).logits for prompt in prompts]
    apply(model, CompilationConfig(backend="eager", compile_mm_encoder=True))
    try:
        got = [model(**prompt).logits for prompt in prompts]
        (tower,) = [c for c in report(model).components if c.role == "encoder[image]"]
    finally:
        remove(model)
    assert (tower.graphs, tower.calls, tower.eager_calls) == (1, 2, 0)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
