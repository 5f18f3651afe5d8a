"""The command line: one line and a remedy for every mistake, clean output wherever it goes, the truth in the table."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from compile_policy import events
from compile_policy.cli import main
from compile_policy.cli.inputs import check_model, open_picture, question_for
from compile_policy.cli.progress import progress
from compile_policy.cli.streaming import AnswerStreamer
from compile_policy.cli.tables import print_report
from compile_policy.cli.terminal import Terminal, clean
from compile_policy.errors import InputError, PolicyWarning

ROOT = Path(__file__).resolve().parents[1]
ROW = {
    "role": "decoder",
    "qualname": "model.language_model",
    "cls": "Qwen2_5_VLTextModel",
    "decision": "compile",
    "reason": "The language decoder is always compiled.",
    "graphs": 1,
    "calls": 7,
    "eager_calls": 0,
    "compile_seconds": 12.345,
    "fallback": None,
}


def _command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "compile_policy.cli", *argv]


def _environment(**changes: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "HF_HUB_OFFLINE": "1"} | changes


def _fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that is the user's mistake; returns its one line."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    return err


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["generate", "--imag", "x"], "--image?"),
        (["generate", "--compile-mm-encodr"], "--compile-mm-encoder?"),
        (["gnerate"], "'generate'?"),
        (["config", "-cc.moda=1"], "Did you mean 'mode'?"),
        (["config", "-cc.mode=fast"], "mode: input should be a valid integer, got 'fast' (from flag -cc.mode)"),
        (["config", "-cc.dynamic_arg_dims.A.x=no"], "dynamic_arg_dims.A.x: "),
        (["config", "-O0", "--compile-mm-encoder"], "compile_mm_encoder"),
        (["config", "--compilation-config", "absent.yaml"], "absent.yaml"),
        (["generate", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["plan", "./no/such/folder"], "no model folder './no/such/folder'"),
        (["generate", "./no/such/folder", "--json"], "no model folder"),
        (["generate", "tiny:llama", "--image", "absent.png"], "no picture absent.png"),
        (["plan", "tiny:qwen2_5_vll"], "qwen2_5_vl"),
        (["plan", "nobody/such-model-exists"], "nobody/such-model-exists"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    """Each is one line that names the thing, with exit code 2 and nothing on standard output."""
    assert says in _fails(capsys, *argv)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """With ``--debug``, anywhere, the traceback comes first; the exit code stays."""
    assert main(["config", "--debug", "-cc.moda=1"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "ConfigError" in err


def test_unsupported_versions_are_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An old Transformers stops the run before it is imported."""
    monkeypatch.setattr("importlib.metadata.version", {"torch": "2.13.0", "transformers": "4.57.0"}.__getitem__)
    line = _fails(capsys, "plan", "tiny:llama")
    assert "transformers 4.57.0 is not supported" in line
    assert "pip install" in line


def _weights(folder: Path, data: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(data)
    return folder


def test_damaged_model_folders(tmp_path: Path) -> None:
    """No configuration, a broken one, and weights cut anywhere are refused by file; a whole folder passes."""
    save_file({"w": torch.zeros(8)}, tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    check_model(str(_weights(tmp_path / "m", good)))
    for data in (b"", good[:4], good[:20], good[:-1], good + b"x", b"\xff" * 8 + good[8:], b"\x02" + bytes(7) + b"[]"):
        with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
            check_model(str(_weights(tmp_path / "m", data)))
    (tmp_path / "m/config.json").write_text('{"model_type": ')
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        check_model(str(tmp_path / "m"))
    (tmp_path / "m/config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json is not"):
        check_model(str(tmp_path / "m"))
    with pytest.raises(InputError, match="is a file"):
        check_model(str(tmp_path / "good.safetensors"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        check_model(str(tmp_path / "empty"))
    for fine in (None, "tiny:llama", "owner/name", "gpt2"):
        check_model(fine)


def test_unreadable_pictures(tmp_path: Path) -> None:
    """0 bytes, no picture at all, cut in the middle, a folder: each in one sentence; a good one opens as RGB."""
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 48), 90).save(whole)
    name, image = open_picture(str(whole))
    assert (name, image.mode, image.size) == ("whole.png", "RGB", (64, 48))
    for name, data, says in (
        ("empty.png", b"", "0 bytes"),
        ("text.png", b"not a picture", "not a picture"),
        ("cut.png", whole.read_bytes()[:1500], "cannot be read"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=says) as caught:
            open_picture(str(tmp_path / name))
        assert name in str(caught.value)
        assert caught.value.remedy
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        open_picture(str(tmp_path))


def test_what_is_asked(tmp_path: Path) -> None:
    """The embedded model comes with a picture and a question; another model needs at least a question."""
    Image.new("RGB", (32, 24)).save(tmp_path / "demo.png")
    (tmp_path / "demo.json").write_text('{"image": "demo.png", "prompt": "How many?", "answer": "two"}')
    demo = question_for(None, [], None, tmp_path)
    assert (demo.prompt, demo.pictures[0].name, demo.pictures[0].image.size) == ("How many?", "demo.png", (32, 24))
    own = open_picture(str(tmp_path / "demo.png"))._replace(name="own.png")
    assert question_for(None, [], "What colour?", tmp_path).pictures[0].name == "demo.png"
    assert [name for name, _ in question_for(None, [own], None, tmp_path).pictures] == ["own.png"]
    assert question_for("owner/name", [], "Hi", tmp_path).pictures == ()
    assert question_for("owner/name", [own], None, tmp_path).prompt
    with pytest.raises(InputError, match="nothing to ask"):
        question_for("owner/name", [], None, tmp_path)


# -- configuration ----------------------------------------------------------------------------------------------------


def test_config_shows_origins(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment and the flags reach the configuration, and each value says where it came from."""
    monkeypatch.setenv("COMPILE_POLICY_MAX_ENTRIES", "3")
    assert main(["config", "-O1", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["mode"] == {"value": 1, "origin": "flag -O1"}
    assert values["max_entries"] == {"value": 3, "origin": "environment COMPILE_POLICY_MAX_ENTRIES"}
    assert values["backend"] == {"value": "inductor", "origin": "default"}
    assert main(["-O1", "config"]) == 0
    assert "environment COMPILE_POLICY_MAX_ENTRIES" in capsys.readouterr().out


def test_help_names_everything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The help of a command lists its options and the configuration's flags."""
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["generate", "--help"]) == 0
    out = capsys.readouterr().out
    for flag in ("--image", "--verify", "--dump-graphs", "--json", "--compile-mm-encoder", "-cc.FIELD=VALUE", "-O3"):
        assert flag in out
    assert main([]) == 0
    assert "generate" in capsys.readouterr().out


# -- what is printed --------------------------------------------------------------------------------------------------


def _printed(width: int, *rows: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, emoji=False, markup=False)
    print_report(console, rows)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 160])
def test_report_at_every_width(width: int) -> None:
    """Every fact is there, no line is longer than the screen; reasons move below a narrow table."""
    text = _printed(width, ROW)
    assert max(map(len, text.splitlines())) <= width
    squeezed = "".join(text.split())
    for fact in ("decoder", "compile", "alwayscompiled.", "12.3"):
        assert fact in squeezed
    if width >= 160:
        titles = text.splitlines()[0].split()
        for title in ("component", "class", "decision", "reason", "graphs", "calls", "compile", "fallback"):
            assert title in titles


def test_names_cannot_draw() -> None:
    """Markup in a class name stays text, and control characters are dropped."""
    text = _printed(160, ROW | {"cls": "[red]Evil[/red]\x1b[2J", "fallback": "failed\x07 [bold]because[/bold]"})
    assert "[red]Evil[/red][2J" in text
    assert "[bold]because[/bold]" in text
    assert not any(c in text for c in "\x1b\x07")
    assert clean("a\x00b\r\x9bc\td\ne\u4f60") == "abc\td\ne\u4f60"


def test_streamer_writes_each_token_once() -> None:
    """The prompt is skipped, half a character is held back, and what was held back comes at the end."""
    text = {(): "", (1,): "two", (1, 2): "two \ufffd", (1, 2, 3): "two \u00e9", (1, 2, 3, 4): "two \u00e9\ufffd"}
    written: list[str] = []
    streamer = AnswerStreamer(lambda ids: text[tuple(ids)], written.append)
    for value in ([9, 9, 9], [1], [2], [3], [4]):
        streamer.put(torch.tensor(value))
    assert written == ["two", " \u00e9"]
    streamer.end()
    assert "".join(written) == "two \u00e9\ufffd"


def test_progress_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Events are plain lines on standard error; one warning told twice is printed once; foreign warnings are not."""
    with progress(Terminal()):
        events.emit("compile_start", "decoder m", "compiling")
        events.emit("compile_end", "decoder m", "compiled", seconds=2.25)
        events.emit("compile_start", "encoder[image] v", "compiling")
        events.emit(
            "fallback", "encoder[image] v", "runs eager: no compiler", reason="no compiler", remedy="Install g++."
        )
        events.emit(
            "fallback", "encoder[image] v", "runs eager: no compiler", reason="no compiler", remedy="Install g++."
        )
        warnings.warn("[bold]skipped[/bold]", PolicyWarning, stacklevel=1)
        warnings.warn("noise", UserWarning, stacklevel=1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "compiling decoder m ...",
        "compiled decoder m in 2.2 s",
        "compiling encoder[image] v ...",
        "warning: encoder[image] v: runs eager: no compiler Install g++.",
        "warning: [bold]skipped[/bold]",
    ]


def test_progress_does_not_cut_a_streamed_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A compile in the middle of an answer starts on a line of its own."""
    terminal = Terminal()
    with progress(terminal):
        terminal.stream("two red")
        events.emit("compile_start", "decoder m", "compiling")
        terminal.stream(" circles")
        terminal.close_line()
    out, _ = capsys.readouterr()
    assert out == "two red\n circles\n"


def test_no_listener_is_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    """After the block, also after an error in it, events and warnings go where they went before."""
    before = warnings.showwarning
    with pytest.raises(RuntimeError, match="boom"), progress(Terminal()):
        raise RuntimeError("boom")
    events.emit("compile_start", "decoder m", "compiling")
    assert capsys.readouterr().err == ""
    assert warnings.showwarning is before


# -- on a terminal ----------------------------------------------------------------------------------------------------

_COMPILING = """
import time
from compile_policy import events
from compile_policy.cli.progress import progress
from compile_policy.cli.terminal import Terminal
with progress(Terminal()):
    events.emit("compile_start", "decoder m", "compiling")
    time.sleep(0.3)
    {then}
"""


def _on_a_pty(command: list[str], **environment: str) -> tuple[int, str]:
    """Run on a pseudo terminal; returns the exit code and everything that was written to it."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=_environment(**environment)
    )
    os.close(follower)
    with os.fdopen(leader, "rb", buffering=0) as screen:
        written = b"".join(_read(screen.fileno()))
    return process.wait(timeout=60), written.decode()


def _read(screen: int) -> Iterator[bytes]:
    while select.select([screen], [], [], 60)[0]:
        try:
            data = os.read(screen, 4096)
        except OSError:  # how Linux says that the other side has closed
            return
        if not data:
            return
        yield data


def test_a_terminal_gets_a_spinner_and_its_cursor_back() -> None:
    """The cursor is hidden while the spinner turns and shown again, also when the block ends in an interrupt."""
    for then in ("pass", "raise KeyboardInterrupt"):
        _, written = _on_a_pty([sys.executable, "-c", _COMPILING.format(then=then)], TERM="xterm-256color")
        assert "compiling decoder m" in written
        assert "\x1b[?25l" in written
        assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_no_color_and_dumb_terminals() -> None:
    """NO_COLOR takes the colours away, TERM=dumb every control code."""
    code, coloured = _on_a_pty(_command("config", "-O1"), TERM="xterm-256color", COLUMNS="100")
    assert code == 0
    assert "\x1b[1m" in coloured
    _, dumb = _on_a_pty(_command("config", "-O1"), TERM="dumb", COLUMNS="100")
    assert "\x1b" not in dumb
    assert "flag -O1" in dumb
    _, dumb = _on_a_pty([sys.executable, "-c", _COMPILING.format(then="pass")], TERM="dumb")
    assert "\x1b" not in dumb
    code, plain = _on_a_pty(_command("config", "-cc.moda=1"), TERM="xterm-256color", NO_COLOR="1")
    assert code == 2
    assert "\x1b[31m" not in plain
    assert "\x1b[1;31m" not in plain


def test_narrow_terminal() -> None:
    """Twenty columns are no reason for an exception."""
    code, _ = _on_a_pty(_command("config"), TERM="xterm-256color", COLUMNS="20")
    assert code == 0


def test_an_encoding_without_the_characters() -> None:
    """Where standard output is ASCII, what it lacks is replaced."""
    ran = subprocess.run(
        _command("config", "-cc.debug_dump_path=/tmp/\u4f60"),
        env=_environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0"),
        capture_output=True,
    )
    assert ran.returncode == 0, ran.stderr.decode()
    assert b"/tmp/?" in ran.stdout


def test_reader_that_leaves() -> None:
    """``compile-policy ... | head -0`` ends without a traceback."""
    process = subprocess.Popen(_command("config"), env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    process.wait(timeout=60)


def test_interrupt() -> None:
    """Ctrl-C ends with 130 and one word."""
    code = "import signal, sys, compile_policy.cli.app as a; a.config\n"
    code += "a.parse_flags = lambda words: signal.raise_signal(signal.SIGINT)\nsys.exit(a.main(['config']))"
    ran = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, text=True)
    assert ran.returncode == 128 + signal.SIGINT
    assert ran.stderr == "interrupted\n"
