"""A lock between processes that says who holds it.

The lock is ``flock`` on a file, which the operating system releases when its holder dies. The holder writes its
process id, host and the time into the file, for those who wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from compile_policy.artifacts.disk import PRIVATE_FILE

_LOOK_SECONDS = (0.01, 0.25)  # between two looks: at first, and at most
_MOST_BYTES = 1024


class Holder(NamedTuple):
    """Who holds a lock.

    Attributes:
        pid: process id on ``host``; 0 where the holder has not written it yet, or writes no such line.
        host: its host name; empty with ``pid`` 0.
        since: when it took the lock, in seconds since the epoch.
    """

    pid: int
    host: str
    since: float

    def __str__(self) -> str:
        if not self.pid:
            return "another process"
        here = "this machine" if self.host == socket.gethostname() else self.host
        return f"process {self.pid} on {here}"


class FileLock:
    """A lock that is held; `release` gives it back."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        os.ftruncate(self._descriptor, 0)
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # for copies of the descriptor in forked children too
        os.close(self._descriptor)


def acquire(path: Path, timeout: float, waiting: Callable[[Holder, float], None] | None = None) -> FileLock | None:
    """Take the lock at ``path``, or return ``None`` after ``timeout`` seconds.

    Args:
        path: the file; made where it is missing. Its folder has to be there.
        waiting: called at every look in vain with the holder and the seconds waited so far.

    Raises:
        OSError: the file cannot be opened, or its file system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, PRIVATE_FILE)
    try:
        with contextlib.suppress(PermissionError):  # another user's, on a volume that is shared
            os.fchmod(descriptor, PRIVATE_FILE)
        started, pause = time.monotonic(), _LOOK_SECONDS[0]
        while not _try(descriptor):
            waited = time.monotonic() - started
            if waited >= timeout:
                os.close(descriptor)
                return None
            if waiting is not None:
                waiting(_holder(descriptor), waited)
            time.sleep(min(pause, timeout - waited))
            pause = min(2 * pause, _LOOK_SECONDS[1])
        _write_holder(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return FileLock(descriptor)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_holder(descriptor: int) -> None:
    """Say who holds the lock; a disk that is full keeps nobody from holding it."""
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
    except OSError:
        pass


def _holder(descriptor: int) -> Holder:
    try:
        said = json.loads(os.pread(descriptor, _MOST_BYTES, 0))
        return Holder(int(said["pid"]), str(said["host"])[:80], float(said["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Holder(0, "", time.time())
