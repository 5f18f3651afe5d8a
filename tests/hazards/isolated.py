"""Work in a forked process: it starts from what the parent has compiled, and leaves no trace there."""

from __future__ import annotations

import os
import pickle
import selectors
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Died(Exception):
    """The process ended, or was ended, without a result."""


def isolated(work: Callable[[], T], seconds: float) -> T:
    """The result of ``work``, run in a fork of this process.

    Raises:
        Died: it raised, crashed or took longer than ``seconds``.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run(work, writing)
    os.close(writing)
    try:
        data = _read(reading, time.monotonic() + seconds)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)  # it has said all it has to say, or will not
        os.waitpid(child, 0)
    if not data:
        raise Died("the process ended without a result")
    good, value = pickle.loads(data)
    if not good:
        raise Died(value)
    return value  # type: ignore[no-any-return]


def _run(work: Callable[[], Any], writing: int) -> None:
    """Never returns."""
    status = 1
    try:
        try:
            answer: Any = (True, work())
            data = pickle.dumps(answer)
        except BaseException:
            data = pickle.dumps((False, traceback.format_exc(limit=-6)))
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(data)
        status = 0
    finally:
        os._exit(status)


def _read(descriptor: int, until: float) -> bytes:
    pieces = []
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while selector.select(max(0.0, until - time.monotonic())):
            piece = os.read(descriptor, 1 << 20)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
    raise Died("took too long")
