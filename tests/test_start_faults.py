"""What is wrong with one process costs that process its compiled code, and no other process anything."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Started:
    """A process on a store, with directories for what torch writes."""

    def __init__(self, folder: Path, name: str, *options: str, cache: str = "cache", **environ: str) -> None:
        self.temporary = folder / f"temporary-{name}"
        self.temporary.mkdir(exist_ok=True)
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "OMP_NUM_THREADS": "1"}
        env |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor-{name}"), "TMPDIR": str(self.temporary), **environ}
        env |= {"XDG_CONFIG_HOME": str(folder / "config")}  # one key for all processes on a store
        command = [sys.executable, str(ROOT / "tests" / "starting_processes.py"), str(folder / cache), *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=folder
        )

    def result(self) -> dict[str, Any]:
        out, err = self.process.communicate(timeout=500)
        assert self.process.returncode == 0, err[-3000:]
        found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        found["kinds"] = [kind for kind, _, _ in found["events"]]
        found["stderr"] = err
        return found


def artifacts(folder: Path) -> set[str]:
    return {path.name for path in (folder / "cache" / "v1").glob("*/*")}


def groups_alive() -> set[str]:
    """Process groups with a member that runs. A container's first process may leave dead orphans in the table."""
    shown = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in shown.splitlines()]
    return {group for group, state in rows if not state.startswith("Z")}


def set_aside(folder: Path) -> list[Path]:
    return list((folder / "cache" / "quarantine").glob("*"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A folder with a store on which two processes started together, and what each of them says."""
    folder = tmp_path_factory.mktemp("pair")
    started = [Started(folder, str(n), f"barrier={folder / 'go'}") for n in range(2)]
    (folder / "go").touch()
    return folder, [one.result() | {"pid": one.process.pid} for one in started]


def test_two_processes_on_one_cold_cache_compile_once(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    """One compiles; the other says for whom it waits, since when, and loads what was made."""
    folder, found = pair
    maker, waiter = sorted(found, key=lambda row: -row["graphs"])
    assert (maker["graphs"], maker["loaded"], waiter["graphs"], waiter["loaded"]) == (1, 0, 0, 1), found
    assert all(row["equal"] and row["fallback"] is None for row in found)
    assert len(artifacts(folder)) == 2 and not set_aside(folder)
    assert "waiting" not in maker["kinds"]
    message, data = next((message, data) for kind, message, data in waiter["events"] if kind == "waiting")
    assert data["pid"] == maker["pid"] and data["host"] == socket.gethostname()
    assert f"process {maker['pid']} on this machine" in message


@pytest.mark.slow
def test_three_processes_compile_once_in_every_round(tmp_path: Path) -> None:
    """Several rounds, each on a cold cache."""
    for round_ in range(3):
        folder = tmp_path / str(round_)
        folder.mkdir()
        started = [Started(folder, str(n), f"barrier={folder / 'go'}") for n in range(3)]
        (folder / "go").touch()
        found = [one.result() for one in started]
        assert sorted((row["graphs"], row["loaded"]) for row in found) == [(0, 1), (0, 1), (1, 0)], found
        assert all(row["equal"] for row in found) and not set_aside(folder)


def _unharmed(folder: Path, before: set[str], found: dict[str, Any], says: str) -> None:
    """The process ran eager for a reason that is named, compiled nothing in vain, and left the store as it was."""
    assert found["equal"] and (found["loaded"], found["graphs"]) == (0, 0), found
    assert says in found["fallback"], found["fallback"]
    assert artifacts(folder) == before and not set_aside(folder)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own; skips where it cannot be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [("noexec,size=256m", "mounted noexec"), ("size=16k", "no space is left in")],
    ids=["noexec", "full"],
)
def test_a_temporary_directory_that_cannot_be_used(
    pair: tuple[Path, list[dict[str, Any]]], tmp_path: Path, options: str, says: str
) -> None:
    """The reason names it, nothing stays in it, and the artifact is there for the next process."""
    folder, _ = pair
    before = artifacts(folder)
    with mounted(tmp_path / "small", options):
        if says.startswith("no space"):
            (tmp_path / "small" / "filler").write_bytes(bytes(12 << 10))
        found = Started(folder, "bad", TMPDIR=str(tmp_path / "small")).result()
        left = [path.name for path in (tmp_path / "small").iterdir() if path.name != "filler"]
    assert not [name for name in left if name.startswith(("aotinductor_", "compile_policy_"))]
    _unharmed(folder, before, found, says)
    assert str(tmp_path / "small") in found["fallback"]


def test_files_that_may_not_be_written(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    """A limit of the process: the reason says so, the artifact stays, and the next process loads it."""
    folder, _ = pair
    before = artifacts(folder)
    _unharmed(folder, before, Started(folder, "short", "size=100").result(), "larger than this process may write")
    after = Started(folder, "after").result()
    assert (after["graphs"], after["loaded"], after["equal"]) == (0, 1, True), after
    assert artifacts(folder) == before


def test_a_compiler_that_hangs_is_ended(tmp_path: Path) -> None:
    """The reason names the compiler and the limit, and what it had started is gone with it."""
    compiler = tmp_path / "slow-g++"
    compiler.write_text(f"""#!/bin/sh
case "$*" in *-c*) echo $$ >> {tmp_path}/started; sleep 1000 & wait;; *) exec g++ "$@";; esac
""")
    compiler.chmod(0o700)
    found = Started(tmp_path, "hung", "limit=3", CXX=str(compiler)).result()
    assert found["equal"] and "did not end within 3 s" in found["fallback"], found
    assert "slow-g++" in found["fallback"]
    groups = set((tmp_path / "started").read_text().split())
    assert groups
    deadline = time.monotonic() + 30
    while alive := groups & groups_alive():
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def test_a_waiter_does_not_wait_for_ever(tmp_path: Path) -> None:
    """Behind a process that stands still it goes on by itself, and says so."""
    first = Started(tmp_path, "first")
    locks = tmp_path / "cache" / "locks"
    deadline = time.monotonic() + 300
    while not any(path.stat().st_size for path in locks.glob("*")):
        assert time.monotonic() < deadline and first.process.poll() is None
        time.sleep(0.01)
    first.process.send_signal(signal.SIGSTOP)
    try:
        found = Started(tmp_path, "second", "wait=2").result()
    finally:
        first.process.kill()
        first.process.communicate()
    assert (found["graphs"], found["equal"], found["fallback"]) == (1, True, None), found
    assert {"waiting", "note"} <= set(found["kinds"])
    assert any("not waiting longer" in message for _, message, _ in found["events"])
