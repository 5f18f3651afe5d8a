"""Which commands there are. A command's module is imported only when that command is run or asked for its help.

So ``--help``, ``--version`` and a mistyped name cost the time of importing typer, whatever the commands import.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import typer


class Command(NamedTuple):
    """Where a command, or a group of commands, is defined.

    Attributes:
        home: ``module:name`` of the function, or of the ``typer.Typer`` of a group.
        help: what the list of commands says; the first paragraph of its help.
    """

    home: str
    help: str
    group: bool = False


COMMANDS = {
    "generate": Command(
        "compile_policy.cli.generate:generate",
        "Load a model under the policy, ask it something, and say what was compiled.",
    ),
    "plan": Command(
        "compile_policy.cli.plan:plan", "Say which components of a model are compiled, which are not, and why."
    ),
    "explain": Command(
        "compile_policy.cli.explain:explain",
        "Say why each component is compiled or not, which dims vary, and what would need another graph.",
    ),
    "warmup": Command(
        "compile_policy.cli.warmup:warmup",
        "Compile a model's components ahead, so that the next process loads them instead.",
    ),
    "matrix": Command(
        "compile_policy.cli.matrix:matrix",
        "Build architectures tiny, compile them under the policy, and say what holds: graphs, equality, reasons.",
    ),
    "config": Command(
        "compile_policy.cli.config:config", "Print the effective configuration and the origin of each value."
    ),
    "doctor": Command(
        "compile_policy.cli.doctor:doctor",
        "Look at versions, compiler, cache, backends, and run a self-test; exit with 1 where something is broken.",
    ),
    "graphs": Command(
        "compile_policy.cli.graphs:app", "Look into graphs that were dumped with --dump-graphs.", group=True
    ),
    "layers": Command(
        "compile_policy.cli.layers:app", "Layers that can be replaced, and operators that can be switched.", group=True
    ),
    "cache": Command("compile_policy.cli.cache:app", "Compiled code that is kept on disk.", group=True),
}


def add_commands(app: typer.Typer, words: Sequence[str], *, epilog: str) -> None:
    """Add every command to ``app``: the one that ``words`` name whole, the others by name and help alone."""
    named = next((word for word in words if not word.startswith("-")), "")
    for name, command in COMMANDS.items():
        if name != named:
            app.command(name, help=command.help)(_listed_only)
        elif command.group:
            app.add_typer(load_command(command), name=name)
        else:
            app.command(name, epilog=epilog)(load_command(command))


def load_command(command: Command) -> Any:
    """Import a command: a function, or the ``typer.Typer`` of a group."""
    module, _, name = command.home.partition(":")
    return getattr(importlib.import_module(module), name)


def _listed_only() -> None:
    raise AssertionError("a command that is run is imported first")
