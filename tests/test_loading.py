"""`load_model`: from a name to a model under the policy, or to an error that says what to do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

import compile_policy as cp
from compile_policy.applied import regions
from compile_policy.errors import InputError
from compile_policy_transformers.loading import EMBEDDED, load_processor
from compile_policy_transformers.tiny import tiny_inputs, tiny_model

CONFIG = cp.CompilationConfig(backend="eager")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny model."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _decoder_regions(model: PreTrainedModel) -> list[str]:
    return [r.role for r in regions(model)]


def test_folder(folder: Path) -> None:
    """A local folder gives the saved weights, in eval mode, with the decoder compiled."""
    model = cp.load_model(str(folder), config=CONFIG)
    saved = tiny_model("llama")
    assert not model.training and _decoder_regions(model) == ["decoder"]
    inputs = tiny_inputs(saved, text_len=8)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), saved.generate(**inputs, max_new_tokens=5))
    assert cp.report(model).components[0].graphs == 1


def test_arguments_of_the_loader(folder: Path) -> None:
    """Keyword arguments reach `from_pretrained`."""
    model = cp.load_model(str(folder), config=CONFIG, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype is torch.bfloat16 and model.config._attn_implementation == "eager"
    inputs = tiny_inputs(model, text_len=8)
    got = model.generate(**inputs, max_new_tokens=5)
    with cp.eager(model):
        assert torch.equal(model.generate(**inputs, max_new_tokens=5), got)
    row = cp.report(model).components[0]
    assert (row.graphs, row.eager_calls) == (1, 0)


def test_tiny_models() -> None:
    """``tiny:`` builds random weights, the same ones every time."""
    one, two = (cp.load_model("tiny:qwen2_5_vl", config=CONFIG) for _ in range(2))
    assert _decoder_regions(one) == ["decoder"]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_unknown_tiny_model() -> None:
    """A misspelt model type is an error that names it."""
    with pytest.raises(ValueError, match=r"qwen2_5_lv.*qwen2_5_vl"):
        cp.load_model("tiny:qwen2_5_lv", config=CONFIG)


@pytest.mark.parametrize("name", ["/no/such/folder", "no-such-organisation/no-such-model"])
def test_missing_model(name: str) -> None:
    """A place that is not there is an error that names it."""
    with pytest.raises(InputError, match=re.escape(name)):
        cp.load_model(name, config=CONFIG)


def test_empty_folder(tmp_path: Path) -> None:
    """A folder without a model is an error that names the missing file."""
    with pytest.raises(InputError, match=r"config\.json|model type|Unrecognized"):
        cp.load_model(str(tmp_path), config=CONFIG)


def test_folder_without_weights(folder: Path) -> None:
    """A configuration without weights is an error, not a model of random numbers."""
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        cp.load_model(str(folder), config=CONFIG)


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_cut_weights(folder: Path, size: int) -> None:
    """Weights that end too early, as a full disk leaves them, are an error and not a model."""
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(InputError, match=r"(?i)header|safetensors|incomplete|invalid|corrupt"):
        cp.load_model(str(folder), config=CONFIG)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "no_such_type"}', "{}"])
def test_broken_configuration(folder: Path, text: str) -> None:
    """A configuration that cannot be read, or names no known architecture, is an error about the configuration."""
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"(?i)json|config|model.type|no_such_type|model_type"):
        cp.load_model(str(folder), config=CONFIG)


def test_no_class_is_left_decorated_after_an_error(folder: Path) -> None:
    """A load that fails leaves nothing behind: the next model of the class is an ordinary one."""
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError):
        cp.load_model(str(folder), config=CONFIG)
    assert _decoder_regions(tiny_model("llama")) == []


def test_a_class_that_does_not_generate(folder: Path) -> None:
    """A checkpoint that names a class unknown to Transformers falls back on the class of its model type."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["OfSomebodyElse"]}))
    model = cp.load_model(str(folder), config=CONFIG)
    assert type(model).__name__ == "LlamaForCausalLM" and _decoder_regions(model) == ["decoder"]


def test_plan_reads_no_weights(folder: Path) -> None:
    """A plan needs the configuration only, of a folder, of a tiny model and of the embedded one."""
    (folder / "model.safetensors").unlink()
    for name in (str(folder), "tiny:llama", None):
        plan = cp.plan(name, config=CONFIG)
        assert [c.role for c in plan.compiled()] == ["decoder"]


# -- the embedded model -----------------------------------------------------------------------------------------------


def _demo() -> tuple[str, str | None]:
    """Question and answer that the model ships with; a question of our own where it ships none."""
    described = EMBEDDED / "demo.json"
    if not described.exists():
        return "What shape is the red object?", None
    demo: dict[str, Any] = json.loads(described.read_text())
    return demo.get("prompt", "What shape is the red object?"), demo.get("answer")


@pytest.mark.parametrize("encoder", [False, True])
@pytest.mark.filterwarnings("ignore:Encoder compilation is experimental")
def test_embedded_model_answers(encoder: bool) -> None:
    """Without a name the embedded model is loaded; it answers its demo question as eager does, from one graph."""
    question, expected = _demo()
    model = cp.load_model(config=cp.CompilationConfig(backend="eager", compile_mm_encoder=encoder))
    processor = load_processor()
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    picture = Image.open(EMBEDDED / "demo.png").convert("RGB")
    inputs = processor(images=[picture], text=[prompt], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=16)
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert answer and (expected is None or answer.lower() == expected.lower())
    with cp.eager(model):
        assert torch.equal(model.generate(**inputs, max_new_tokens=16), tokens)
    compiled = [c for c in cp.report(model).components if c.decision == "compile"]
    assert len(compiled) == 1 + encoder and all((c.graphs, c.eager_calls) == (1, 0) for c in compiled)


def test_embedded_model_is_small_and_complete() -> None:
    """At most 6 MB of weights, with tokenizer, processor and chat template beside them."""
    assert (EMBEDDED / "model.safetensors").stat().st_size <= 6 * 2**20
    names = {p.name for p in EMBEDDED.iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "demo.png"} <= names


def test_embedded_model_survives_copying(tmp_path: Path) -> None:
    """The embedded folder is an ordinary checkpoint: copied elsewhere it loads by its path."""
    shutil.copytree(EMBEDDED, tmp_path / "copy")
    model = cp.load_model(str(tmp_path / "copy"), config=CONFIG)
    assert _decoder_regions(model) == ["decoder"] and load_processor(str(tmp_path / "copy")) is not None
