"""The matrix: what it measures is what happened, and a page that is no longer true is noticed."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from calling_decoders import RemembersAmong, model_with
from rich.console import Console

from compile_policy.cli import main
from compile_policy.cli.matrix import versions
from compile_policy.cli.matrix_page import lines_about, page, reasons, row_lines, table, totals
from compile_policy_transformers import matrix
from compile_policy_transformers.matrix import (
    KINDS,
    NEW_TOKENS,
    TOLERANCE,
    _attempt,
    _cells,
    _control,
    matrix_types,
    measure,
)
from compile_policy_transformers.matrix_requests import prompts_of
from compile_policy_transformers.tiny import tiny_inputs, tiny_model
from compile_policy_transformers.tiny.videos import VIDEOS

VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}


@pytest.fixture(scope="module")
def llama() -> dict[str, Any]:
    return measure("llama").to_dict()


def test_a_decoder_that_holds(llama: dict[str, Any]) -> None:
    """One graph for each kind of cache, every call compiled, and a comparison that would notice an ignored mask."""
    for kind in ("none", "dynamic", "static"):
        cell = llama["decoder"][kind]
        assert (cell["state"], cell["graphs"], cell["eager_calls"]) == ("ok", 1, 0)
        assert cell["calls"] >= cell["requests"] == 6
        assert cell["error"] <= TOLERANCE
    assert {cell["state"] for cell in llama["encoders"].values()} == {"absent"}
    assert llama["control"] > 100 * TOLERANCE
    assert [role for role, _, _ in llama["components"]][:1] == ["decoder"]


def test_what_does_not_hold_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A component that runs eager is told so, with the reason and the remedy of its event."""
    monkeypatch.setattr(matrix, "tiny_model", lambda model_type: model_with(RemembersAmong))
    row = measure("made_up").to_dict()
    cell = row["decoder"]["none"]
    assert (cell["state"], cell["eager_calls"] > 0, bool(cell["remedy"])) == ("eager", True, True)
    assert any("before this line a model inside was called" in reason for reason in reasons(row))


def test_a_model_that_needs_a_picture_has_requests() -> None:
    """It says so before it says that it takes no sound."""
    prompts = prompts_of(tiny_model("kosmos-2"))
    assert prompts and all("pixel_values" in prompt for prompt in prompts)


def test_requests_with_a_video() -> None:
    """One alone and one beside a picture, for models that watch; a model that takes no mixture keeps the first."""
    asked = {name: prompts_of(tiny_model(name)) for name in ("qwen2_5_vl", "molmo2", "llava")}
    beside = {name: ["pixel_values" in p for p in prompts if VIDEOS in p] for name, prompts in asked.items()}
    assert beside == {"qwen2_5_vl": [False, True], "molmo2": [False], "llava": []}
    assert all(len(prompts) >= 6 for prompts in asked.values())


@torch.no_grad()
def test_what_padding_gives_does_not_count() -> None:
    """Nobody reads it, and fully masked rows differ between kernels; every other position counts."""
    model = tiny_model("llama")
    prompt = next(p for p in prompts_of(model) if not p["attention_mask"].all())
    (found,) = _attempt(model, prompt, "none")
    whole = model(**prompt).logits
    assert len(found) == prompt["attention_mask"].sum() < whole.shape[0] * whole.shape[1]
    assert torch.equal(found[-1], whole[-1, -1])


@torch.no_grad()
def test_static_caches_are_as_long_in_both_passes() -> None:
    """A model keeps the longest length it was asked for; gpt_neo counts the window of its local layers from the end."""
    model = tiny_model("gpt_neo")
    prompts = [tiny_inputs(model, text_len=tokens) for tokens in (8, 23)]
    cell = _cells(model, prompts, "static", {"decoder": ("decoder",)})["decoder"]
    assert (cell.state, cell.graphs) == ("ok", 1)


class _Model(torch.nn.Module):
    """Logits are the tokens, and picture and padding if they are told; the first token is forbidden."""

    def __init__(self, sees: bool) -> None:
        super().__init__()
        self.sees = sees

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor) -> Any:
        logits = torch.stack([input_ids + 0.0, attention_mask.sum(-1, keepdim=True) + input_ids * 0.1], dim=-1)
        logits = logits + pixel_values.mean() if self.sees else logits
        logits[..., 0] = torch.finfo(logits.dtype).min
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(("sees", "bites"), [(True, True), (False, False)])
def test_every_control_has_to_bite(sees: bool, bites: bool) -> None:
    """A picture that changes nothing is not made up for by padding that does; forbidden tokens hide nothing."""
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    prompt = {"input_ids": torch.tensor([[3, 4, 5], [5, 4, 3]]), "attention_mask": mask, "pixel_values": torch.ones(1)}
    found = _control(cast(Any, _Model(sees)), [prompt])
    assert 0.0 <= found < 10.0 and (found > 0.1) == bites


def test_all_multimodal_types_and_some_text() -> None:
    """Sorted, each once; the ones that users have."""
    types = matrix_types()
    assert types == sorted(set(types)) and len(types) > 100
    assert {"qwen2_5_vl", "gemma3", "exaone4_5", "qwen2_5_omni", "llama"} <= set(types)


def test_the_page_and_its_check(llama: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is no longer what was measured fails the check."""
    monkeypatch.setattr("compile_policy.cli.matrix._measure_apart", lambda sheet, name, timeout, store: llama)
    file = tmp_path / "models.md"
    assert main(["matrix", "llama", "--out", str(file)]) == 0
    text = file.read_text()
    assert row_lines(llama) == ["| `llama` | 1 | 1 | 1 | - | - | bites |"] == lines_about("llama", text)
    assert main(["matrix", "llama", "--check", str(file)]) == 0
    file.write_text(text.replace("| `llama` | 1 | 1", "| `llama` | 2 | 1"))
    assert main(["matrix", "llama", "--check", str(file)]) == 1
    file.write_text(text + "- `llama`, static: a reason that is no longer there.\n")
    assert main(["matrix", "llama", "--check", str(file)]) == 1
    file.write_text(text.replace("| `llama` | 1 | 1 | 1 | - | - | bites |\n", ""))
    assert main(["matrix", "llama", "--check", str(file)]) == 1


def test_a_run_that_was_stopped_goes_on(llama: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are done are not measured again; once all are, what was kept is gone."""
    measured: list[str] = []

    def apart(sheet: Any, name: str, timeout: float, store: str) -> dict[str, Any]:
        measured.append(name)
        if name == "qwen3" and len(measured) < 3:
            raise KeyboardInterrupt
        return {**llama, "model_type": name}

    monkeypatch.setattr("compile_policy.cli.matrix._measure_apart", apart)
    command = ["matrix", "llama", "qwen3", "--jobs", "1", "--out", str(tmp_path / "models.md")]
    assert main(command) == 130
    assert main(command) == 0
    assert measured == ["llama", "qwen3", "qwen3"]
    assert [file.name for file in tmp_path.iterdir()] == ["models.md"]


def test_names_cannot_break_the_table() -> None:
    """A reason with a bar, a tag or a line break stays in its cell."""
    row = {"model_type": "x", "obstacle": "a | b\n<script>"}
    assert row_lines(row) == ["| `x` | | | | | | |", "- `x`: a \\| b &lt;script>"]
    assert "<script>" not in page([row], VERSIONS)


def _cell(state: str, **more: Any) -> dict[str, Any]:
    return {"state": state, "graphs": 1, "reason": "", "remedy": "", "place": "", **more}


def _row(name: str, decoder: dict[str, Any], **encoders: Any) -> dict[str, Any]:
    cells = {"vision": _cell("absent"), "audio": _cell("absent"), **encoders}
    return {"model_type": name, "decoder": dict.fromkeys(("none", "dynamic", "static"), decoder), "encoders": cells}


ROWS = [
    {**_row("alpha", _cell("ok"), audio=_cell("idle", reason="nothing reaches it")), "control": 1.0},
    {
        **_row("beta", _cell("eager", reason="a loop", place="modeling_beta.py:7", remedy="Mask.")),
        "control": 1.0,
        "videos": 2,
    },
    {**_row("gamma", _cell("graphs", graphs=3), vision=_cell("wrong")), "control": 0.0},
    {"model_type": "delta", "obstacle": "cannot be built: it needs timm"},
]


def test_totals_and_reasons_on_the_page() -> None:
    """Totals count what was measured and name the exceptions; a reason has its columns, its line and its remedy."""
    assert totals(ROWS) == [
        ("decoder, no cache: one graph, equal", 1, 3, ["beta (eager)", "gamma (3)"]),
        ("decoder, dynamic cache: one graph, equal", 1, 3, ["beta (eager)", "gamma (3)"]),
        ("decoder, static cache: one graph, equal", 1, 3, ["beta (eager)", "gamma (3)"]),
        ("image and video encoders: one graph, equal", 0, 1, ["gamma (wrong)"]),
        ("audio encoders: one graph, equal", 0, 0, []),
        ("everything equal to eager", 2, 3, ["gamma"]),
        ("the comparison would notice a fault", 2, 3, ["gamma"]),
    ]
    text = page(ROWS, VERSIONS)
    assert "| `beta` | eager | eager | eager | - | - | bites |" in text
    assert "- `beta`, no cache, dynamic, static: a loop (modeling_beta.py:7). Mask." in text
    assert "- `gamma`, image/video: differs from eager." in text and "- `delta`: cannot be built" in text
    assert "| decoder, no cache: one graph, equal | 1 of 3 | beta (eager), gamma (3) |" in text
    assert "Given videos too, 1: beta." in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_a_terminal(width: int) -> None:
    """No line is cut off, and every column has its title in full."""
    rows = [{**row, "model_type": f"{row['model_type']:x<24}"} for row in ROWS]
    console = Console(file=io.StringIO(), width=width)
    console.print(table(rows))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(title in text for title in ("no cache", "dynamic", "static", "image/video", "audio", "control"))
    assert "…" not in text and max(map(len, text.splitlines())) <= width


#: Cheap to measure and varied: text alone, no tower, fixed pictures, grids, stacks, sound, encoder-decoders.
FAST = (
    *("llama", "bloom", "fuyu", "internvl", "janus", "molmo2", "deepseek_vl", "blip-2", "vision-encoder-decoder"),
    *("qwen2_vl", "voxtral", "fast_vlm"),
)
PAGE = Path(__file__).parent.parent / "docs" / "models.md"


def _needs_these_versions() -> None:
    here = page([], versions()).splitlines()[4]
    if here not in PAGE.read_text(encoding="utf-8"):
        pytest.skip("docs/models.md was measured with other versions")


@pytest.mark.parametrize("model_type", FAST)
def test_the_page_is_true(model_type: str) -> None:
    """What is measured now is what docs/models.md says."""
    _needs_these_versions()
    torch._dynamo.reset()
    text = PAGE.read_text(encoding="utf-8")
    assert row_lines(measure(model_type).to_dict()) == lines_about(model_type, text)


@pytest.mark.slow
def test_the_whole_page_is_true() -> None:
    """``compile-policy matrix --check`` over all architectures."""
    _needs_these_versions()
    assert main(["matrix", "--check", str(PAGE)]) == 0


@pytest.mark.parametrize("wish", ["--check", "--out"])
def test_a_page_that_cannot_be_is_refused_at_once(
    wish: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line and exit code 2, before anything is measured."""
    monkeypatch.setattr("compile_policy.cli.matrix._measured", lambda *args: pytest.fail("measured"))
    assert main(["matrix", "llama", wish, str(tmp_path / "none" / "page.md")]) == 2
    assert "error: no " in capsys.readouterr().err


def test_an_unknown_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, before anything is measured, with what may have been meant."""
    assert main(["matrix", "llama", "llamma"]) == 2
    said = capsys.readouterr().err
    assert "No architecture 'llamma'." in said and "Did you mean llama" in said


def test_an_architecture_that_is_not_in_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Any causal language model of Transformers is measured by its name."""
    assert "stablelm" not in matrix_types()
    assert main(["matrix", "stablelm", "--here", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert [row["decoder"][kind]["state"] for kind in KINDS] == ["ok"] * 3


@pytest.mark.slow
def test_a_static_cache_with_attention_written_out() -> None:
    """t5gemma2 generates over a static cache with that attention alone: it is measured so, and not left out."""
    model = tiny_model("t5gemma2")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cell = _cells(model, prompts_of(model)[:2], "static", {"decoder": ("decoder",)})["decoder"]
    assert (cell.state, cell.graphs, cell.requests) == ("ok", 1, 2), cell
    assert model.config._attn_implementation != "eager"


@pytest.mark.slow
def test_models_that_answer_without_logits() -> None:
    """Block diffusion gives no logits: those of every step of denoising are compared."""
    model = tiny_model("diffusion_gemma")
    with torch.no_grad():
        logits = _attempt(model, prompts_of(model)[0], "dynamic")
    assert len(logits) == NEW_TOKENS and all(step.dim() == 3 for step in logits)
