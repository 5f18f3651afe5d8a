"""Components and entries on a time line: as a Chrome trace, and as ranges of `torch.profiler`.

While somebody looks, regions and their graphs are of classes that time what they do; otherwise they are what they
always are, and a call costs nothing more. A region asks one thing a call: whether a profiler of torch is on.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compile_policy import compat
from compile_policy.applied import regions
from compile_policy.compiled import CompiledGraph
from compile_policy.entry import Entry
from compile_policy.errors import NotCompilable
from compile_policy.events import Event, listening
from compile_policy.region import Region


@dataclass(frozen=True)
class Span:
    """Something that took time.

    Attributes:
        name: what is printed on it.
        kind: ``component``, ``entry``, ``compile``, ``eager``, or ``run`` for what the caller marks.
        start, duration: microseconds; the start counts from the beginning of the trace.
        thread: identifier of the thread.
        args: more about it; JSON-serialisable.
    """

    name: str
    kind: str
    start: float
    duration: float
    thread: int
    args: dict[str, Any] = field(default_factory=dict)


class Trace:
    """What happened to the regions of a model inside `tracing`."""

    def __init__(self) -> None:
        self.began = time.time()
        self.spans: list[Span] = []
        self.events: list[Event] = []
        self._zero = time.perf_counter_ns()

    @contextmanager
    def span(self, name: str, kind: str = "run", args: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Time the block; what is put into the dictionary inside becomes part of the span."""
        said = {} if args is None else args
        start = time.perf_counter_ns()
        try:
            yield said
        finally:
            end, thread = time.perf_counter_ns(), threading.get_ident()
            self.spans.append(Span(name, kind, (start - self._zero) / 1e3, (end - start) / 1e3, thread, said))

    def to_chrome(self) -> dict[str, Any]:
        """The trace as chrome://tracing and https://ui.perfetto.dev read it: complete and instant events."""
        pid = os.getpid()
        threads = {thread: i for i, thread in enumerate(dict.fromkeys(span.thread for span in self.spans))}
        rows: list[dict[str, Any]] = [_named("process_name", pid, 0, "compile-policy")]
        rows += [_named("thread_name", pid, i, f"thread {i}") for i in threads.values()]
        for span in sorted(self.spans, key=lambda s: s.start):
            place = {"ph": "X", "pid": pid, "tid": threads[span.thread], "ts": span.start, "dur": span.duration}
            rows.append({"name": span.name, "cat": span.kind, **place, "args": span.args})
        for event in self.events:
            at = {"ph": "i", "s": "p", "pid": pid, "tid": 0, "ts": max((event.time - self.began) * 1e6, 0.0)}
            told = {"component": event.component, "message": event.message, **event.data}
            rows.append({"name": f"{event.kind} {event.component}".strip(), "cat": "event", **at, "args": told})
        return {"traceEvents": rows, "displayTimeUnit": "ms", "otherData": {"began": self.began}}

    def write(self, path: Path) -> None:
        """Write the trace as a file for perfetto."""
        path.write_text(json.dumps(self.to_chrome()), "utf-8")


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


_traces: dict[int, list[Trace]] = {}  # by region
_lock = threading.Lock()


@contextmanager
def tracing(model: torch.nn.Module) -> Iterator[Trace]:
    """Trace the regions of ``model`` inside the block."""
    trace, watched = Trace(), regions(model)
    with _lock:
        for region in watched:
            _traces.setdefault(id(region), []).append(trace)
            _watch(region)
    try:
        with listening(trace.events.append):
            yield trace
    finally:
        with _lock:
            for region in watched:
                _traces[id(region)].remove(trace)
                if not _traces[id(region)]:
                    del _traces[id(region)]
                _leave(region)


class _TracedGraph(CompiledGraph):
    """A graph that times its runs."""

    region: Region
    number: int

    def run(self, *args: Any) -> Any:
        said = {"entry": self.number, "road": self.road}
        with _range(self.region, f"entry {self.number} ({self.road})", "entry", said):
            return super().run(*args)


class _TracedRegion(Region):
    """A region that times its calls, compiles and eager runs."""

    when_profiled = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or self.forced_eager or self.building.now:
            return super().__call__(*args, **kwargs)
        if not (compat.profiling() or id(self) in _traces):  # the profiler that was on has ended
            _leave(self)
            return self(*args, **kwargs)
        with _range(self, self.name, "component", {"call": self.calls}):
            return super().__call__(*args, **kwargs)

    def obtain(self, call: Any) -> Entry:
        graphs, loaded, seconds = self.graphs, self.loaded, self.compile_seconds
        with _range(self, f"compile {self.name}", "compile", {}) as said:
            try:
                entry = super().obtain(call)
            except NotCompilable as why:
                said["failed"] = why.reason
                raise
            finally:
                said["captures"], said["loaded"] = self.graphs - graphs, self.loaded - loaded
                said["seconds"] = self.compile_seconds - seconds
            _watch(self)
            said["entry"], said["road"] = entry.number, entry.graph.road
            return entry

    def _eager(self, why: NotCompilable, *args: Any, **kwargs: Any) -> Any:
        with _range(self, "eager", "eager", {"reason": why.reason}):
            return super()._eager(why, *args, **kwargs)


@contextmanager
def _range(region: Region, name: str, kind: str, said: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A span of every trace that watches the region, and a range of the profiler that is on."""
    traces = tuple(_traces.get(id(region), ()))
    spans = [trace.span(name, kind, said) for trace in traces]
    with torch.profiler.record_function(name) if compat.profiling() else nullcontext():
        for span in spans:
            span.__enter__()
        try:
            yield said
        finally:
            for span in reversed(spans):
                span.__exit__(None, None, None)


def _watch(region: Region) -> None:
    """Give the region and its graphs the classes that time what they do."""
    if type(region) is Region:
        region.__class__ = _TracedRegion
    for entry in _entries(region):
        if type(entry.graph) is CompiledGraph:
            vars(entry.graph).update(region=region, number=entry.number)
            entry.graph.__class__ = _TracedGraph


def _leave(region: Region) -> None:
    """The region as it was, unless someone still looks."""
    if id(region) in _traces or type(region) is not _TracedRegion:
        return
    _become(region, Region)
    for entry in _entries(region):
        if type(entry.graph) is _TracedGraph:
            _become(entry.graph, CompiledGraph)
            del vars(entry.graph)["region"], vars(entry.graph)["number"]


def _entries(region: Region) -> list[Entry]:
    return [entry for found in tuple(region.entries.values()) for entry in found]


def _become(what: Any, cls: type) -> None:
    what.__class__ = cls


def _when_profiled(region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call while a profiler is on: from here on, until it ends, the region names its ranges."""
    _watch(region)
    return region(*args, **kwargs)


Region.when_profiled = _when_profiled
