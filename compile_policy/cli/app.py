"""The program: takes the configuration's flags out, hands the rest to a command, and turns errors into one line."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from compile_policy.cli.commands import add_commands
from compile_policy.cli.session import Session
from compile_policy.cli.terminal import Terminal
from compile_policy.errors import PolicyError
from compile_policy.flags import parse_flags

USER_MISTAKE = 2
INTERRUPTED = 130

# Taken out of the command line before typer sees it, so typer can neither list them nor offer them as near matches.
_CONFIGURATION_FLAGS = ("--compile-mm-encoder", "--no-compile-mm-encoder", "--compilation-config", "--debug")
# Paragraphs, because typer joins the lines of one.
_EPILOG = "\n\n".join(
    (
        "Configuration, with any command; later wins, and 'compile-policy config' shows what came out:",
        "--compile-mm-encoder, --no-compile-mm-encoder: vision and audio encoders too, or not",
        "-O0 to -O3: the level; 0 eager, 1 repeated blocks alone, 2 all, equal blocks once, 3 in one piece, autotuned",
        "-cc.FIELD=VALUE, -cc '{\"FIELD\": VALUE}': any field",
        "--compilation-config FILE: YAML or JSON; below variables COMPILE_POLICY_<FIELD>, which are below flags",
        "--debug: tracebacks, and warnings of other packages",
    )
)


def _program(words: Sequence[str]) -> typer.Typer:
    """The program, with the command that ``words`` name."""
    app = typer.Typer(
        add_completion=False, rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]}
    )
    app.callback(invoke_without_command=True, epilog=_EPILOG)(_root)
    add_commands(app, words, epilog=_EPILOG)
    return app


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Compile a Transformers model component by component: one graph each, equal to eager, and a reason for all."""
    if version:
        print(f"compile-policy {_installed_version()}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def _installed_version() -> str:
    import importlib.metadata  # imports email

    try:
        return importlib.metadata.version("compile-policy")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed, run from its source)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 good, 1 failed, 2 the user's mistake, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    terminal = Terminal()
    debug = "--debug" in words
    try:
        code = _run(terminal, [word for word in words if word != "--debug"], debug)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # the reader, `head` for instance, has gone; nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _explain(terminal, error, debug)
    if code == INTERRUPTED:  # typer makes this code of a KeyboardInterrupt in a command
        with contextlib.suppress(KeyboardInterrupt):  # an impatient second Ctrl-C
            terminal.note("interrupted")
    return code


def _run(terminal: Terminal, words: list[str], debug: bool) -> int:
    flags, rest = parse_flags(words)
    program = _program(rest)
    code = program(args=rest, prog_name="compile-policy", standalone_mode=False, obj=Session(terminal, flags, debug))
    return int(code or 0)


def _explain(terminal: Terminal, error: Exception, debug: bool) -> int:
    """One line and a remedy; whose fault it was decides the exit code."""
    if isinstance(error, PolicyError):
        terminal.error(str(error))
        return USER_MISTAKE
    if type(error).__name__ == "NoArgsIsHelpError":  # `compile-policy layers`: typer has printed the help
        return 0
    if hasattr(error, "format_message"):  # click's errors, wherever typer keeps them
        message = _usage_message(error)
        stop = "" if message.endswith((".", "?")) else "."
        context: Any = getattr(error, "ctx", None)
        where = context.command_path if context else "compile-policy"
        terminal.error(f"{message}{stop} See {where} --help.")
        return USER_MISTAKE
    first = next(iter(str(error).strip().splitlines()), "")
    hint = "" if debug else " Run again with --debug for the traceback."
    terminal.error(f"{type(error).__name__}: {first}{hint}")
    return 1


def _usage_message(error: Any) -> str:
    """Click's sentence; for an unknown option with a near match among ours as well."""
    option = getattr(error, "option_name", None)
    if option is None or not hasattr(error, "possibilities"):
        return str(error.format_message())
    known = [name for param in error.ctx.command.params for name in param.opts] if error.ctx else []
    near = difflib.get_close_matches(option, [*known, *_CONFIGURATION_FLAGS], n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"there is no option {option}{hint}"
