"""Architectures whose decoders differ from the common form: as few graphs as their code allows, never eager, equal."""

from __future__ import annotations

import warnings

import pytest
import torch

from compile_policy.applied import apply, remove, report
from compile_policy.config import CompilationConfig
from compile_policy.events import Event, listening
from compile_policy_transformers.matrix import KINDS, TOLERANCE, _attempt, _cells, _difference
from compile_policy_transformers.matrix_requests import prompts_of
from compile_policy_transformers.tiny import tiny_model

DECODER = {"decoder": ("decoder",)}
#: Architecture, kind of cache, most graphs.
FAST = [
    ("vision-encoder-decoder", "dynamic", 1),
    ("vision-encoder-decoder", "static", 1),
    ("hunyuan_vl", "dynamic", 1),
    ("instructblip", "none", 1),
    ("mllama", "dynamic", 1),
    ("bloom", "dynamic", 1),
    ("kosmos-2", "dynamic", 1),
]
SLOW = [
    *((name, kind, 1) for name in ("florence2", "pp_formulanet") for kind in KINDS),
    *((name, kind, 1) for name in ("t5gemma2", "blip", "udop") for kind in ("none", "dynamic")),
    *((name, kind, 1) for name in ("mllama", "bloom", "cohere_compass", "paligemma") for kind in KINDS),
    *((name, kind, 1) for name in ("kosmos-2.5", "pix2struct", "step3p7") for kind in KINDS),
    ("kosmos-2", "none", 1),
    ("blip-2", "none", 1),
    ("inkling_mm_model", "dynamic", 1),
    ("granite4_vision", "none", 1),
    ("granite4_vision", "dynamic", 1),
    ("instructblipvideo", "none", 1),
    *(("qwen3_5", kind, 1) for kind in ("dynamic", "static")),
    *(("dots3_note", kind, 1) for kind in ("dynamic", "static")),
    *(("lfm3_vl", kind, 1) for kind in ("dynamic", "static")),
]


def _measured(model_type: str, kind: str, most: int) -> None:
    model = tiny_model(model_type)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        cell = _cells(model, prompts_of(model), kind, DECODER)["decoder"]
    assert cell.calls > 0 and cell.eager_calls == 0, cell
    assert cell.graphs <= most and cell.error <= TOLERANCE, cell


@pytest.mark.parametrize(("model_type", "kind", "most"), FAST)
def test_few_graphs(model_type: str, kind: str, most: int) -> None:
    _measured(model_type, kind, most)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "kind", "most"), SLOW)
def test_few_graphs_slow(model_type: str, kind: str, most: int) -> None:
    _measured(model_type, kind, most)


#: Kinds of decoders, each through code that Inductor writes: linear attention, per-layer inputs and sliding windows,
#: cross-attention, state spaces, encoder-decoders, latent attention, experts.
LOWERED = ("qwen3_5", "gemma4", "mllama", "jamba", "mamba2", "florence2", "udop", "deepseek_v3", "gpt_oss")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", LOWERED)
@torch.no_grad()
def test_lowered_by_default(model_type: str) -> None:
    """The default configuration: ahead of time, one graph for two requests through `generate`, equal to eager."""
    torch._dynamo.reset()
    model = tiny_model(model_type)
    told: list[Event] = []
    with warnings.catch_warnings(), listening(told.append):
        warnings.simplefilter("ignore")
        prompts = prompts_of(model)[:2]
        expected = [_attempt(model, prompt, "dynamic") for prompt in prompts]
        apply(model, CompilationConfig())
        try:
            got = [_attempt(model, prompt, "dynamic") for prompt in prompts]
            rows = [c for c in report(model).components if c.decision == "compile"]
        finally:
            remove(model)
    assert [(c.graphs, c.eager_calls) for c in rows] == [(1, 0)] * len(rows) and sum(c.calls for c in rows) > 0
    assert [e.data["road"] for e in told if e.kind == "compile_end"] == ["ahead"] * len(rows)
    for ours, theirs in zip(got, expected, strict=True):
        assert not isinstance(ours, Exception) and _difference(ours, theirs) <= TOLERANCE
