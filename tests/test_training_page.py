"""The examples of docs/training.md run and print what the page says, and the example script trains as eager does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(encoding="utf-8"), re.DOTALL)
#: What each prints: one graph of training; no graph after the first round; the adapters alone have gradients.
PRINTED = (r"1", r"\[(\d+), \1, \1\]", r"\['lora_A', 'lora_B'\]")


def _printed(code: str, capsys: pytest.CaptureFixture[str]) -> str:
    exec(compile(code, "docs/training.md", "exec"), {"__name__": "example"})
    return capsys.readouterr().out.strip()


def test_there_are_three() -> None:
    """Each has what it prints."""
    assert len(EXAMPLES) == len(PRINTED) == 3


@pytest.mark.parametrize("number", [0, 1, 2])
def test_examples_of_the_page_captured(
    number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the captured graphs run operator by operator, which is cheap."""
    pytest.importorskip("peft")
    code = EXAMPLES[number].replace("cp.apply(model)", "cp.apply(model, EAGER)")
    code = code.replace('cp.apply(tiny_model("llama"))', 'cp.apply(tiny_model("llama"), EAGER)')
    assert "EAGER" in code
    code = code.replace("EAGER", 'cp.CompilationConfig(backend="eager")')
    assert re.fullmatch(PRINTED[number], _printed(code, capsys))


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 2])
def test_examples_of_the_page(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """As they stand there, through Inductor."""
    pytest.importorskip("peft")
    assert re.fullmatch(PRINTED[number], _printed(EXAMPLES[number], capsys))


@pytest.mark.slow
def test_the_embedded_model_is_fine_tuned_as_eager_does() -> None:
    """Thirty steps from the same seed end at the same loss, to four digits, with one graph."""
    command = [sys.executable, str(ROOT / "examples" / "fine_tune.py"), "30"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr[-2000:]
    eager, compiled = map(float, re.findall(r"(?:eager|compiled) (\d+\.\d+)", done.stdout))
    assert "decoder: compile, graphs 1" in done.stdout
    assert abs(eager - compiled) <= 1e-4 * eager
