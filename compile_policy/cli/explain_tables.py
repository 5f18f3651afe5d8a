"""An explanation as text: one block a component, tables where there is room for them, lines where not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from compile_policy.cli.terminal import clean
from compile_policy.events import Event
from compile_policy.failure import Failure

if TYPE_CHECKING:
    from compile_policy.explain import ComponentExplained, EntryExplained, Explanation

_STYLES = {"compile": "green", "eager": "yellow", "skip": "dim"}
_WIDE = 100  # columns from which dims and reasons stand in tables
_CONDITIONS = 4
_TOLD = ("fallback", "budget", "sentinel", "skipped", "note")


def print_explanation(console: Console, found: Explanation, events: Sequence[Event]) -> None:
    """The whole model: components with their reasons, then what concerns all of them."""
    how = "from a run" if found.ran else "from its configuration; --run says what really happens"
    console.print(Text.assemble((clean(found.model_cls), "bold"), (f"  {how}", "dim")))
    for line in found.facts:
        _line(console, f"- {line}", 0)
    small = [c for c in found.components if c.role == "projector" and not c.facts]
    for component in found.components:
        if component not in small:
            _print_component(console, component, ran=found.ran)
    if small:
        console.print()
        console.print(Text.assemble(("projectors", "bold"), f"  eager: {clean(small[0].reason)}"))
        for component in small:
            _line(console, f"{component.qualname}  {component.cls}", 2, "dim")
    told = {c.fallback for c in found.components}
    rest = [e for e in events if e.kind in _TOLD and not (e.kind == "fallback" and e.data["reason"] in told)]
    _print_events(console, rest)
    for note in found.notes:
        console.print()
        console.print(Text(clean(f"note: {note}"), style="dim"))


def _print_component(console: Console, c: ComponentExplained, *, ran: bool) -> None:
    console.print()
    console.print(
        Text.assemble((clean(c.role), "bold"), f"  {clean(c.qualname)}".rstrip() + "  ", (clean(c.cls), "dim"))
    )
    decided = f"{c.decision}: "
    console.print(_indented(Text.assemble((decided, _STYLES.get(c.decision, "")), clean(c.reason)), 2))
    if c.remedy:
        _line(console, f"to change it: {c.remedy}", 2)
    for fact in c.facts:
        _line(console, f"- {fact}", 2)
    if ran and c.decision == "compile":
        _print_happened(console, c)
    failed = ran and c.fallback is not None and not c.entries
    if not failed:
        _print_dims(console, c)
    for entry in c.entries:
        _print_entry(console, entry)
    if c.another and not failed:
        _heading(console, "another graph is needed for")
        rows = [(a.what, a.now, a.remedy) for a in c.another]
        _print_rows(console, ("what", "now", "remedy"), rows)


def _print_happened(console: Console, c: ComponentExplained) -> None:
    said = f"ran: {_count(c.calls, 'call')}, {c.eager_calls} of them eager; {_count(c.graphs, 'capture')}"
    _line(console, f"{said} in {c.compile_seconds:.1f} s", 2)
    if c.fallback:
        said = c.fallback if c.failure is None or not c.failure.place else "it cannot be compiled"
        console.print(_indented(Text.assemble(("runs eager: ", "bold yellow"), clean(said)), 2))
    if c.failure is not None:
        _print_failure(console, c.failure)
        if c.failure.place:
            _line(console, f"torch says: {c.fallback}", 4, "dim")


def _print_failure(console: Console, failure: Failure) -> None:
    """The model's own line, what it does that cannot be compiled, and what would help."""
    if failure.place:
        where = f"{failure.cls}.{failure.function}" if failure.cls else failure.function
        console.print(_indented(Text.assemble((clean(failure.place), "bold cyan"), f"  in {clean(where)}"), 4))
        code = Syntax(clean(failure.code), "python", theme="ansi_dark", background_color="default", word_wrap=True)
        console.print(_indented(code, 8))
    _line(console, f"cause:  {failure.cause}", 4)
    if failure.data_dependent:
        _line(console, "rule:   none handles this line; a layer override of its class would", 4)
    if failure.remedy:
        _line(console, f"remedy: {failure.remedy}", 4)


def _print_dims(console: Console, c: ComponentExplained) -> None:
    """The tensors of a call with their sizes, then what each varying size is and who said that it varies."""
    if c.dims_unknown:
        _line(console, f"dynamic dims: {c.dims_unknown}", 2)
    if not c.dims:
        return
    _heading(console, "dynamic dims")
    width = max((len(path) for path in c.sizes), default=0)
    for path, sizes in c.sizes.items():
        text = Text.assemble(clean(path).ljust(width if console.width >= _WIDE else 0), "  ")
        for i, size in enumerate(sizes):
            text.append(" x " if i else "", style="dim")
            text.append(clean(str(size)), style="cyan" if isinstance(size, str) else "dim")
        console.print(_indented(text, 4))
    said: dict[tuple[str, str], list[str]] = {}
    own = "*" if any("*" in sizes for sizes in c.sizes.values()) else ""
    for dim in c.dims:
        name = own if own and dim.origin == "probe" else dim.label
        if "+" not in dim.label:
            said.setdefault((dim.meaning, dim.origin), []).append(name)
    for (meaning, origin), names in said.items():
        label = ", ".join(dict.fromkeys(names))
        console.print(_indented(Text.assemble((clean(label), "cyan"), f": {clean(meaning)} ({origin})"), 4))


def _print_entry(console: Console, entry: EntryExplained) -> None:
    parts = [entry.road, f"{_count(entry.ops, 'op')}", f"{entry.seconds:.1f} s"]
    said = f"{', '.join(parts)}, error against eager {entry.max_error:.1g}"
    console.print(_indented(Text.assemble((f"graph {entry.number}", "bold"), f"  {said}"), 2))
    if entry.because:
        _line(console, f"because {entry.because}", 4)
    if entry.why_jit:
        _line(console, f"jit because {entry.why_jit}", 4)
    if entry.depth:
        _line(console, entry.depth, 4)
    if entry.guards:
        covered = ", ".join(f"{kind} {count}" for kind, count in entry.guards.items())
        _line(console, f"{_count(sum(entry.guards.values()), 'guard')} of Dynamo covered by: {covered}", 4)
    for condition in entry.conditions[:_CONDITIONS]:
        _line(console, f"holds where {condition}", 4)
    if len(entry.conditions) > _CONDITIONS:
        _line(console, f"and where {len(entry.conditions) - _CONDITIONS} more relations of sizes hold (--json)", 4)


def _print_events(console: Console, events: Sequence[Event]) -> None:
    if not events:
        return
    console.print()
    console.print(Text("events", style="bold"))
    for event in events:
        _line(console, f"{event.kind}: {event.component or 'model'}: {event.message}", 2)


def _print_rows(console: Console, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table where the screen is wide, else one paragraph a row."""
    if console.width < _WIDE:
        for first, *rest in rows:
            console.print(_indented(Text.assemble((clean(first), "cyan"), f": {clean('; '.join(rest))}"), 4))
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), border_style="dim")
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(cell), style="cyan" if i == 0 else "") for i, cell in enumerate(row)))
    console.print(_indented(table, 4))


def _heading(console: Console, text: str) -> None:
    console.print(_indented(Text(text, style="bold"), 2))


def _line(console: Console, text: str, indent: int, style: str = "") -> None:
    console.print(_indented(Text(clean(text), style=style), indent))


def _indented(what: Text | Table | Syntax, indent: int) -> Padding:
    return Padding(what, (0, 0, 0, indent), expand=False)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
