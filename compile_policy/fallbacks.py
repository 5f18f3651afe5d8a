"""Calls of one component that ran eager although it was to be compiled: counted by reason, told once each."""

from __future__ import annotations

import re
from collections.abc import Mapping

_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
#: Reasons that are told apart; what a program makes up beyond that is counted together.
MOST = 32
OTHERS = "other reasons"


class Fallbacks:
    """The fallbacks of one component.

    Two reasons that differ in numbers only (an error, a size) are one; several about one cause are told once.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, str] = {}  # reason without numbers -> the reason as it came first
        self._causes: set[str] = set()

    def add(self, reason: str, about: str = "") -> bool:
        """Count one call; ``True`` when it is to be told: the first for this reason, and for the cause it is about."""
        kind = _NUMBER.sub("#", reason)
        first = kind not in self._first
        if first and len(self._first) >= MOST:
            kind, reason = OTHERS, OTHERS
            first = kind not in self._first
        told = self._first.setdefault(kind, reason)
        self._counts[told] = self._counts.get(told, 0) + 1
        told_already = about in self._causes
        if about:
            self._causes.add(about)
        return first and not told_already

    def counts(self) -> Mapping[str, int]:
        """Reason, as it came first -> how many calls."""
        return dict(self._counts)

    def __len__(self) -> int:
        return sum(self._counts.values())


def in_words(component: str, reason: str, remedy: str) -> str:
    """The sentence that tells of a fallback."""
    said = f"{component} runs eager: {reason.rstrip('.')}."
    return f"{said} {remedy}".rstrip()
