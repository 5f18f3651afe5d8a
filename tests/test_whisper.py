"""An architecture that is in no table: sound in, text out, with a decoder that attends to the encoder's output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from compile_policy.applied import apply, report
from compile_policy.config import CompilationConfig
from compile_policy.reference import relative_error
from compile_policy_transformers import cache_pairs

pytestmark = pytest.mark.filterwarnings("ignore::compile_policy.errors.PolicyWarning")

BINS, FRAMES = 16, 100


@pytest.fixture
def whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes |= {"d_model": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": 320}
    sizes |= {"num_mel_bins": BINS, "max_source_positions": FRAMES // 2, "max_target_positions": 40}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **tokens)).eval()
    model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    with torch.no_grad():
        for p in model.parameters():
            p *= 4 if p.dim() > 1 else 1
    return model


def _answers(model: Any) -> list[torch.Tensor]:
    """Logits of forwards and of texts, for one to three pieces of sound."""
    draw = torch.Generator().manual_seed(0)
    out = []
    for rows, length in ((1, 4), (2, 9), (3, 1)):
        sound = torch.randn(rows, BINS, FRAMES, generator=draw)
        text = torch.randint(3, 250, (rows, length), generator=draw)
        out.append(model(input_features=sound, decoder_input_ids=text).logits)
        wish = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        said = model.generate(input_features=sound, **wish, output_logits=True, return_dict_in_generate=True)
        out += said.logits
    return out


@torch.no_grad()
def test_one_graph_each_for_decoder_and_encoder(whisper: Any) -> None:
    """The body, which takes the sound and holds the decoder, is not taken for the encoder."""
    want = _answers(whisper)
    apply(whisper, CompilationConfig(backend="eager", compile_mm_encoder=True))
    got = _answers(whisper)
    assert max(relative_error(g, w) for g, w in zip(got, want, strict=True)) < 1e-4
    rows = {
        c.role: (c.qualname, c.graphs, c.eager_calls) for c in report(whisper).components if c.decision == "compile"
    }
    assert rows == {"decoder": ("model.decoder", 1, 0), "encoder[audio]": ("model.encoder", 1, 0)}


@torch.no_grad()
def test_an_argument_that_cannot_be_read_runs_eager(whisper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong while a call is brought to its form, the user's call is run all the same."""
    want = _answers(whisper)
    apply(whisper, CompilationConfig(backend="eager"))

    def fails(self: Any, value: Any, out: Any, path: str) -> Any:
        raise AttributeError("no such state")

    monkeypatch.setattr(cache_pairs._PairAdapter, "flatten", fails)
    assert all(map(torch.equal, _answers(whisper), want))
    (row,) = (c for c in report(whisper).components if c.role == "decoder")
    assert row.graphs == 0 and "no such state" in row.fallback
