"""What a command costs before it does anything, and that every mistake names the help of the right command."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from compile_policy.cli import main
from compile_policy.cli.commands import COMMANDS, Command, load_command

ROOT = Path(__file__).resolve().parents[1]
#: What takes longer to import than these commands should take.
HEAVY = ("torch", "transformers", "numpy", "PIL", "jinja2", "huggingface_hub", "sympy")


def _loaded(folder: Path, *argv: str) -> tuple[int, list[str]]:
    """Exit code of a command in a fresh process, and which heavy packages it imported."""
    code = f"""
import json, sys
from compile_policy.cli import main
code = main({list(argv)!r})
print(json.dumps([code, [name for name in {HEAVY!r} if name in sys.modules]]))
"""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "HOME": str(folder), "PATH": "/usr/bin:/bin"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    code_, heavy = json.loads(ran.stdout.splitlines()[-1])
    return code_, heavy


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["gnerate"], 2),
        (["generate", "--imag"], 2),
        (["-cc.moda=1", "config"], 2),
        (["generate", "--help"], 0),
        (["graphs", "--help"], 0),
        (["graphs", "ls", "/nowhere"], 2),
        (["cache", "ls"], 0),
        (["cache", "doctor"], 0),
        (["cache", "gc"], 0),
        (["cache", "clear", "--yes"], 0),
        (["cache", "why-miss", "abc"], 2),
    ],
)
def test_nothing_heavy_is_imported(tmp_path: Path, argv: list[str], code: int) -> None:
    """Help, versions, mistakes, dumps and the cache need neither torch nor what comes with it."""
    assert _loaded(tmp_path, *argv) == (code, [])


def test_a_command_that_needs_torch_imports_it(tmp_path: Path) -> None:
    """The same look at a command that lists layers finds torch: the measure measures."""
    code, heavy = _loaded(tmp_path, "layers", "ls", "--json")
    assert code == 0
    assert "torch" in heavy


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_their_help_says(name: str) -> None:
    """A help line that stands beside the name, so that nothing is imported for it, is the command's own."""
    command = COMMANDS[name]
    found = load_command(command)
    said = found.info.help if command.group else inspect.cleandoc(found.__doc__ or "").split("\n\n")[0]
    assert " ".join(said.split()) == command.help
    assert isinstance(found, typer.Typer) == command.group


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands whose modules were not imported are listed like the one that was."""
    monkeypatch.setenv("COLUMNS", "200")
    for argv in (["--help"], []):
        assert main(argv) == 0
        out = capsys.readouterr().out
        for name, command in COMMANDS.items():
            assert name in out
            assert command.help in out
    assert isinstance(command, Command)


@pytest.mark.parametrize(
    ("argv", "where"),
    [
        (["gnerate"], "compile-policy --help"),
        (["generate", "--imag", "x"], "compile-policy generate --help"),
        (["generate", "--max-new-tokens", "no"], "compile-policy generate --help"),
        (["graphs", "stts"], "compile-policy graphs --help"),
        (["graphs", "stats"], "compile-policy graphs stats --help"),
        (["graphs", "stats", "x", "--top", "0"], "compile-policy graphs stats --help"),
        (["cache", "gc", "--limt", "1"], "compile-policy cache gc --help"),
        (["--vresion"], "compile-policy --help"),
    ],
)
def test_usage_errors_name_the_help_of_the_command(
    capsys: pytest.CaptureFixture[str], argv: list[str], where: str
) -> None:
    """One line, exit code 2, and the help of the command that was used wrongly."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.rstrip().endswith(f"See {where}.")


def test_python_m_compile_policy() -> None:
    """``python -m compile_policy`` is the command."""
    ran = subprocess.run(
        [sys.executable, "-m", "compile_policy", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.startswith("compile-policy ")


def test_a_prompt_for_a_model_without_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be read is refused, not left out."""
    assert main(["generate", "tiny:llama", "--prompt", "hi"]) == 2
    err = capsys.readouterr().err
    assert "cannot read a prompt" in err
    assert "--prompt out" in err


def test_a_missing_model_is_said_before_a_missing_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is wrong is the first thing to mend."""
    assert main(["generate", "nosuch/model"]) == 2
    err = capsys.readouterr().err
    assert "nosuch/model" in err
    assert "nothing to ask" not in err
