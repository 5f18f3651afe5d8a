"""Every example runs as its first lines say, and prints what it promises."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
# Long by nature, or parts of the training recipe; those are run by hand.
NOT_SHORT = {"train_shapes_vlm.py", "shapes.py"}
SHORT = sorted(p.relative_to(EXAMPLES).as_posix() for p in EXAMPLES.rglob("*.py") if p.name not in NOT_SHORT)


def _main(name: str) -> Any:
    path = EXAMPLES / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # as a script's module is: Dynamo looks a global up by the module's name
    spec.loader.exec_module(module)
    return module.main


def test_the_examples_are_there() -> None:
    """One example for a picture, one for several, one for a class of one's own."""
    wanted = {"offline_inference/vision_language.py", "offline_inference/vision_language_multi_image.py"}
    assert wanted | {"decorate_a_class.py"} <= set(SHORT)


@pytest.mark.parametrize("name", SHORT)
def test_examples_are_short(name: str) -> None:
    """One file of about 35 lines that says in its docstring what it shows, with a ``main``."""
    text = (EXAMPLES / name).read_text()
    code = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(code) <= 50
    assert text.startswith('"""') and "def main(" in text and 'if __name__ == "__main__":' in text


def test_decorate_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    """Every shape is equal to eager, from one graph."""
    _main("decorate_a_class.py")(backend="eager")
    out = capsys.readouterr().out
    assert out.count("equal to eager: True") == 3 and "graphs: 1" in out


def test_one_picture(capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model answers, its decoder is one graph, its encoder stays eager."""
    answer = _main("offline_inference/vision_language.py")(backend="eager")
    out = capsys.readouterr().out
    assert answer and answer in out
    assert "decoder: compile, graphs: 1" in out and "encoder[image]: eager, graphs: 0" in out


@pytest.mark.filterwarnings("ignore:Encoder compilation is experimental")
def test_several_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    """One by one and in one batch the answers are the same, from one graph of decoder and encoder each."""
    answers = _main("offline_inference/vision_language_multi_image.py")(backend="eager")
    out = capsys.readouterr().out
    assert len(answers) == 2 and all(answers) and f"in one batch: {answers}" in out
    assert "decoder: compile, graphs: 1" in out and "encoder[image]: compile, graphs: 1" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_examples_as_written(name: str, tmp_path: Path) -> None:
    """Each example runs in a separate process, with the settings it has."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
