"""How many graphs a test may need."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from compile_policy.errors import PolicyWarning
from compile_policy.events import Event, listening


@contextmanager
def told_by_assertion() -> Iterator[None]:
    """Ignore `PolicyWarning` inside the block, whose fallbacks an assertion tells instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PolicyWarning)
        yield


@contextmanager
def limited(graphs: int, *, component: str = "", eager: bool = False) -> Iterator[None]:
    """Assert that no more than so many graphs are compiled inside the block, and that nothing falls back to eager.

    Args:
        graphs: how many, over all components.
        component: look only at components whose role or path has this in it.
        eager: let components run eager.

    Raises:
        AssertionError: says what each further graph was needed for, or the line that cannot be compiled.
    """
    heard: list[Event] = []
    with listening(heard.append), told_by_assertion():
        yield
    found = [event for event in heard if component in event.component]
    ends = [event for event in found if event.kind == "compile_end"]
    if len(ends) > graphs:
        why = [f"{event.component}: {event.message}" for event in found if event.kind == "new_entry"]
        first = list(dict.fromkeys(event.component for event in ends))
        told = "\n  ".join([f"compiled: {', '.join(first)}", *why])
        raise AssertionError(f"{len(ends)} graphs were compiled, at most {graphs} may be\n  {told}")
    fallbacks = [event for event in found if event.kind == "fallback"]
    if fallbacks and not eager:
        raise AssertionError("\n".join(map(_told, fallbacks)))


def _told(event: Event) -> str:
    data = event.data
    where = f"\n  {data['file']}:{data['line']}: `{data.get('code', '')}`" if "file" in data else ""
    return f"{event.component} {event.message}{where}\n  {data['remedy']}".rstrip()
