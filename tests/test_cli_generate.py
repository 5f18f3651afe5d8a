"""`compile-policy generate` and `plan` on real tiny models: what they print is what happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import compile_policy
from compile_policy.cli import main

ROOT = Path(__file__).resolve().parents[1]
ROW = {"role", "qualname", "cls", "decision", "reason", "graphs", "calls", "compile_seconds", "fallback"}
# Capturing is what these tests are about; lowering with Inductor would only make them slow.
QUICK = ("-cc.backend=eager", "--max-new-tokens", "4")


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "noise.png"
    Image.effect_noise((96, 64), 90).save(path)
    return str(path)


def _json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    code = main([*argv, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    return found


def _component(found: dict[str, Any], role: str) -> dict[str, Any]:
    (row,) = [row for row in found["components"] if row["role"] == role]
    assert isinstance(row, dict)
    return row


def test_generate_json(capsys: pytest.CaptureFixture[str], picture: str) -> None:
    """One object on standard output: text, one row a component with one decoder graph, and the verdict."""
    found = _json(capsys, "generate", "tiny:qwen2_5_vl", "--image", picture, "--verify", *QUICK)
    assert set(found) == {"text", "components", "equal_to_eager"}
    assert len(json.loads(found["text"])) == 4
    assert found["equal_to_eager"] is True
    assert all(set(row) >= ROW for row in found["components"])
    decoder = _component(found, "decoder")
    assert (decoder["decision"], decoder["graphs"], decoder["calls"], decoder["fallback"]) == ("compile", 1, 4, None)
    assert _component(found, "encoder[image]")["decision"] == "eager"
    assert _component(found, "head")["decision"] == "skip"


def test_generate_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """Progress on standard error; the streamed answer, the table and the verdict on standard output."""
    assert main(["generate", "tiny:llama", "--verify", *QUICK]) == 0
    out, err = capsys.readouterr()
    assert "compiling decoder" in err
    assert "compiled decoder" in err
    lines = out.splitlines()
    assert len(lines[0].split()) == 4
    assert all(word.isdigit() for word in lines[0].split())
    assert lines[-1] == "equal to eager: yes"
    assert json.loads(_json(capsys, "generate", "tiny:llama", *QUICK)["text"]) == list(map(int, lines[0].split()))


def test_a_difference_is_said_and_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where eager gives other tokens, the verdict is no and the exit code 1."""

    @contextmanager
    def eager_with_other_weights(model: Any) -> Iterator[None]:
        with torch.no_grad():
            model.get_output_embeddings().weight.neg_()
        yield

    monkeypatch.setattr(compile_policy, "eager", eager_with_other_weights)
    assert main(["generate", "tiny:llama", "--verify", *QUICK]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "equal to eager: no"


def test_verify_runs_eager_for_real(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run makes the same four steps, and none of them goes through a compiled entry."""
    steps: list[int] = []
    compiled: list[int] = []
    original = compile_policy.eager

    @contextmanager
    def counted(model: Any) -> Iterator[None]:
        before = _compiled_calls(model)
        handle = model.get_output_embeddings().register_forward_hook(lambda *_: steps.append(1))
        with original(model):
            yield
        handle.remove()
        compiled.append(_compiled_calls(model) - before)

    monkeypatch.setattr(compile_policy, "eager", counted)
    assert main(["generate", "tiny:llama", "--verify", *QUICK]) == 0
    assert (len(steps), compiled) == (4, [0])


def _compiled_calls(model: Any) -> int:
    return sum(c.calls - c.eager_calls for c in compile_policy.report(model).components)


def test_picture_for_a_text_only_model(capsys: pytest.CaptureFixture[str], picture: str) -> None:
    """It is refused in one line, before anything compiles."""
    assert main(["generate", "tiny:llama", "--image", picture, *QUICK]) == 2
    err = capsys.readouterr().err
    assert "takes no pictures" in err
    assert "compiling" not in err


def test_encoder_wish(capsys: pytest.CaptureFixture[str]) -> None:
    """The flag reaches the plan; a model without an encoder cannot grant it."""
    with_flag = _json(capsys, "plan", "tiny:qwen2_5_vl", "--compile-mm-encoder")
    assert _component(with_flag, "encoder[image]")["decision"] == "compile"
    assert _component(_json(capsys, "plan", "tiny:qwen2_5_vl"), "encoder[image]")["decision"] == "eager"
    assert main(["plan", "tiny:llama", "--compile-mm-encoder"]) == 2
    assert "encoder" in capsys.readouterr().err


def test_plan_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """Class, decision and reason of every component."""
    assert main(["plan", "tiny:qwen2_5_vl"]) == 0
    out = capsys.readouterr().out
    for fact in ("decoder", "Qwen2_5_VLTextModel", "compile", "encoder[image]", "eager", "head", "skip"):
        assert fact in out


def test_kill_switch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``COMPILE_POLICY_DISABLE=1`` compiles nothing, and the answer is the same."""
    compiled = _json(capsys, "generate", "tiny:llama", *QUICK)
    monkeypatch.setenv("COMPILE_POLICY_DISABLE", "1")
    switched_off = _json(capsys, "generate", "tiny:llama", *QUICK)
    assert switched_off["text"] == compiled["text"]
    assert all(row["decision"] != "compile" and row["graphs"] == 0 for row in switched_off["components"])


def _command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "compile_policy.cli", *argv]


def _environment(**changes: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "HF_HUB_OFFLINE": "1"} | changes


def test_no_compiler_is_a_warning_and_eager(tmp_path: Path) -> None:
    """Without a C++ compiler the answer is eager's, one warning says why, and the exit code is 0."""
    ran = subprocess.run(
        _command("generate", "tiny:llama", "--max-new-tokens", "2", "--verify", "--json"),
        env=_environment(CXX="/nonexistent/g++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("warning: ") == 1
    assert "Traceback" not in ran.stderr
    found = json.loads(ran.stdout)
    assert found["equal_to_eager"] is True
    assert _component(found, "decoder")["fallback"]


def listen_to_interrupts() -> None:
    """A shell starts its background jobs, and so perhaps these tests, deaf to Ctrl-C; the child is not to be."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupt_while_compiling() -> None:
    """Ctrl-C during a compile ends the run with 130 and one word, not with a fallback and not with a traceback."""
    process = subprocess.Popen(
        _command("generate", "tiny:llama"),
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen_to_interrupts,
    )
    assert process.stderr is not None
    while not process.stderr.readline().startswith("compiling"):
        assert process.poll() is None
    time.sleep(1)  # a compile takes many times as long
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (128 + signal.SIGINT, "", "interrupted\n")


def test_strict_fails_where_something_ran_eager(capsys: pytest.CaptureFixture[str]) -> None:
    """The sentence counts the compiled calls; with --strict a fallback, or nothing to compile, ends with 1."""
    assert main(["generate", "tiny:llama", "--verify", "--strict", *QUICK]) == 0
    assert "4 of 4 decoder calls were compiled" in capsys.readouterr().out
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert main(["generate", "tiny:llama", "--verify", *QUICK]) == 0
        out, err = capsys.readouterr()
        assert "0 of 4 decoder calls were compiled" in out and "equal to eager: yes" in out
        assert "fell back" in out and "register it on the modules that it is for" in out
        assert err.count("warning: decoder model runs eager: a hook for all modules is registered") == 1
        assert main(["generate", "tiny:llama", "--strict", *QUICK]) == 1
    capsys.readouterr()
    assert main(["generate", "tiny:llama", "--strict", "-O0", *QUICK]) == 1
    assert "nothing of this model is to be compiled" in capsys.readouterr().out
