"""Files that are written while a command runs: events as JSON lines, a time line for perfetto."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from compile_policy.errors import InputError
from compile_policy.events import json_lines, listening

Events = Annotated[Path | None, typer.Option("--events", metavar="FILE", help="Write events as JSON lines.")]
TimeLine = Annotated[
    Path | None, typer.Option("--trace", metavar="FILE", help="Write a Chrome trace, to be opened in perfetto.")
]


@contextmanager
def events_to(path: Path | None) -> Iterator[None]:
    """Write events to a file inside the block.

    Raises:
        InputError: the file cannot be written.
    """
    if path is None:
        yield
        return
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}.", remedy="Name another file.") from None
    with file, listening(json_lines(file)):
        yield


@contextmanager
def trace_to(path: Path | None, model: Any) -> Iterator[None]:
    """Write what the components of ``model`` do inside the block as a Chrome trace.

    Raises:
        InputError: the file cannot be written; said before the block runs.
    """
    if path is None:
        yield
        return
    try:
        path.touch()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}.", remedy="Name another file.") from None
    from compile_policy.trace import tracing  # imports torch

    with tracing(model) as trace:
        try:
            with trace.span("generate"):
                yield
        finally:
            trace.write(path)
