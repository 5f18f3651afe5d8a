"""What happened, as records, and who wants to hear of it.

`emit` hands an `Event` to every subscribed sink and to the ``compile_policy`` logger. Nothing is built when nobody
listens, so the path of a call stays free of it. `KINDS` is the schema: every kind with its data, for the document
(``docs/events.md``), for `json_schema`, and for a test that reads every ``emit`` in the code.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import IO, Any

logger = logging.getLogger("compile_policy")
logger.addHandler(logging.NullHandler())

Sink = Callable[["Event"], None]

#: Number of the schema that `json_lines` writes; a change that breaks readers has another number.
SCHEMA = 1


@dataclass(frozen=True)
class Field:
    """One value in an event's ``data``: its JSON type, what it says, and whether it is always there."""

    type: str
    meaning: str
    always: bool = True


@dataclass(frozen=True)
class Kind:
    """One kind of event: when it happens, its level in the log, its data."""

    when: str
    fields: Mapping[str, Field] = field(default_factory=dict)
    level: int = logging.INFO


_PLACE = {
    "error": Field("string", "class of the exception behind it", always=False),
    "file": Field("string", "file of the model's line that it comes from", always=False),
    "line": Field("integer", "number of that line", always=False),
    "code": Field("string", "the line itself", always=False),
}

#: Every kind there is. A new ``emit`` in the code needs its kind and its fields here.
KINDS: dict[str, Kind] = {
    "attached": Kind("a region was put in front of a component"),
    "removed": Kind("a region was taken off"),
    "compile_start": Kind(
        "a call has no entry, and one is about to be made",
        {"paths": Field("array", "the tensors of the call, by argument")},
    ),
    "new_entry": Kind(
        "the entry that is about to be made is not the component's first",
        {"difference": Field("string", "what differs from the calls before")},
    ),
    "compile_end": Kind(
        "an entry is ready",
        {
            "seconds": Field("number", "capture, lowering and comparison with eager"),
            "entry": Field("integer", "number of the entry in its component, from 0", always=False),
            "road": Field("string", "`ahead` of time or `jit`", always=False),
            "depth": Field(
                "string", "which layers were traced for others, or why all of them were traced", always=False
            ),
            "blocks": Field(
                "string", "how many blocks are the same code, such as `2 distinct blocks of 48`", always=False
            ),
        },
    ),
    "compile_failed": Kind(
        "no entry could be made from one example; another may be tried",
        {"reason": Field("string", "why"), "seconds": Field("number", "how long it took"), **_PLACE},
    ),
    "loaded": Kind(
        "an entry came from the store: nothing was captured or compiled",
        {"seconds": Field("number", "how long that took"), "key": Field("string", "digest that it was found by")},
    ),
    "miss": Kind(
        "the store has no entry for a call, or one that cannot be used",
        {"reason": Field("string", "why; what differs from the nearest one, where there is one")},
    ),
    "waiting": Kind(
        "another process makes the same artifact, and this one waits for it; said again every 30 seconds",
        {
            "pid": Field("integer", "the other process's id; 0 where it is not known"),
            "host": Field("string", "the machine that it runs on"),
            "since": Field("number", "when it began, in seconds since the epoch"),
            "seconds": Field("number", "how long this process has waited so far"),
        },
        logging.WARNING,
    ),
    "saved": Kind("a new entry was written to the store", {"key": Field("string", "digest that it is found by")}),
    "unsaved": Kind("an entry is not written to the store", {"reason": Field("string", "why")}),
    "fallback": Kind(
        "a call of a component that is to be compiled ran eager; the first for each reason",
        {"reason": Field("string", "why"), "remedy": Field("string", "what would change it, or nothing"), **_PLACE},
        logging.WARNING,
    ),
    "budget": Kind(
        "a component needs more entries than `max_entries`",
        {"entries": Field("integer", "how many there are")},
        logging.WARNING,
    ),
    "sentinel": Kind(
        "a sampled call differed from eager; the component runs eager from now on",
        {"reason": Field("string", "by how much"), "calls": Field("integer", "calls of the component so far")},
        logging.WARNING,
    ),
    "skipped": Kind(
        "something that was asked for was left out: a dump that cannot be written, a plug-in that fails",
        {
            "error": Field("string", "what the dump failed with", always=False),
            "plugin": Field("string", "name of the plug-in", always=False),
            "origin": Field("string", "the package that brings the plug-in", always=False),
        },
        logging.WARNING,
    ),
    "note": Kind("a remark for people"),
}


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: one of `KINDS`.
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
    known = KINDS.get(kind)
    level = logging.INFO if known is None else known.level
    if not _sinks and not logger.isEnabledFor(level):
        return
    event = Event(kind, component, message, {name: _plain(value) for name, value in data.items()})
    logger.log(level, "%s: %s", component or "model", message)
    for sink in tuple(_sinks):
        try:
            sink(event)
        except Exception:
            logger.exception("event sink %r failed", sink)


def _plain(value: Any) -> Any:
    """What JSON knows, and text for everything else (a dtype, a path, an infinite number)."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return value if isinstance(value, int) or math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(inside) for name, inside in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inside) for inside in value]
    return str(value)


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
    """A sink that writes one JSON object a line to ``stream``; `json_schema` describes it."""

    def write(event: Event) -> None:
        stream.write(json.dumps({"schema": SCHEMA, **asdict(event)}) + "\n")
        stream.flush()

    return write


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of one line that `json_lines` writes."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "an event of compile-policy",
        "type": "object",
        "properties": {
            "schema": {"const": SCHEMA},
            "kind": {"enum": list(KINDS)},
            "component": {"type": "string", "description": "role and path of the component; empty for the model"},
            "message": {"type": "string", "description": "one sentence for people"},
            "data": {"type": "object"},
            "time": {"type": "number", "description": "seconds since the epoch"},
        },
        "required": ["schema", "kind", "component", "message", "data", "time"],
        "additionalProperties": False,
        "allOf": [_rule(name, kind) for name, kind in KINDS.items()],
    }


def _rule(name: str, kind: Kind) -> dict[str, Any]:
    """Data of events of one kind."""
    data = {
        "properties": {n: {"type": f.type, "description": f.meaning} for n, f in kind.fields.items()},
        "required": [n for n, f in kind.fields.items() if f.always],
    }
    return {"if": {"properties": {"kind": {"const": name}}}, "then": {"properties": {"data": data}}}
