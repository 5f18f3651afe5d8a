"""``compile-policy warmup``: compile ahead of the first user, or say what would have to be compiled."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Clock

import compile_policy
from compile_policy.cli.inputs import check_model
from compile_policy.cli.plan import Model
from compile_policy.cli.progress import Progress, progress
from compile_policy.cli.session import Session, loading
from compile_policy.cli.tables import print_warmup
from compile_policy.cli.terminal import Terminal, clean
from compile_policy.errors import InputError
from compile_policy.events import Event, listening

_IMAGE = (64, 96)
_NEW_TOKENS = 3  # one prefill, and decode steps of both kinds: the first, and one that repeats it
_REMEDY = "Write BATCHxTOKENS, several with commas between them, such as 1x8,4x128."


def warmup(
    context: typer.Context,
    model: Model = None,
    sizes: Annotated[
        str, typer.Option("--sizes", metavar="BxT,...", help="Batches and tokens to run with; one graph serves all.")
    ] = "1x8",
    static: Annotated[bool, typer.Option("--static", help="With static caches too, which are graphs of their own.")] = (
        False
    ),
    check: Annotated[
        bool, typer.Option("--check", help="Compile nothing; say what is not in the store, and why. Exit with 1 then.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> int:
    """Compile a model's components ahead, so that the next process loads them instead."""
    session: Session = context.obj
    config = session.config()
    wanted = _sizes(sizes)
    check_model(model)
    backend = session.backend()
    started, heard = time.perf_counter(), Heard()
    steps = [(size, cache) for cache in ((None, "static") if static else (None,)) for size in wanted]
    bar = Bar(session.terminal, len(steps))
    with progress(session.terminal, debug=session.debug, shown=bar), listening(heard), loading(model):
        loaded = compile_policy.load_model(model, config=config)
        if check:
            _compile_nothing(loaded)
        with bar.running():
            for size, cache in steps:
                _run(backend, loaded, size, cache)
                bar.advance()
    rows = [row for row in compile_policy.report(loaded).to_dict()["components"] if row["decision"] == "compile"]
    for row in rows:
        row["missing"] = heard.missing(f"{row['role']} {row['qualname']}".strip()) if check else []
    seconds = time.perf_counter() - started
    if as_json:
        print(json.dumps({"components": rows, "seconds": round(seconds, 3)}))
    else:
        print_warmup(session.terminal.out, rows, seconds, checked=check)
    return 1 if check and any(row["missing"] for row in rows) else 0


def _sizes(text: str) -> list[tuple[int, int]]:
    """(batch, tokens) of each size."""
    found = []
    for word in text.split(","):
        batch, cross, tokens = word.strip().partition("x")
        if not cross or not batch.isdecimal() or not tokens.isdecimal() or int(batch) < 1 or int(tokens) < 2:
            raise InputError(f"{word!r} is no size.", remedy=_REMEDY)
        found.append((int(batch), int(tokens)))
    return found


def _run(backend: Any, model: Any, size: tuple[int, int], cache: str | None) -> None:
    """Generate a few tokens from random ones, with a picture where the model can see."""
    batch, tokens = size
    sees = any(row.role.startswith("encoder[image]") for row in compile_policy.report(model).components)
    inputs = backend.tiny_inputs(model, text_len=tokens, batch=batch, images=[_IMAGE] * sees)
    options = {} if cache is None else {"cache_implementation": cache}
    model.generate(**inputs, max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS, do_sample=False, **options)


def _compile_nothing(model: Any) -> None:
    from compile_policy.applied import regions  # imports torch

    for region in regions(model):
        region.options = replace(region.options, load_only=True)


class Heard:
    """What the store was asked for in vain."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        if event.kind in ("miss", "unsaved"):
            self.events.append(event)

    def missing(self, component: str) -> list[str]:
        """Why a component's entries are not in the store, each reason once."""
        return list(dict.fromkeys(event.data["reason"] for event in self.events if event.component == component))


class Bar(Progress):
    """One bar over all sizes on a terminal; what is being compiled stands beside it."""

    def __init__(self, terminal: Terminal, steps: int) -> None:
        super().__init__(terminal)
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._bar = Clock(*columns, TimeElapsedColumn(), console=terminal.err, transient=True)
        self._task = self._bar.add_task("warming up", total=steps)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show the bar inside the block, where there is a terminal to show it on."""
        if not self.terminal.animated:
            yield
            return
        with self._bar:
            yield

    def advance(self) -> None:
        self._bar.update(self._task, advance=1, description="warming up")

    def _on_compile_start(self, event: Event) -> None:
        if self.terminal.animated:
            self._bar.update(self._task, description=clean(f"compiling {event.component}"))
        else:
            super()._on_compile_start(event)
