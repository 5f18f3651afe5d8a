"""Files that are written while a command runs: events as JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from compile_policy.errors import InputError
from compile_policy.events import json_lines, listening

Events = Annotated[Path | None, typer.Option("--events", metavar="FILE", help="Write events as JSON lines.")]


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
