"""What the entries under one set of factors depend on beside these, and what was found out about them since."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compile_policy.artifacts import JSON, ArtifactKey
from compile_policy.saving.factors import VALUES
from compile_policy.saving.sources import state_of

Factors = Mapping[str, JSON]
#: The file of an index in the store.
INDEX = "index.json"


def index_key(factors: Factors) -> ArtifactKey:
    """The key of an index, which is the same whatever the values of arguments without tensors."""
    return ArtifactKey({**{name: value for name, value in factors.items() if name != VALUES}, "kind": "index"})


@dataclass
class Index:
    """What of the code mattered to the entries under one set of factors.

    Attributes:
        modules: those whose text was traced; ``places``: globals that this code names.
        read: arguments without tensors whose values some entry depends on.
        proved: per entry the forms of call that were compared with eager.
        minded: per entry the relations that it was made without, and that turned out to matter.
    """

    modules: set[str] = field(default_factory=set)
    places: set[str] = field(default_factory=set)
    proved: dict[str, set[str]] = field(default_factory=dict)
    minded: dict[str, set[str]] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    def key(self, factors: Factors) -> ArtifactKey:
        """The key of the entry that fits the code as it is now."""
        values: Any = factors.get(VALUES, {})
        read = {name: value for name, value in values.items() if name in self.read}
        code = state_of(self.modules, self.places)
        return ArtifactKey({**factors, VALUES: read, "kind": "entry", "code": code})

    def encode(self) -> bytes:
        values = {"modules": sorted(self.modules), "places": sorted(self.places), "read": sorted(self.read)}
        by_entry = {
            name: {key: sorted(found) for key, found in getattr(self, name).items()} for name in ("proved", "minded")
        }
        return json.dumps({**values, **by_entry}).encode()

    @classmethod
    def decode(cls, text: bytes) -> Index:
        values = json.loads(text)
        proved, minded = (
            {str(key): set(found) for key, found in values[name].items()} for name in ("proved", "minded")
        )
        return cls(set(values["modules"]), set(values["places"]), proved, minded, set(values["read"]))

    def add(self, other: Index) -> None:
        """What another process knows, too."""
        self.modules |= other.modules
        self.places |= other.places
        self.read |= other.read
        for mine, theirs in ((self.proved, other.proved), (self.minded, other.minded)):
            for key, found in theirs.items():
                mine.setdefault(key, set()).update(found)
