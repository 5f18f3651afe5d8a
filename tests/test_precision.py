"""Float32 precision: each of torch's ways of setting it is read without an error, and makes another entry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from compile_policy import CompilationConfig, compat
from compile_policy.compat_precision import float32_precisions, matmul_precision
from compile_policy.decorators import support_torch_compile, use_config
from compile_policy.region import region_of
from compile_policy.saving.machine import numerics

_OPERATIONS = [(backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")]
_backends: Any = torch.backends
WAYS: dict[str, Callable[[], Any]] = {
    "torch.backends": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "cuda.matmul": lambda: setattr(_backends.cuda.matmul, "fp32_precision", "tf32"),
    "mkldnn.matmul": lambda: setattr(_backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "cudnn.conv": lambda: setattr(_backends.cudnn.conv, "fp32_precision", "ieee"),
    "mkldnn.rnn": lambda: setattr(_backends.mkldnn.rnn, "fp32_precision", "bf16"),
    "allow_tf32": lambda: setattr(_backends.cuda.matmul, "allow_tf32", True),
    "cudnn.allow_tf32": lambda: setattr(_backends.cudnn, "allow_tf32", False),
    "set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("medium"),
}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The settings are afterwards as they were."""
    places = [("generic", "all"), *_OPERATIONS]
    before = {place: torch._C._get_fp32_precision_getter(*place) for place in places}
    yield
    torch.set_float32_matmul_precision("highest")
    for place, value in before.items():
        torch._C._set_fp32_precision_setter(*place, value)
    assert float32_precisions() == tuple(before[p] for p in _OPERATIONS if p[1] != "all")
    assert torch.get_float32_matmul_precision() == "highest"


@support_torch_compile
class Layer(nn.Module):
    """One product."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).relu()


def _layer(backend: str) -> Layer:
    with use_config(CompilationConfig(backend=backend, cache_dir=False)):
        return Layer().eval()


@pytest.mark.parametrize("way", WAYS)
def test_each_way_of_setting_the_precision_makes_another_entry(way: str) -> None:
    """No call raises or falls back, and neither does what an artifact is found by; a second call needs no entry."""
    layer, x = _layer("eager"), torch.randn(5, 8)
    region = region_of(layer)
    assert region is not None
    with torch.no_grad():
        layer(x)
        before = numerics()
        WAYS[way]()
        for _ in range(2):
            assert torch.equal(layer(x), layer.forward(x))
    report = region.report()
    assert (report.graphs, report.eager_calls, report.fallback) == (2, 0, None)
    assert numerics() != before


def test_inductor_compiles_under_the_newer_settings() -> None:
    """The default road, for which stock torch has to read the settings too."""
    layer, x = _layer("inductor"), torch.randn(5, 8)
    region = region_of(layer)
    assert region is not None
    _backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):  # what a reading by the older name does then
        torch.get_float32_matmul_precision()
    with torch.no_grad():
        for rows in (5, 3):
            torch.testing.assert_close(layer(x[:rows]), layer.forward(x[:rows]))
    report = region.report()
    assert (report.graphs, report.eager_calls, report.fallback) == (1, 0, None)
    assert dict(compat.modes())["float32 matmul precision"] == matmul_precision() == float32_precisions()
