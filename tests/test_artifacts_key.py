"""Keys: one digest whatever the process or the order, and every difference has a name."""

from __future__ import annotations

import os
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compile_policy.artifacts.key import ABSENT, ArtifactKey, canonical, differences, plain
from compile_policy.artifacts.parsing import load_json

ROOT = Path(__file__).resolve().parents[1]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(), inside, max_size=3),
    max_leaves=10,
)
FACTORS = st.dictionaries(st.text(), VALUES, max_size=6)


def _reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _reordered(value[name]) for name in reversed(value)}
    return [_reordered(inside) for inside in value] if isinstance(value, list) else value


@given(FACTORS)
def test_order_does_not_matter(factors: dict[str, Any]) -> None:
    """A key is the same for any order of names, and after a round trip through JSON."""
    key = ArtifactKey(factors)
    assert ArtifactKey(_reordered(factors)) == key
    if b"\\ud" not in canonical(key.factors):  # half of a surrogate pair is no UTF-8
        assert ArtifactKey(load_json(canonical(key.factors))).digest == key.digest
    assert differences(key.factors, plain(_reordered(factors))) == []  # type: ignore[arg-type]


@given(FACTORS, FACTORS)
def test_keys_differ_when_factors_do(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal digests and no named difference are the same thing; True is not 1."""
    first, second = ArtifactKey(one), ArtifactKey(other)
    assert (first == second) == (not differences(first.factors, second.factors))


def test_same_digest_in_every_process() -> None:
    """Whatever the seed of Python's hashes, the working directory, and what else is in the environment."""
    code = "from compile_policy.artifacts.key import ArtifactKey as K\n"
    code += "print(K({n: sorted({'x', 'y', n}) for n in {'torch', 'config', 'dtype', 'rank'}}).digest)"
    here = ArtifactKey({name: sorted({"x", "y", name}) for name in ("torch", "config", "dtype", "rank")}).digest
    env = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1", "HOME": "/nowhere", "PATH": os.defpath, "FOO_1": "2"}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd="/")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == here


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("torch", "2.14.0"),
        ("level", 3),
        ("mm", 0),
        ("config.hidden_size", 8),
        ("config.rope.theta", 10000),
        ("dims", [["batch"], ["length", 1]]),
        ("adapter", "lora"),
    ],
)
def test_each_difference_is_named(name: str, value: Any) -> None:
    """The dotted path, what is stored, and what is wanted."""
    stored = {
        "torch": "2.13.0",
        "level": 2,
        "mm": False,
        "config": {"hidden_size": 4, "rope": {"theta": 10000.0}},
        "dims": [["batch"], ["length"]],
        "adapter": None,
    }
    wanted: Any = plain(stored)
    inside = wanted
    *path, last = name.split(".")
    for part in path:
        inside = inside[part]
    before, inside[last] = inside[last], value
    assert differences(stored, wanted) == [(name, before, value)]
    assert ArtifactKey(stored) != ArtifactKey(wanted)


def test_a_factor_that_one_side_lacks() -> None:
    """Absent is not null."""
    assert differences({"a": None}, {}) == [("a", None, ABSENT)]
    assert differences({}, {"a": {"b": 1}}) == [("a", ABSENT, {"b": 1})]


class Colour(StrEnum):
    RED = "red"


def test_what_is_json_and_what_is_not() -> None:
    """Subclasses of text count as text; everything else is refused instead of guessed."""
    assert ArtifactKey({"c": Colour.RED, "t": (1, 2)}) == ArtifactKey({"c": "red", "t": [1, 2]})
    for bad in (float("nan"), float("inf"), {1: "a"}, {"a": {True: 1}}, object(), b"bytes", {"set"}, Path("x")):
        with pytest.raises(TypeError):
            ArtifactKey({"bad": bad})  # type: ignore[dict-item]
