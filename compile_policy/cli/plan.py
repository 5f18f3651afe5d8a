"""``compile-policy plan``: what would be compiled, and why; nothing is loaded but the model's configuration."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from compile_policy.cli.inputs import check_model
from compile_policy.cli.progress import progress
from compile_policy.cli.session import Session, loading
from compile_policy.cli.tables import print_plan

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A folder, a hub id, tiny:<model_type>, or nothing for the embedded model."),
]


def plan(
    context: typer.Context,
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> int:
    """Say which components of a model are compiled, which are not, and why."""
    session: Session = context.obj
    config = session.config()
    check_model(model)
    session.backend()
    import compile_policy

    with progress(session.terminal, debug=session.debug), loading(model):
        found = compile_policy.plan(model, config=config)
    values = found.to_dict()
    if as_json:
        print(json.dumps(values))
    else:
        print_plan(session.terminal.out, values["components"], values["notes"])
    return 0
