"""What holds on a CPU holds on a GPU: the same tests through Inductor, on each device.

Run on a machine with a GPU by ``pytest -m gpu``; the CPU's half is slow and keeps the tests themselves honest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import compile_policy as cp
from compile_policy_transformers.tiny import tiny_inputs, tiny_model

DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
PICTURES = ((), ((56, 84),), ((56, 56), (84, 56)))
NEW_TOKENS = 6

pytestmark = [pytest.mark.timeout(1200), pytest.mark.filterwarnings("ignore:Encoder compilation is experimental")]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    torch._dynamo.reset()
    yield request.param


def _model(model_type: str, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    model: Any = tiny_model(model_type, seed=seed)
    return model.to(device=device, dtype=dtype)


def _request(model: Any, number: int) -> dict[str, Any]:
    """Text alone; a picture and padding; two pictures, more padding."""
    inputs = tiny_inputs(model, text_len=7 + 3 * number, images=PICTURES[number], batch=number + 1, seed=number)
    return {name: value.to(model.device) for name, value in inputs.items()}


def _generate(model: Any, inputs: Mapping[str, Any], cache: str | None) -> torch.Tensor:
    how = {} if cache is None else {"cache_implementation": cache}
    with torch.no_grad():
        tokens: torch.Tensor = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **how)
    return tokens


def _rows(model: Any) -> dict[str, Any]:
    return {c.role: c for c in cp.report(model).components if c.decision == "compile"}


@pytest.mark.parametrize("cache", [None, "static"], ids=str)
@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "gemma3", "llava"])
def test_tokens_and_graphs(model_type: str, cache: str | None, device: str) -> None:
    """Decoder and tower compiled: eager's tokens, one graph each, nothing eager."""
    model = _model(model_type, device)
    requests = [_request(model, n) for n in range(len(PICTURES))]
    want = [_generate(model, inputs, cache) for inputs in requests]
    cp.apply(model, cp.CompilationConfig(compile_mm_encoder=True, cache_dir=False, on_fault="error"))
    for inputs, tokens in zip(requests, want, strict=True):
        assert torch.equal(_generate(model, inputs, cache), tokens)
    for role, row in _rows(model).items():
        assert (row.graphs, row.eager_calls, row.fallback) == (1, 0, None), role


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype: torch.dtype, device: str) -> None:
    """Logits of a padded batch within half precision's rounding of eager's; without the mask they are not."""
    model = _model("qwen2_5_vl", device, dtype)
    inputs = {n: v.to(dtype) if v.is_floating_point() else v for n, v in _request(model, 2).items()}
    with torch.no_grad():
        want = model(**inputs).logits[:, -1].float()
        unmasked = model(**{**inputs, "attention_mask": None}).logits[:, -1].float()
        cp.apply(model, cp.CompilationConfig(cache_dir=False, on_fault="error"))
        got = model(**inputs).logits[:, -1].float()
    scale = want.abs().max()
    assert (got - want).abs().max() <= 0.05 * scale < (unmasked - want).abs().max()
    assert _rows(model)["decoder"].graphs == 1


def test_a_second_model_loads_what_the_first_left(device: str, tmp_path: Path) -> None:
    """Another instance, with other weights, finds the entry on disk: no capture, eager's tokens."""
    config = cp.CompilationConfig(cache_dir=tmp_path / "store", on_fault="error")
    for seed, graphs in ((0, 1), (1, 0)):
        model = _model("llama", device, seed=seed)
        inputs = _request(model, 0)
        want = _generate(model, inputs, None)
        cp.apply(model, config)
        assert torch.equal(_generate(model, inputs, None), want)
        row = _rows(model)["decoder"]
        assert (row.graphs, row.loaded, row.eager_calls) == (graphs, 1 - graphs, 0)


def test_another_device_is_another_entry(device: str) -> None:
    """A model that moves is compiled for where it is, or runs eager with a reason, and never with the wrong code."""
    model = _model("llama", "cpu")
    cp.apply(model, cp.CompilationConfig(backend="eager", cache_dir=False))
    here = _generate(model, _request(model, 0), None)
    model.to(device)
    assert torch.equal(_generate(model, _request(model, 0), None).cpu(), here)
    assert _rows(model)["decoder"].graphs == (1 if device == "cpu" else 2)


@pytest.mark.gpu
def test_the_kernels_are_those_of_the_device() -> None:
    """On a GPU the graph becomes kernels for it; a whole tower needs no call back to the host for its attention."""
    model = _model("qwen2_5_vl", "cuda")
    cp.apply(model, cp.CompilationConfig(compile_mm_encoder=True, cache_dir=False, on_fault="error"))
    inputs = _request(model, 1)
    _generate(model, inputs, None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        _generate(model, inputs, None)
    assert any("triton" in event.key for event in profile.key_averages())
