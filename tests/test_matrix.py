"""The matrix: what it measures is what happened, and a page that is no longer true is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compile_policy.cli import main
from compile_policy.cli.matrix_page import page, reasons, row_lines
from compile_policy_transformers.matrix import TOLERANCE, matrix_types, measure

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
    assert llama["encoder"]["state"] == "absent"
    assert llama["control"] > 100 * TOLERANCE
    assert [role for role, _, _ in llama["components"]][:1] == ["decoder"]


def test_what_does_not_hold_has_its_reason() -> None:
    """A component that runs eager is told so, with the reason and the remedy of its event."""
    row = measure("bloom").to_dict()
    cell = row["decoder"]["dynamic"]
    assert (cell["state"], cell["eager_calls"] > 0) == ("eager", True)
    assert cell["reason"] and any("dynamic cache" in reason for reason in reasons(row))


def test_all_multimodal_types_and_some_text() -> None:
    """Sorted, each once; the ones that users have."""
    types = matrix_types()
    assert types == sorted(set(types)) and len(types) > 100
    assert {"qwen2_5_vl", "gemma3", "exaone4_5", "qwen2_5_omni", "llama"} <= set(types)


def test_the_page_and_its_check(llama: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is no longer what was measured fails the check."""
    monkeypatch.setattr("compile_policy.cli.matrix._measure_apart", lambda name, timeout: llama)
    file = tmp_path / "models.md"
    assert main(["matrix", "llama", "--out", str(file)]) == 0
    text = file.read_text()
    assert row_lines(llama)[0] == "| `llama` | 1 | 1 | 1 | - | bites |  |" and row_lines(llama)[0] in text
    assert main(["matrix", "llama", "--check", str(file)]) == 0
    file.write_text(text.replace("| `llama` | 1 | 1", "| `llama` | 2 | 1"))
    assert main(["matrix", "llama", "--check", str(file)]) == 1


def test_a_run_that_was_stopped_goes_on(llama: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are done are not measured again; once all are, what was kept is gone."""
    measured: list[str] = []

    def apart(name: str, timeout: float) -> dict[str, Any]:
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
    assert row_lines(row) == ["| `x` | | | | | | a \\| b &lt;script> |"]
    assert "<script>" not in page([row], VERSIONS)


def test_an_unknown_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2."""
    assert main(["matrix", "llamma"]) == 2
    assert "no architecture 'llamma'" in capsys.readouterr().err
