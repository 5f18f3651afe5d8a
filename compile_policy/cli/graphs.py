"""``compile-policy graphs``: look into a dump of graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from compile_policy.cli import graph_tables as tables
from compile_policy.cli.session import Session
from compile_policy.errors import InputError
from compile_policy.graphs.difference import difference
from compile_policy.graphs.page import page_of
from compile_policy.graphs.reading import Dump, DumpedEntry
from compile_policy.graphs.search import find_ops
from compile_policy.graphs.stats import stats_of

app = typer.Typer(help="Look into graphs that were dumped with --dump-graphs.", no_args_is_help=True)

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
_Dump = Annotated[Path, typer.Argument(metavar="DIR", help="The folder that was given to --dump-graphs.")]
_Path = Annotated[Path, typer.Argument(metavar="DIR", help="The dump, or one of its entries: DIR/COMPONENT/ENTRY.")]
_Entry = Annotated[
    str, typer.Argument(metavar="[ENTRY]", help="COMPONENT/ENTRY as `graphs ls` has it; its beginning is enough.")
]


@app.callback()
def _group() -> None:
    """Look into graphs that were dumped with --dump-graphs."""


@app.command("ls")
def ls(context: typer.Context, directory: _Dump, as_json: _Json = False) -> int:
    """List entries with operations, inputs, dynamic dims and times."""
    session: Session = context.obj
    dump = Dump.open(directory)
    if as_json:
        _print_json({"entries": [entry.record for entry in dump.entries], "notes": list(dump.notes)})
        return 0
    tables.print_entries(session.terminal.out, [entry.record for entry in dump.entries])
    for note in dump.notes:
        session.terminal.note(f"note: {note}")
    return 0


@app.command("show")
def show(
    context: typer.Context,
    directory: _Path,
    entry: _Entry = "",
    file: Annotated[str, typer.Option("--file", help="Another file: kernels, lowered, bytecode, conditions, ...")] = "",
    as_json: _Json = False,
) -> int:
    """Print the captured graph with the model's line beside each operation, or another file of the entry."""
    session: Session = context.obj
    found = _entry(directory, entry)
    if as_json:
        shown: dict[str, Any] = {"file": file, "text": found.read(file)} if file else {"ops": found.ops()}
        _print_json({"entry": found.record, **shown})
        return 0
    tables.print_source(session.terminal.out, found.read(file or "captured"))
    return 0


@app.command("stats")
def stats(
    context: typer.Context,
    directory: _Path,
    entry: _Entry = "",
    top: Annotated[int, typer.Option("--top", min=1, help="Rows of each table.")] = 15,
    as_json: _Json = False,
) -> int:
    """Operations by kind, by module and by line of the model; kernels, and how many operations went into each."""
    session: Session = context.obj
    found = [_entry(directory, entry)] if entry or not _is_dump(directory) else list(Dump.open(directory).entries)
    counted = [(one, stats_of(one)) for one in found]
    if as_json:
        _print_json({"entries": [{"id": one.id, **numbers.to_dict()} for one, numbers in counted]})
        return 0
    for one, numbers in counted:
        tables.print_stats(session.terminal.out, one.record, numbers, top)
    return 0


@app.command("find")
def find(
    context: typer.Context,
    directory: _Path,
    op: Annotated[str, typer.Argument(metavar="OP", help="An operation's kind or name, or a part of it.")],
    as_json: _Json = False,
) -> int:
    """List where an operation occurs: entry, name, shape and the model's line."""
    session: Session = context.obj
    dump, name = Dump.locate(directory)
    hits = find_ops([dump.entry(name)] if name else list(dump.entries), op)
    if as_json:
        _print_json({"hits": [{"entry": hit.entry, **hit.op} for hit in hits]})
    elif hits:
        tables.print_hits(session.terminal.out, hits)
    else:
        session.terminal.note(f"no operation like {op!r}")
    return 0 if hits else 1


@app.command("diff")
def diff(
    context: typer.Context,
    first: Annotated[Path, typer.Argument(metavar="A", help="DIR/COMPONENT/ENTRY, or a dump with one component.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The other.")],
    as_json: _Json = False,
) -> int:
    """Compare two entries, of one dump or of two, and say what differs first. Exit code 1 when they differ."""
    session: Session = context.obj
    a, b = _entry(first, ""), _entry(second, "")
    found = difference(a, b)
    if as_json:
        _print_json({"first": a.id, "second": b.id, **found.to_dict()})
    else:
        tables.print_difference(session.terminal.out, str(first), str(second), found)
    return 1 if found else 0


@app.command("html")
def html(
    context: typer.Context,
    directory: _Dump,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The page to write.")],
) -> int:
    """Write the dump as one page that needs nothing else: search it, and click from operation to kernel and back."""
    session: Session = context.obj
    text = page_of(Dump.open(directory))
    try:
        file.write_text(text, "utf-8")
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror or error}.") from error
    session.terminal.note(f"{file}, {len(text.encode()) / 1e6:.1f} MB")
    return 0


def _is_dump(directory: Path) -> bool:
    return not Dump.locate(directory)[1]


def _entry(directory: Path, name: str) -> DumpedEntry:
    """The entry that a path, or a path and a name, mean."""
    dump, rest = Dump.locate(directory)
    if rest and name:
        raise InputError(f"{directory} names an entry already, and {name!r} another.")
    return dump.entry(rest or name)


def _print_json(value: Any) -> None:
    print(json.dumps(value))
