"""When each entry of a dump was called, and how long it took: for the time line.

The path of a call knows nothing of this. A dump puts a stopwatch in front of the one graph that it has written, so runs
without a dump pay nothing, and a graph that has been timed often enough is as it was.
"""

from __future__ import annotations

import atexit
import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from compile_policy.entry import Entry
from compile_policy.graphs.runs import CALLS, append

#: Runs of one graph that are noted.
MOST_CALLS = 5000
_EVERY = 1.0  # seconds between two writes


class CallLog:
    """The calls of one run, written from time to time and when the process ends."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lines: list[str] = []
        self._written = 0.0
        self._lock = threading.Lock()
        atexit.register(self.flush)

    def watch(self, entry: Entry, name: str, component: str) -> None:
        """Note the runs of the graph of ``entry`` from now on.

        Args:
            name: the entry's id in the dump.
            component: role and path.
        """
        graph, left = entry.graph, MOST_CALLS

        def timed(leaves: Any) -> Any:
            nonlocal left
            started = time.perf_counter()
            result = type(graph).run(graph, leaves)  # of the class that it has by now: a trace may have changed it
            seconds = time.perf_counter() - started
            left -= 1
            if left <= 0:
                graph.__dict__.pop("run", None)
            self._note(name, component, seconds)
            return result

        graph.__dict__["run"] = timed

    def _note(self, name: str, component: str, seconds: float) -> None:
        now = time.time()
        row = {"entry": name, "component": component, "time": round(now, 6), "seconds": round(seconds, 7)}
        with self._lock:
            self._lines.append(json.dumps(row) + "\n")
        if now - self._written > _EVERY:
            self.flush()

    def flush(self) -> None:
        """Write what has been noted; what cannot be written is dropped."""
        with self._lock:
            lines, self._lines = self._lines, []
            self._written = time.time()
        if lines:
            with suppress(OSError):
                append(self.root, CALLS, "".join(lines))
