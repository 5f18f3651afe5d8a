"""``compile-policy graphs``: look into a dump of graphs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from compile_policy.cli import graph_tables as tables
from compile_policy.cli import graph_text as texts
from compile_policy.cli.session import Session
from compile_policy.errors import InputError
from compile_policy.graphs.difference import difference
from compile_policy.graphs.folding import folds
from compile_policy.graphs.reading import Dump, DumpedEntry, json_lines, read_text
from compile_policy.graphs.report import ReportFailed, report_of
from compile_policy.graphs.search import find_ops
from compile_policy.graphs.stats import stats_of
from compile_policy.graphs.trail import OpTrail, kernel_trail, op_trail

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
    file: Annotated[
        str, typer.Option("--file", help="Another file: lowered, kernels, bytecode, conditions, guards, ...")
    ] = "",
    op: Annotated[
        str, typer.Option("--op", metavar="NAME", help="One operation: its line, lowered form, kernel.")
    ] = "",
    kernel: Annotated[
        str, typer.Option("--kernel", metavar="NAME", help="One kernel, by name or number: lines of the model, code.")
    ] = "",
    every: Annotated[bool, typer.Option("--all", help="Repeated blocks too.")] = False,
    as_json: _Json = False,
) -> int:
    """Print the captured graph with the model's line beside each operation, another file, an operation or a kernel."""
    session: Session = context.obj
    if sum(map(bool, (file, op, kernel))) > 1:
        raise InputError("--file, --op and --kernel ask for different things.", remedy="Give one of them.")
    found, out = _entry(directory, entry), session.terminal.out
    if op or kernel:
        trail = op_trail(found, op) if op else kernel_trail(found, kernel)
        if as_json:
            _print_json({"entry": found.id, **trail.to_dict()})
        elif isinstance(trail, OpTrail):
            texts.print_op(out, found.id, trail, found.symbols())
        else:
            texts.print_kernel(out, found.id, trail, found.symbols())
    elif as_json:
        shown: dict[str, Any] = {"file": file, "text": found.read(file)} if file else {"ops": found.ops()}
        _print_json({"entry": found.record, **shown})
    else:
        once = [] if every or file or "ops" not in found.files else folds(found.ops())
        texts.print_source(out, found.read(file or "captured"), once)
    return 0


@app.command("stats")
def stats(
    context: typer.Context,
    directory: _Path,
    entry: _Entry = "",
    top: Annotated[int, typer.Option("--top", min=1, help="Rows of each table.")] = 15,
    at: Annotated[
        str, typer.Option("--at", metavar="DIM=SIZE,...", help="Sizes that costs are for; else those traced.")
    ] = "",
    as_json: _Json = False,
) -> int:
    """Operations by kind, module and line with estimates of cost; kernels, and how many operations are in each."""
    session: Session = context.obj
    sizes = _sizes(at)
    found = [_entry(directory, entry)] if entry or not _is_dump(directory) else list(Dump.open(directory).entries)
    _check_dims(found, sizes)
    counted = [(one, stats_of(one, sizes)) for one in found]
    if as_json:
        _print_json({"entries": [{"id": one.id, **numbers.to_dict()} for one, numbers in counted]})
        return 0
    for one, numbers in counted:
        tables.print_stats(session.terminal.out, one.record, numbers, top)
    return 0


def _sizes(text: str) -> dict[str, int]:
    """``batch=1,past=512``."""
    sizes = {}
    for part in text.split(",") if text else ():
        name, _, size = part.partition("=")
        if not name.strip() or not size.strip().isdecimal():
            raise InputError(f"--at {text} is no list of sizes.", remedy="Write it as batch=1,sequence=512.")
        sizes[name.strip()] = int(size)
    return sizes


def _check_dims(entries: Sequence[DumpedEntry], sizes: Mapping[str, int]) -> None:
    """Refuse a size of a dim that no entry has."""
    symbols: list[tuple[str, dict[str, Any]]] = []
    for entry in entries:
        symbols += entry.symbols().items()
    labels = sorted({str(said.get("label") or name) for name, said in symbols})
    for name in sizes:
        if name not in labels and name not in dict(symbols):
            remedy = f"Dims that vary here: {', '.join(labels)}." if labels else "No dim varies here: leave --at out."
            raise InputError(f"--at {name}: no dim is called that.", remedy=remedy)


@app.command("find")
def find(
    context: typer.Context,
    directory: _Path,
    op: Annotated[str, typer.Argument(metavar="OP", help="An operation's kind or name, or a part of it.")],
    every: Annotated[bool, typer.Option("--all", help="Each operation, where blocks repeat it too.")] = False,
    as_json: _Json = False,
) -> int:
    """List where an operation occurs: entry, name, type, module and the model's line."""
    session: Session = context.obj
    dump, name = Dump.locate(directory)
    hits = find_ops([dump.entry(name)] if name else list(dump.entries), op)
    if as_json:
        _print_json({"hits": [{"entry": hit.entry, **hit.op} for hit in hits]})
    elif hits:
        tables.print_hits(session.terminal.out, hits, every)
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
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="The page; by default graphs.html in DIR.")
    ] = None,
    events: Annotated[
        Path | None, typer.Option("--events", metavar="FILE", help="More events: JSON lines of a run.")
    ] = None,
    tlparse: Annotated[
        Path | None,
        typer.Option(
            "--tlparse",
            metavar="LOG",
            envvar="TORCH_TRACE",
            help="A log of TORCH_TRACE; link tlparse's report.",
        ),
    ] = None,
    as_json: _Json = False,
) -> int:
    """Write the dump as one page that needs nothing else: search it, and click from operation to kernel and back."""
    from compile_policy.graphs.page import page_of  # imports Jinja

    session: Session = context.obj
    dump, target = Dump.open(directory), file or directory / "graphs.html"
    link = ""
    if tlparse is not None:
        try:
            link = report_of(tlparse, target.with_name(f"{target.stem}-tlparse"))
        except ReportFailed as reason:
            session.terminal.warn(f"tlparse's report is left out: {reason}")
    text = page_of(dump, events=json_lines(read_text(events)) if events is not None else (), tlparse=link)
    try:
        target.write_text(text, "utf-8")
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}.") from error
    if as_json:
        _print_json({"file": str(target), "bytes": len(text.encode()), "entries": len(dump.entries), "tlparse": link})
    else:
        session.terminal.note(f"{target}, {len(text.encode()) / 1e6:.1f} MB")
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
