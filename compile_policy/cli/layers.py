"""``compile-policy layers ls``: which layers exist, which are overridden and by whom, and which operators are on."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from compile_policy.cli.inputs import check_model
from compile_policy.cli.session import Session, loading
from compile_policy.cli.terminal import clean

if TYPE_CHECKING:
    from compile_policy.layers import CustomOps, LayerRow, Plugin

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A folder, a hub id or tiny:<model_type>: count its layers.")
]

app = typer.Typer(help="Layers that can be replaced, and operators that can be switched.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Layers that can be replaced, and operators that can be switched."""


@app.command("ls")
def ls(
    context: typer.Context,
    model: Model = None,
    plugins: Annotated[bool, typer.Option("--plugins/--no-plugins", help="Import installed plug-ins.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> int:
    """List layers with kind, origin, override and count, and the installed plug-ins with what became of them.

    With MODEL, the count says how many layers of that model are replaced; its weights are not loaded.
    """
    from compile_policy.layers import CustomOps, layer_rows, load_plugins  # imports torch

    session: Session = context.obj
    config = session.config()
    found = load_plugins(enabled=plugins and config.enabled)
    ops = CustomOps.of(config.custom_ops, mode=config.mode, backend=config.backend)
    if model is not None:
        _count(session, model)
    rows = [_row(row, ops) for row in layer_rows()]
    if as_json:
        print(json.dumps({"layers": rows, "plugins": [_plugin(plugin) for plugin in found]}))
        return 0
    _print_layers(session.terminal.out, rows)
    _print_plugins(session.terminal.out, found)
    return 0


def _count(session: Session, model: str) -> None:
    check_model(model)
    backend = session.backend()
    with loading(model):
        importlib.import_module(f"{backend.__name__}.layers").count_layers(model)


def _row(row: LayerRow, ops: CustomOps) -> dict[str, Any]:
    state = ("on" if ops.enabled(row.name) else "off") if row.kind == "custom_op" else ""
    return {**asdict(row), "state": state}


def _plugin(plugin: Plugin) -> dict[str, Any]:
    values = {name: value for name, value in vars(plugin).items() if name != "claims"}
    return {**values, "overrides": [claim.target_name for claim in plugin.claims]}


def _print_layers(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "kind", "state", "origin", "override", "count", "note"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        override = f"{row['override']} (from {row['override_origin']})" if row["override"] else "-"
        values = (row["name"], row["kind"], row["state"], row["origin"], override, str(row["count"]), row["note"])
        table.add_row(*map(clean, values))
    console.print(table)


def _print_plugins(console: Console, plugins: tuple[Plugin, ...]) -> None:
    if not plugins:
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("plug-in", "origin", "status", "overrides"):
        table.add_column(heading, overflow="fold")
    for plugin in plugins:
        overrides = ", ".join(claim.target_name for claim in plugin.claims) or "-"
        status = f"{plugin.status}: {plugin.error}" if plugin.error else plugin.status
        table.add_row(*map(clean, (plugin.name, plugin.origin, status, overrides)))
    console.print()
    console.print(table)
