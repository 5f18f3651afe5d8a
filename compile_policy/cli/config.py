"""``compile-policy config``: the effective configuration, and where each value came from."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from compile_policy.cli.session import Session
from compile_policy.cli.tables import print_config


def config(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> int:
    """Print the effective configuration and the origin of each value."""
    session: Session = context.obj
    rows = session.config().describe()
    if as_json:
        print(json.dumps({name: {"value": value, "origin": origin} for name, value, origin in rows}))
    else:
        print_config(session.terminal.out, rows)
    return 0
