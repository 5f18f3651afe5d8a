"""What the command line prints: every fact at every width, and control codes only where they belong."""

from __future__ import annotations

import io
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
from rich.console import Console

from compile_policy import events
from compile_policy.cli.progress import progress
from compile_policy.cli.streaming import AnswerStreamer
from compile_policy.cli.tables import print_report
from compile_policy.cli.terminal import Terminal, clean
from compile_policy.errors import PolicyWarning

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
    "loaded": 0,
    "state": "compiled",
    "remedy": "",
}


def _command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "compile_policy.cli", *argv]


def _environment(**changes: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "HF_HUB_OFFLINE": "1"} | changes


# -- what is printed --------------------------------------------------------------------------------------------------


def _printed(width: int, *rows: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, emoji=False, markup=False)
    print_report(console, rows)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 160])
def test_report_at_every_width(width: int) -> None:
    """Every fact is there, no line is longer than the screen; reasons move below a narrow table."""
    text = _printed(width, ROW, ROW | {"role": "encoder[image]", "graphs": 0})
    assert max(map(len, text.splitlines())) <= width
    for whole in ("encoder[image]", "graphs", "calls", "compile s", "fallback", "none"):
        assert whole in text
    squeezed = "".join(text.split())
    for fact in ("decoder", "compile", "alwayscompiled.", "12.3"):
        assert fact in squeezed
    if width >= 160:
        titles = text.splitlines()[0].split()
        for title in ("component", "class", "state", "reason", "graphs", "calls", "eager", "compile", "fallback"):
            assert title in titles


@pytest.mark.parametrize("width", [60, 80, 200])
def test_what_happened_is_what_the_table_shows(width: int) -> None:
    """A component that fell back never reads ``compile`` alone; one from the store says so, without compile seconds."""
    fell = ROW | {"state": "fell back", "eager_calls": 3, "fallback": "it branches", "remedy": "Write it over."}
    text = _printed(width, fell)
    lines = [line for line in text.splitlines() if "always" not in line]
    assert "fell back" in text and "it branches" in text and "Write it over." in text
    assert not any("compile" in line.split() and "fell back" not in line and "compile s" not in line for line in lines)
    loaded = _printed(width, ROW | {"graphs": 0, "loaded": 1, "compile_seconds": 0.0})
    assert "1 loaded" in loaded and "0.0" not in loaded and "compiled" in loaded
    both = _printed(width, ROW | {"graphs": 2, "loaded": 1})
    assert "2 + 1 loaded" in both and "12.3" in both


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
        warnings.warn("encoder[image] v runs eager: no compiler. Install g++.", PolicyWarning, stacklevel=1)
        warnings.warn("[bold]skipped[/bold]", PolicyWarning, stacklevel=1)
        warnings.warn("noise", UserWarning, stacklevel=1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "compiling decoder m ...",
        "compiled decoder m in 2.2 s",
        "compiling encoder[image] v ...",
        "warning: encoder[image] v runs eager: no compiler. Install g++.",
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
    code = "import signal, sys, compile_policy.cli.app as a\n"
    code += "a.parse_flags = lambda words: signal.raise_signal(signal.SIGINT)\nsys.exit(a.main(['config']))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=_environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job is started deaf to it
    )
    assert ran.returncode == 128 + signal.SIGINT
    assert ran.stderr == "interrupted\n"
