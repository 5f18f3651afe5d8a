"""What a dump keeps of a whole run: the plan of each model, and the events as they happen.

Both stand in ``runs/RUN/`` beside the entries. Like everything of a dump they never disturb the run: what cannot be
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
from compile_policy.graphs.text import clean

RUNS = "runs"
EVENTS = "events.jsonl"
PLAN = "plan.json"
#: Bytes that the events of one run may take.
MAX_EVENTS = 2 * 1024 * 1024

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
        line = json.dumps(asdict(event), default=str) + "\n"
        with suppress(OSError):
            path = _folder(root) / EVENTS
            if not path.exists() or path.stat().st_size + len(line) <= MAX_EVENTS:
                _append(path, line)

    return write


def note_plan(root: Path, plan: dict[str, Any]) -> None:
    """Keep the plan of a model; several models of one process are told apart by their number."""
    with suppress(OSError):
        _append(_folder(root) / PLAN, clean(json.dumps(plan, default=str)) + "\n")


def _folder(root: Path) -> Path:
    path = root / RUNS / run_name()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    if path.parent.is_symlink() or path.is_symlink():
        raise OSError(f"{path} is a link; a dump stays inside its folder")
    return path


def _append(path: Path, line: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags, 0o600), "a", encoding="utf-8") as stream:
        stream.write(line)
