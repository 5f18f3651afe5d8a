"""What happened, as records, and who wants to hear of it.

`emit` hands an `Event` to every subscribed sink and to the ``compile_policy`` logger. Nothing is built when nobody
listens, so the path of a call stays free of it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import IO, Any

logger = logging.getLogger("compile_policy")
logger.addHandler(logging.NullHandler())

Sink = Callable[["Event"], None]

_LEVELS = {
    "sentinel": logging.WARNING,
    "fallback": logging.WARNING,
    "budget": logging.WARNING,
    "skipped": logging.WARNING,
}


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: ``attached``, ``removed``, ``compile_start``, ``compile_end``, ``new_entry``, ``fallback``,
            ``budget``, ``sentinel``, ``eager_call``, ``skipped`` or ``note``.
        component: role and path of the component, such as ``decoder model.language_model``; empty for the model.
        message: one sentence for people.
        data: the same for programs; JSON-serialisable.
        time: seconds since the epoch.
    """

    kind: str
    component: str
    message: str
    data: dict[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)


_sinks: list[Sink] = []
_lock = threading.Lock()


def emit(kind: str, component: str, message: str, **data: Any) -> None:
    """Tell every sink; a sink that raises is logged and never disturbs the run."""
    level = _LEVELS.get(kind, logging.INFO)
    if not _sinks and not logger.isEnabledFor(level):
        return
    event = Event(kind, component, message, data)
    logger.log(level, "%s: %s", component or "model", message)
    for sink in tuple(_sinks):
        try:
            sink(event)
        except Exception:
            logger.exception("event sink %r failed", sink)


@contextmanager
def listening(sink: Sink) -> Iterator[None]:
    """Send events to ``sink`` inside the block."""
    with _lock:
        _sinks.append(sink)
    try:
        yield
    finally:
        with _lock:
            _sinks.remove(sink)


def json_lines(stream: IO[str]) -> Sink:
    """A sink that writes one JSON object a line to ``stream``."""

    def write(event: Event) -> None:
        stream.write(json.dumps(asdict(event), default=str) + "\n")
        stream.flush()

    return write
