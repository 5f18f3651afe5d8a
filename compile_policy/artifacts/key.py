"""What an artifact is found by: named factors as JSON, and one digest of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

JSON: TypeAlias = "str | int | float | bool | list[JSON] | dict[str, JSON] | None"

#: Stands for a factor that one of two keys does not have.
ABSENT = "(absent)"


@dataclass(frozen=True, eq=False)
class ArtifactKey:
    """Factors that decide whether an artifact fits; two keys are equal when their digests are.

    Args:
        factors: name -> JSON value. Names are strings at every depth; tuples become lists.

    Attributes:
        digest: SHA-256 of the canonical JSON in hexadecimal: the same in every process, whatever the order.

    Raises:
        TypeError: a value is no JSON, such as a NaN, a dtype or a mapping with numbers for names.
    """

    factors: Mapping[str, JSON]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        factors = plain(self.factors)
        assert isinstance(factors, dict)
        object.__setattr__(self, "factors", factors)
        object.__setattr__(self, "digest", hashlib.sha256(canonical(factors)).hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArtifactKey) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def canonical(value: JSON) -> bytes:
    """JSON with sorted names, no spaces and ASCII only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def plain(value: object) -> JSON:
    """A copy made of JSON types alone, or a `TypeError`."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # subclasses too, such as torch's version
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [plain(inside) for inside in value]
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"the name {name!r} is {type(name).__name__}, JSON has strings only")
        return {str.__str__(name): plain(inside) for name, inside in value.items()}
    raise TypeError(f"{value!r} ({type(value).__name__}) is no JSON value")


class Difference(NamedTuple):
    """One factor that keeps an artifact from being found. ``factor`` is a dotted path into the factors."""

    factor: str
    stored: JSON
    wanted: JSON


def differences(stored: Mapping[str, JSON], wanted: Mapping[str, JSON], prefix: str = "") -> list[Difference]:
    """Where two sets of factors differ, by name; mappings inside are compared name by name."""
    found: list[Difference] = []
    for name in sorted({*stored, *wanted}):
        ours, theirs = stored.get(name, ABSENT), wanted.get(name, ABSENT)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            found += differences(ours, theirs, f"{prefix}{name}.")
        elif (name in stored) != (name in wanted) or canonical(ours) != canonical(theirs):
            found.append(Difference(f"{prefix}{name}", ours, theirs))
    return found


def weight(difference: Difference) -> int:
    """How many factors it is about: a mapping that one of the two keys does not have at all is as many as it names."""
    return max(_leaves(difference.stored), _leaves(difference.wanted))


def _leaves(value: JSON) -> int:
    return sum(map(_leaves, value.values())) if isinstance(value, dict) else 1
