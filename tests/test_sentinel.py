"""Sampled calls compared with eager: what is wrong is caught, what is right is left alone, nothing is disturbed."""

from __future__ import annotations

import pytest
import torch
from falling import falls_back
from torch import nn

from compile_policy import CompilationConfig, apply, events, report
from compile_policy.applied import regions
from compile_policy.config import CompilationConfig as Config
from compile_policy.options import RegionOptions
from compile_policy.region import Region, SignatureBinder
from compile_policy.sentinel import Sentinel
from compile_policy_transformers import tiny_inputs, tiny_model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def watched(verify_calls: float) -> tuple[Net, Region]:
    net = Net()
    options = RegionOptions.from_config(Config(backend="eager", verify_calls=verify_calls))
    region = Region(net, role="component", binder=SignatureBinder.inferred(Net), options=options)
    region.attach()
    return net, region


def falsify(region: Region, factor: float) -> None:
    """Make every graph of the region wrong by a factor on one of its operations."""
    for entry in (e for found in region.entries.values() for e in found):
        right = entry.graph.code
        entry.graph.code = lambda *inputs, right=right: tuple(t * factor for t in right(*inputs))


@pytest.mark.parametrize(("verify_calls", "wanted"), [(3, [0, 1, 2]), (0.25, [0, 4, 8]), (1, [0])])
def test_calls_are_sampled_as_asked(verify_calls: float, wanted: list[int]) -> None:
    """A number means the first calls, a rate means one call in so many."""
    sentinel = Sentinel(verify_calls)
    assert [n for n in range(10) if sentinel.due()] == wanted


@torch.no_grad()
def test_a_factor_of_1001_thousandths_is_caught_and_told() -> None:
    """A component that turns wrong in use is turned off within the sample; the caller gets eager's result."""
    net, region = watched(0.5)
    x = torch.randn(5, 8)
    with region.pause():
        want = net(x)
    assert torch.equal(net(x), want)
    falsify(region, 1.001)
    told: list[events.Event] = []
    with events.listening(told.append), falls_back("the compiled graph is wrong"):
        results = [net(x) for _ in range(2)]
    assert torch.equal(results[-1], want)
    assert [e.kind for e in told if e.kind == "sentinel"] == ["sentinel"]
    assert "differs from eager by 0.0" in str(region.fallback)
    assert torch.equal(net(x), want)


@torch.no_grad()
def test_without_the_sentinel_the_same_fault_stays() -> None:
    """The control: unsampled, the wrong factor reaches the caller."""
    net, region = watched(1)
    x = torch.randn(5, 8)
    want = net(x)
    falsify(region, 1.001)
    assert not torch.equal(net(x), want)
    assert region.fallback is None


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_comparing_disturbs_nothing(cache: str) -> None:
    """With every call compared, tokens, graphs, the random state and the cache are as without."""
    model = tiny_model("gemma3")
    inputs = tiny_inputs(model, text_len=6, images=[(56, 56)])
    extra = {"cache_implementation": "static"} if cache == "static" else {}

    def answer() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(3)
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=True, pad_token_id=0, **extra)
        return tokens, torch.get_rng_state()

    plain, state = answer()
    apply(model, CompilationConfig(backend="aot_eager", verify_calls=100))
    tokens, state_now = answer()
    assert torch.equal(tokens, plain)
    assert torch.equal(state_now, state)
    assert regions(model)[0].condemned == ""
    assert report(model).components[0].graphs == 1


@pytest.mark.slow
@torch.no_grad()
def test_no_false_alarm_on_200_inputs_in_bfloat16() -> None:
    """Ordinary rounding of a compiled bf16 decoder is not mistaken for a fault."""
    model = tiny_model("llama").to(torch.bfloat16)
    apply(model, CompilationConfig(verify_calls=1000))
    for seed in range(200):
        ids = torch.randint(5, 100, (1 + seed % 3, 4 + seed % 17), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids, use_cache=True)
    region = regions(model)[0]
    assert (region.condemned, region.eager_calls) == ("", 0)
