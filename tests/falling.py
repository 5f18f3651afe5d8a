"""`falls_back`: a block in which components run eager, each reason told once, at the line of the test."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from compile_policy.errors import PolicyWarning


@contextmanager
def falls_back(*reasons: str) -> Iterator[list[str]]:
    """Assert that exactly these reasons (parts of the warnings, in order) are told inside, where the block stands.

    Other warnings go on to whoever listens outside.
    """
    told: list[str] = []
    here = sys._getframe(2).f_code.co_filename
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
    ours = [w for w in caught if issubclass(w.category, PolicyWarning)]
    for other in caught:
        if other not in ours:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    told += [str(w.message) for w in ours]
    assert len(told) == len(reasons), told
    for reason, text in zip(reasons, told, strict=True):
        assert reason in text and " runs eager: " in text, text
    assert {w.filename for w in ours} <= {here}, [w.filename for w in ours]
