"""The pytest plug-in: a marker ``max_graphs`` and a fixture ``policy_events``.

It is loaded by every run of pytest where the package is installed, so it loads nothing else (torch takes seconds)
before a test asks for it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

_MARKER = "max_graphs(n, component='', eager=False): compile at most n graphs, and let nothing fall back to eager"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Run a marked test under its limit; a test that fails by itself is left to say why."""
    marker = item.get_closest_marker("max_graphs")
    if marker is None:
        return (yield)
    from compile_policy.testing import limited

    if not marker.args or not isinstance(marker.args[0], int):
        pytest.fail("max_graphs needs a number: @pytest.mark.max_graphs(1)", pytrace=False)
    try:
        with limited(*marker.args, **marker.kwargs):
            return (yield)
    except AssertionError as error:
        if error.__traceback__ is not None and _is_ours(error):
            pytest.fail(str(error), pytrace=False)
        raise


def _is_ours(error: AssertionError) -> bool:
    """Whether the limit was the one to raise, and not the test."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_globals.get("__name__") == "compile_policy.testing.limits"


@pytest.fixture
def policy_events() -> Iterator[list[Any]]:
    """What the policy does during the test, as `compile_policy.events.Event`."""
    from compile_policy.events import Event, listening

    heard: list[Event] = []
    with listening(heard.append):
        yield heard
