"""What holds for every test: no network, no configuration from the machine that runs the tests, an empty cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before Transformers is imported: a hub id in a test must fail at once instead of waiting for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for name in [name for name in os.environ if name.startswith("COMPILE_POLICY_")]:
    del os.environ[name]


@pytest.fixture(autouse=True, scope="module")
def _empty_cache_for_fixtures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Models that a whole module shares are built before any test's own fixtures."""
    with pytest.MonkeyPatch.context() as patch:
        _use_cache(patch, tmp_path_factory.mktemp("user"))
        yield


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled yet, whatever other tests and the user have compiled."""
    _use_cache(monkeypatch, tmp_path_factory.mktemp("user"))


def _use_cache(patch: pytest.MonkeyPatch, home: Path) -> None:
    patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    patch.setenv("XDG_CONFIG_HOME", str(home / "config"))
