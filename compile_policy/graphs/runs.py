"""What a dump keeps of a whole run: the plan of each model, the events as they happen, and when entries were called.

They stand in ``runs/RUN/`` beside the entries. Like everything of a dump they never disturb the run: what cannot be
written is left out.
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from compile_policy.events import Event, listening

RUNS = "runs"
EVENTS = "events.jsonl"
PLAN = "plan.json"
CALLS = "calls.jsonl"
#: Bytes that each of these may take for one run; what comes later is dropped.
MAX_BYTES = 2 * 1024 * 1024

_logs: dict[Path, tuple[ExitStack, weakref.WeakSet[Any]]] = {}
_lock = threading.Lock()


def run_name() -> str:
    """Name of this process's run: when it first wrote a dump, and its id."""
    return _named(os.getpid())


@lru_cache(maxsize=8)
def _named(pid: int) -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{pid}"


def log_events(root: Path, owner: object) -> None:
    """Write every event of this process below ``root``, as long as one of the owners that asked for it lives."""
    with _lock:
        # Here and not by a finalizer: garbage may be collected while another lock is held.
        for ended in [path for path, (_, owners) in _logs.items() if not owners]:
            _logs.pop(ended)[0].close()
        if root not in _logs:
            owners: weakref.WeakSet[Any] = weakref.WeakSet()
            _logs[root] = (ExitStack(), owners)
            _logs[root][0].enter_context(listening(_sink(root, owners)))
        _logs[root][1].add(owner)


def _sink(root: Path, owners: weakref.WeakSet[Any]) -> Callable[[Event], None]:
    def write(event: Event) -> None:
        if not owners:
            return
        with suppress(OSError):
            append(root, EVENTS, json.dumps(asdict(event), default=str) + "\n")

    return write


def note_plan(root: Path, plan: dict[str, Any]) -> None:
    """Keep the plan of a model; several models of one process are told apart by their number."""
    with suppress(OSError):
        append(root, PLAN, json.dumps(plan, default=str) + "\n")


def append(root: Path, name: str, lines: str) -> None:
    """Write lines into a file of this run, as long as there is room.

    Raises:
        OSError: they cannot be written.
    """
    path = _folder(root) / name
    if path.exists() and path.stat().st_size + len(lines) > MAX_BYTES:
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags, 0o600), "a", encoding="utf-8") as stream:
        stream.write(lines)


def _folder(root: Path) -> Path:
    path = root / RUNS / run_name()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    if path.parent.is_symlink() or path.is_symlink():
        raise OSError(f"{path} is a link; a dump stays inside its folder")
    return path
