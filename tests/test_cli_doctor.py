"""``compile-policy doctor``: what is right is said to be, what is broken has a remedy, nothing is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import compile_policy.backend
import compile_policy.versions
from compile_policy.artifacts import ArtifactKey, Store, open_store
from compile_policy.cli import main

CHECKS = {"python", "torch", "transformers", "compiler", "temporary directory", "cache", "backend transformers"}
#: Looks at everything but the compiler, which takes seconds.
QUICK = ("doctor", "-cc.backend=eager")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The user's own cache with one artifact."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "200")
    found = open_store(None)
    assert found is not None
    found.save(ArtifactKey({"a": 1}), {"x": b"data"}, {})
    return found


def _lines(capsys: pytest.CaptureFixture[str], *argv: str, code: int) -> list[dict[str, Any]]:
    assert main([*argv, "--json"]) == code
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    assert found["healthy"] is (code == 0)
    assert all(bool(line["remedy"]) or line["state"] == "ok" for line in found["lines"]), found["lines"]
    lines: list[dict[str, Any]] = found["lines"]
    for state in ("ok", "warning", "error"):
        assert found[state] == sum(line["state"] == state for line in lines)
    return lines


def _of(lines: list[dict[str, Any]], name: str) -> list[tuple[str, str]]:
    return [(line["state"], line["message"]) for line in lines if line["name"] == name]


def test_everything_is_looked_at(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Versions, a real kernel by the real compiler, directories, backends, self-test: each has a line."""
    before = {path for path in store.root.rglob("*") if path.is_file()}
    lines = _lines(capsys, "doctor", code=0)
    assert {line["name"] for line in lines} >= CHECKS | {"hello kernel"}
    assert sum(line["name"].startswith("self-test: ") for line in lines) >= 3
    ((state, message),) = _of(lines, "hello kernel")
    assert state == "ok" and message.startswith("compiled, loaded and right in ")
    ((state, message),) = _of(lines, "cache")
    assert state == "ok" and "mode 0700" in message and "1 good and 0 damaged" in message
    assert {path for path in store.root.rglob("*") if path.is_file()} == before


def test_lines_for_people(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, and how many of which state."""
    assert main(list(QUICK)) == 0
    out = capsys.readouterr().out
    assert "ok      torch: " in out
    assert out.splitlines()[-1].split()[1].rstrip(",") == "ok"


def test_no_compiler(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Said, with what to install; the other lines are there all the same."""
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")}):
        lines = _lines(capsys, "doctor", code=1)
    assert [state for state, _ in _of(lines, "compiler")] == ["error"]
    assert not _of(lines, "hello kernel")
    assert {line["name"] for line in lines} >= CHECKS
    assert "g++" in next(line["remedy"] for line in lines if line["name"] == "compiler")


def test_a_damaged_artifact(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """An error, as for ``cache doctor``, which stays."""
    (store.folders.of(ArtifactKey({"a": 1}).digest) / "x").write_bytes(b"dat@")
    lines = _lines(capsys, *QUICK, code=1)
    assert [state for state, _ in _of(lines, "cache")] == ["ok", "error"]
    assert main(["cache", "doctor"]) == 1


def test_a_directory_that_is_open_to_others(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused with the command that repairs it."""
    store.root.chmod(0o777)
    lines = _lines(capsys, *QUICK, code=1)
    assert any("chmod 700" in line["remedy"] for line in lines if line["name"] == "cache")


def test_a_backend_that_cannot_be_imported(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of its own; the others are looked at."""
    monkeypatch.setitem(compile_policy.backend._BUILT_IN, "broken", "no_such_backend")
    lines = _lines(capsys, *QUICK, code=1)
    assert [state for state, _ in _of(lines, "backend broken")] == ["error"]
    assert [state for state, _ in _of(lines, "backend transformers")] == ["ok"]


@pytest.mark.parametrize(
    ("versions", "state", "code"), [("99.0", "warning", 0), ("1.13", "error", 1), ("", "error", 1)]
)
def test_versions_that_are_not_tested(
    store: Store,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    versions: str,
    state: str,
    code: int,
) -> None:
    """A newer one is a warning, an older or a missing one an error; each with what to install."""
    monkeypatch.setattr(compile_policy.versions, "installed", lambda: {"torch": versions})
    lines = _lines(capsys, *QUICK, code=code)
    assert [found for found, _ in _of(lines, "torch")] == [state]
    assert "pip install" in next(line["remedy"] for line in lines if line["name"] == "torch")


def test_a_check_that_cannot_be_made(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a line too."""

    def broken() -> dict[str, str]:
        raise RuntimeError("no metadata")

    monkeypatch.setattr(compile_policy.versions, "installed", broken)
    lines = _lines(capsys, *QUICK, code=1)
    assert _of(lines, "versions") == [("error", "could not be checked: RuntimeError: no metadata")]


def test_a_temporary_directory_that_is_nearly_full(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning: packages are unpacked there."""
    monkeypatch.setattr("compile_policy.cli.checks._LITTLE_ROOM", 1 << 62)
    lines = _lines(capsys, *QUICK, code=0)
    assert [state for state, _ in _of(lines, "temporary directory")] == ["warning"]


def test_a_cache_that_is_turned_off(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is wrong with that."""
    lines = _lines(capsys, *QUICK, "-cc.cache_dir=false", code=0)
    assert _of(lines, "cache") == [("ok", "turned off (cache_dir is false)")]
