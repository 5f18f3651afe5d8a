"""``compile-policy doctor``: is everything here that compiled calls need, and what to do where it is not."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.padding import Padding
from rich.text import Text

from compile_policy.cli.checks import Line, examine_all
from compile_policy.cli.progress import progress
from compile_policy.cli.session import Session
from compile_policy.cli.terminal import Terminal, clean

_STYLES = {"ok": "green", "warning": "bold yellow", "error": "bold red"}


def doctor(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> int:
    """Look at versions, compiler, cache, backends, and run a self-test; exit with 1 where something is broken.

    Compiles one small kernel with the C++ compiler; nothing is written to the cache.
    """
    session: Session = context.obj
    lines: list[Line] = []
    with progress(session.terminal, debug=session.debug):
        for line in examine_all(session.config()):
            lines.append(line)
            if not as_json:
                _show(session.terminal, line)
    counts = {state: sum(line.state == state for line in lines) for state in _STYLES}
    if as_json:
        print(json.dumps({"healthy": not counts["error"], **counts, "lines": [asdict(line) for line in lines]}))
    else:
        said = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
        session.terminal.out.print(said)
    return 1 if counts["error"] else 0


def _show(terminal: Terminal, line: Line) -> None:
    """Printed as soon as it is known: a check may take seconds."""
    head = (f"{line.state:<8}", _STYLES[line.state])
    terminal.out.print(Text.assemble(head, (clean(f"{line.name}: "), "bold"), clean(line.message)), soft_wrap=True)
    if line.remedy:
        terminal.out.print(Padding(Text(clean(line.remedy), style="cyan"), (0, 0, 0, 8), expand=False))
