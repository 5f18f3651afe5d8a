"""The pairs of versions that `make test-versions` builds and runs the contract on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """One environment.

    Attributes:
        python, torch, transformers: versions to install.
        why: what the pair is there for.
    """

    python: str
    torch: str
    transformers: str
    why: str

    @property
    def name(self) -> str:
        return f"python{self.python}-torch{self.torch}-transformers{self.transformers}"


PINNED = Pair("3.11", "2.13.0", "5.24.0", "the pin: every test runs on it")
#: Floor, each minor release between, pin, newest.
PAIRS = (
    Pair("3.12", "2.11.0", "5.17.0", "the floor of torch and of Transformers"),
    Pair("3.11", "2.12.1", "5.24.0", "each minor release of torch"),
    Pair("3.11", "2.14.1", "5.24.0", "each minor release of torch"),
    Pair("3.11", "2.13.0", "5.17.0", "each minor release of Transformers"),
    Pair("3.11", "2.13.0", "5.18.0", "each minor release of Transformers"),
    Pair("3.11", "2.13.0", "5.19.0", "each minor release of Transformers"),
    Pair("3.11", "2.13.0", "5.20.0", "each minor release of Transformers"),
    Pair("3.11", "2.13.0", "5.21.0", "each minor release of Transformers"),
    Pair("3.11", "2.13.0", "5.22.0", "each minor release of Transformers"),
    Pair("3.11", "2.13.0", "5.23.0", "each minor release of Transformers"),
    PINNED,
    Pair("3.13", "2.15.0", "5.24.0", "the newest of all three"),
)
