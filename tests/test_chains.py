"""Towers that go through their layers and their pictures themselves: the layers are one graph, and one module."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.hunyuan_vl.modeling_hunyuan_vl import HunYuanVLVisionBlock, HunYuanVLVisionTransformer

import compile_policy as cp
from compile_policy_transformers import picture_convolution
from compile_policy_transformers.chains import LayerChain, chain_name
from compile_policy_transformers.picture_convolution import convolve_pictures, convolving
from compile_policy_transformers.stacks import stacks_of
from compile_policy_transformers.tiny import tiny_inputs, tiny_model

PICTURES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((56, 84),),
    ((56, 84), (56, 56)),
    ((56, 56), (84, 56), (56, 112)),
    ((84, 140),),
)

pytestmark = pytest.mark.filterwarnings("ignore::compile_policy.errors.PolicyWarning")


class _Layer(nn.Module):
    def forward(self, hidden_states: torch.Tensor, by: Any = 1.0) -> torch.Tensor:
        return hidden_states + by


class _Tower(nn.Module):
    def __init__(self, n: int = 2) -> None:
        super().__init__()
        self.n, self.layers, self.others = n, nn.ModuleList([_Layer(), _Layer()]), nn.ModuleList([_Layer()])


class _Plain(_Tower):
    def forward(self, x: torch.Tensor, by: float) -> torch.Tensor:
        for block in self.layers:
            x = block(x, by=by)
        return x


class _Counted(_Tower):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _, layer in enumerate(self.layers[: self.n]):
            x = layer(x, self.n)
        return x


class _Picking(_Tower):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)[0]
        return x


class _PickingAnother(_Tower):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)[1]
        return x


class _ByNumber(_Tower):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, by=i)
        return x


class _Collecting(_Tower):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return found


class _Residual(_Tower):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, by=x)
        return x


class _FromTheFirst(_Tower):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y = layer(x)
        return y


class _Called(_Tower):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, by=torch.rand(()))
        return x


class _Last(_Tower):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return layer(x)


class _TwoLists(_Tower):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        for layer in self.others:
            x = layer(x)
        return x


@pytest.mark.parametrize("tower", [_Plain, _Counted, _Picking])
def test_loops_that_are_chains(tower: type[_Tower]) -> None:
    assert chain_name(tower()) == "layers"


@pytest.mark.parametrize(
    "tower", [_ByNumber, _PickingAnother, _Collecting, _Residual, _FromTheFirst, _Called, _Last, _TwoLists]
)
def test_loops_that_are_none(tower: type[_Tower]) -> None:
    """Something is made between the layers, or they get arguments of their own, or the loop is not alone."""
    assert chain_name(tower()) is None


class _Block(HunYuanVLVisionBlock):
    """A layer that calls its states otherwise, and returns more than they are."""

    def forward(self, x: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return super().forward(x, **kwargs), None


class _Elsewhere(HunYuanVLVisionTransformer):
    """A tower that nobody knows, of the same shape: other names, its pictures joined in another way."""

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        x = self.embeddings(pixel_values, grid_thw)
        bounds = torch.nn.functional.pad(grid_thw.prod(dim=1).cumsum(0), (1, 0)).int()
        for block in self.layers:
            x = block(x, attention_mask=None, cu_seqlens=bounds)[0]
        found, start = [], 0
        for t, h, w in grid_thw:
            stop = start + int(t * h * w)
            found.append(self.patch_merger(x[:, start:stop], size=(int(h), int(w))))
            start = stop
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=torch.cat(found, dim=1))


def _unknown() -> PreTrainedModel:
    model = tiny_model("hunyuan_vl")
    model.model.vision_tower.__class__ = _Elsewhere
    for block in model.model.vision_tower.layers:
        block.__class__ = _Block
    return model


def _features(model: PreTrainedModel) -> list[torch.Tensor]:
    with cp.eager(model):  # making inputs runs the tower, to see how many tokens a picture becomes
        made = [tiny_inputs(model, text_len=8, images=sizes, seed=seed) for seed, sizes in enumerate(PICTURES)]
    with torch.no_grad():
        out = [model.model.vision_tower(x["pixel_values"], grid_thw=x["image_grid_thw"]) for x in made]
    return [t for o in out for t in (o.last_hidden_state, o.pooler_output) if t is not None]


def _layers_row(model: PreTrainedModel) -> Any:
    return next(r for r in cp.report(model).components if r.qualname.endswith("vision_tower.layers"))


def test_a_tower_that_nobody_knows() -> None:
    """One graph over counts and sizes, equal to eager; everybody but the tower's loop sees the layers."""
    model = _unknown()
    tower = model.model.vision_tower
    want, names = _features(model), list(model.state_dict())
    torch._dynamo.reset()
    cp.apply(model, cp.CompilationConfig(backend="eager", compile_mm_encoder=True))
    torch.testing.assert_close(_features(model), want, atol=1e-4, rtol=1e-3)
    row = _layers_row(model)
    assert (row.graphs, row.calls, row.eager_calls, row.fallback) == (1, len(PICTURES), 0, None)
    assert [type(layer).__name__ for layer in tower.layers] == ["_Block"] * 2 and len(tower.layers) == 2
    assert list(model.state_dict()) == names
    cp.apply(model, cp.CompilationConfig(backend="eager", compile_mm_encoder=True))  # the same plan again
    assert _layers_row(model).decision == "compile"
    with cp.eager(model):
        torch.testing.assert_close(_features(model), want, atol=0, rtol=0)
    cp.remove(model)
    assert type(tower.layers) is nn.ModuleList and type(pickle.loads(pickle.dumps(tower.layers))) is nn.ModuleList
    torch.testing.assert_close(_features(model), want, atol=0, rtol=0)


def test_a_copy_has_plain_layers() -> None:
    """A copy of a model under the policy goes through its own layers."""
    model = _unknown()
    cp.apply(model, cp.CompilationConfig(backend="eager", compile_mm_encoder=True))
    want = _features(model)
    other = copy.deepcopy(model)
    torch.testing.assert_close(_features(other), want, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_convolution_over_packed_pictures(seed: int) -> None:
    """What the stock module computes picture by picture, for any pictures and videos."""
    module = next(m for m in tiny_model("lfm3_vl").modules() if picture_convolution._is_known(m))
    generator = torch.Generator().manual_seed(seed)
    merge = module.spatial_merge_size
    rows = torch.randint(1, 5, (1 + seed, 3), generator=generator) * torch.tensor([1, merge, merge])
    states = torch.randn(int(rows.prod(dim=1).sum()), module.in_proj.in_features, generator=generator)
    with torch.no_grad():
        before, after, inner = module.in_proj(states).chunk(3, dim=-1)
        mixed = convolve_pictures(before * inner, module.spatial_conv.weight, rows, merge)
        assert torch.equal(module.out_proj(after * mixed), module(states, rows.tolist()))


def test_a_convolution_of_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left as it is, and the layers run eager."""
    model = tiny_model("lfm3_vl")
    want = _features(model)
    monkeypatch.setattr(picture_convolution, "_FORWARD", "another")
    layers = model.model.vision_tower.layers
    with convolving(layers):
        assert not any("forward" in vars(m) for m in layers.modules())
    cp.apply(model, cp.CompilationConfig(backend="eager", compile_mm_encoder=True))
    torch.testing.assert_close(_features(model), want, atol=0, rtol=0)
    assert _layers_row(model).eager_calls >= len(PICTURES) - 1  # it serves one number of pictures at most


def test_hooks_on_a_convolution_are_run() -> None:
    """One that somebody looks into is not left out."""
    layers = tiny_model("lfm3_vl").model.vision_tower.layers
    module = next(m for m in layers.modules() if picture_convolution._is_known(m))
    handle = module.spatial_conv.register_forward_hook(lambda *_: None)
    assert not picture_convolution._is_known(module)
    handle.remove()
    with convolving(layers):
        assert "forward" in vars(module)
    assert "forward" not in vars(module)


def test_towers_without_such_a_loop_over_pictures_stay_whole() -> None:
    for model_type in ("qwen2_vl", "glm4v", "kimi_k25"):  # their layers are chains too
        tower = tiny_model(model_type).get_encoder("image")
        assert chain_name(tower) and stacks_of(tower) == []


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["lfm3_vl", "hunyuan_vl"])
def test_through_inductor(model_type: str) -> None:
    model = tiny_model(model_type)
    want = _features(model)
    torch._dynamo.reset()
    cp.apply(model, cp.CompilationConfig(compile_mm_encoder=True))
    torch.testing.assert_close(_features(model), want, atol=1e-4, rtol=1e-3)
    row = _layers_row(model)
    assert (row.graphs, row.calls, row.eager_calls, row.fallback) == (1, len(PICTURES), 0, None)
    assert isinstance(model.model.vision_tower.layers, LayerChain)
