"""Verdicts on calls that could not be compiled: for good, or until what was short is there again.

A missing operator stays missing. Memory, room on a disk or a compiler that was just being installed come back, so such
a call is tried again later, each time after a longer wait: a compile costs seconds, a shortage may last for hours.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass

from compile_policy.errors import NotCompilable
from compile_policy.shortage import shortage

#: Seconds until a failed attempt is repeated at first, unless the attempt itself took longer, and at most.
FIRST_WAIT, LONGEST_WAIT = 1.0, 600.0

#: Of torch, which this module does not import: no compiler is found; a device has no memory left.
_CLASSES = ("InvalidCxxCompiler", "OutOfMemoryError")
#: What compilers and torch write beside what `shortage` knows.
_SAID = ("not enough memory", "memory exhausted", "killed signal", "signal terminated program", "text file busy")


def passes(error: BaseException) -> bool:
    """Whether an exception tells of something that may be otherwise a moment later."""
    if isinstance(error, BrokenExecutor) or any(cls.__name__ in _CLASSES for cls in type(error).__mro__):
        return True
    text = str(error).lower()
    return any(words in text for words in _SAID) or bool(shortage(error))


class Shortage(NotCompilable):
    """What a process lacks: a call of this kind may be compiled when it is there again."""


class Remembered(NotCompilable):
    """A verdict that is known already."""


@dataclass
class Verdict:
    """Why a kind of call runs eager.

    Attributes:
        again: when it is tried again, on the clock of `time.monotonic`; ``None`` for never.
        attempts: how often it failed.
    """

    reason: str
    remedy: str
    again: float | None = None
    attempts: int = 1


class Verdicts:
    """The verdicts of one component, by kind of call.

    Attributes:
        retries: how often something was tried again.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Verdict] = {}
        self.retries = 0

    def check(self, kind: Hashable) -> bool:
        """Return if a call of this kind may be compiled: ``True`` where one that failed is tried again.

        Raises:
            Remembered: the verdict.
        """
        known = self._known.get(kind)
        if known is None:
            return False
        if known.again is None or time.monotonic() < known.again:
            raise Remembered(known.reason, remedy=known.remedy)
        self.retries += 1
        return True

    def add(self, kind: Hashable, why: NotCompilable, seconds: float = 0.0) -> None:
        """Remember that a call of this kind could not be compiled.

        Args:
            seconds: how long the attempt took; it is repeated after twice that at the earliest.
        """
        known = self._known.get(kind)
        cause = why.__cause__
        passing = isinstance(why, Shortage) or (cause is not None and passes(cause))
        if not passing:
            if known is None or known.again is not None:
                self._known[kind] = Verdict(why.reason, why.remedy)
            return
        attempts = 1 if known is None else known.attempts + 1
        wait = min(max(FIRST_WAIT, 2 * seconds) * 2.0 ** (attempts - 1), LONGEST_WAIT)
        self._known[kind] = Verdict(why.reason, why.remedy, time.monotonic() + wait, attempts)

    def forget(self, kind: Hashable) -> None:
        """Drop the verdict on a kind of call that has been compiled after all."""
        self._known.pop(kind, None)

    def __len__(self) -> int:
        return len(self._known)
