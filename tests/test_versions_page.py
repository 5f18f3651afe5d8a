"""docs/versions.md is what the contract found, for every release that is said to be tested."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from versions.__main__ import PAGE, RESULTS
from versions.page import NOT_RUN, page, problems
from versions.pairs import PAIRS, PINNED

from compile_policy.versions import TESTED, release_of

ROWS: dict[str, Any] = json.loads(RESULTS.read_text())


def test_the_page_is_made_from_the_results() -> None:
    """Nobody edited it by hand, and no results were taken without writing it."""
    assert PAGE.read_text() == page(ROWS)


def test_every_release_that_is_said_to_be_tested_is_among_the_pairs() -> None:
    """Each minor release of torch and of Transformers, and of Python, from the oldest to the newest."""
    for tested in TESTED:
        wanted = {(tested.oldest[0], minor) for minor in range(tested.oldest[1], tested.newest[1] + 1)}
        assert {release_of(getattr(pair, tested.package)) for pair in PAIRS} == wanted
    assert all(release_of(getattr(PINNED, t.package)) == release_of(t.pinned) for t in TESTED)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_a_pair_that_does_not_hold_says_why(pair: Any) -> None:
    """Each pair has a row; its problems stand on the page in words."""
    text = PAGE.read_text()
    for said in problems(pair, ROWS):
        assert said in text and len(said) > len(NOT_RUN)


def test_the_pin_holds() -> None:
    """The contract of the versions that every test runs on has no problem."""
    assert problems(PINNED, ROWS) == []


def test_problems_are_noticed() -> None:
    """A wrong result, another number of graphs, a call that ran eager and a second start that traces."""
    start = {"equal": True, "graphs": 1, "eager_calls": 0, "loaded": 1, "frames": 0, "fallback": None}
    cell = {"equal": True, "error": 0.0, "graphs": {"decoder": 2}, "eager_calls": 0, "fallback": None}
    whole: dict[str, Any] = {
        "python": PINNED.python,
        "torch": PINNED.torch,
        "transformers": PINNED.transformers,
        "changes seen by": "versions",
        "self-test": [["recompile", True, "as eager"]],
        "recorder": {"equal": True},
        "fault": {"equal": True},
        "embedded": {"first": start, "second": start},
        "architectures": {"llama": cell},
    }
    rows = {PINNED.name: whole}
    assert problems(PINNED, rows) == [] and "| yes |" in page(rows)
    other = next(pair for pair in PAIRS if pair is not PINNED)
    rows[other.name] = row = copy.deepcopy(rows[PINNED.name])
    assert problems(other, rows) == []
    name = next(iter(row["architectures"]))
    row["architectures"][name].update(equal=False, error=2.0, graphs={"decoder": 7}, eager_calls=3, fallback="a branch")
    row["embedded"]["second"]["frames"] = 4
    row["recorder"] = {"raises": "KeyError: x"}
    said = "; ".join(problems(other, rows))
    for part in ("differs from eager by 2", "decoder 7", "3 calls run eager, a branch", "traces 4", "KeyError"):
        assert part in said
    assert "**no**, see below" in page(rows)
    del rows[other.name]
    assert problems(other, rows) == ["not run yet"]
