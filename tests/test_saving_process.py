"""An entry that one process saved is loaded by the next: nothing is traced, nothing is built, tokens are eager's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(name: str, cache: Path, *options: str, inductor: Path, **environ: str) -> dict[str, Any]:
    """One process on the store at ``cache``; the report it prints."""
    inductor.mkdir(exist_ok=True)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "OMP_NUM_THREADS": "1"}
    temporary = inductor.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(inductor), "TMPDIR": str(temporary), **environ}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "saved_program.py"), name, str(cache), *options]
    ran = subprocess.run(command, capture_output=True, text=True, env=env, cwd=inductor.parent, timeout=900)
    assert ran.returncode == 0, ran.stderr[-3000:]
    if sys.platform.startswith("linux"):  # what torch unpacks and what is compiled in passing: nothing stays behind
        assert not [*temporary.glob("aotinductor_*"), *temporary.glob("compile_policy_*")]
    found: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return found


def kinds(found: dict[str, Any]) -> set[str]:
    return {kind for kind, _, _ in found["events"]}


def assert_warm(found: dict[str, Any], inductor: Path) -> None:
    """Loaded, traced nothing, ran no trial, built nothing, and right."""
    assert found["equal"]
    assert all(row["graphs"] == 0 and row["loaded"] >= 1 for row in found["rows"]), found["events"]
    assert all(row["eager_calls"] == 0 and row["fallback"] is None for row in found["rows"])
    assert found["frames"] == 0 and found["captured"] == 0
    assert "loaded" in kinds(found) and not {"miss", "compile_start"} & kinds(found)
    assert not list(inductor.rglob("*.so")) and not list(inductor.rglob("*.cpp"))


def test_the_next_process_traces_nothing(tmp_path: Path) -> None:
    """0 frames, an Inductor directory that stays empty, no compiler, other weights, other surroundings: still a hit."""
    cache = tmp_path / "cache"
    first = run("tiny:llama", cache, inductor=tmp_path / "first")
    assert first["equal"] and {"miss", "saved"} <= kinds(first), first["events"]
    noise = {"PYTHONHASHSEED": "7", "FOO_BAR": "1", "PATH": "/nowhere", "HOSTNAME": "other", "CXX": "/bin/false"}
    second = run("tiny:llama", cache, "seed=3", "name=/a/checkpoint", inductor=tmp_path / "second", **noise)
    assert_warm(second, tmp_path / "second")


@pytest.mark.slow
def test_blocks_alone(tmp_path: Path) -> None:
    """At -O1 what surrounds the blocks is kept as the names of its operators."""
    first = run("tiny:llama", tmp_path / "cache", "mode=1", inductor=tmp_path / "first")
    assert first["equal"] and {"miss", "saved"} <= kinds(first), first["events"]
    assert [row["blocks"] for row in first["rows"]] == ["1 distinct block of 2, the rest as captured"]
    second = run("tiny:llama", tmp_path / "cache", "mode=1", inductor=tmp_path / "second")
    assert_warm(second, tmp_path / "second")
    assert second["rows"][0]["blocks"] == first["rows"][0]["blocks"]
    other = run("tiny:llama", tmp_path / "cache", "mode=2", inductor=tmp_path / "third")
    assert "miss" in kinds(other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny:qwen2_5_vl", "tiny:gemma3"])
def test_decoder_and_encoder(tmp_path: Path, name: str) -> None:
    """Towers too: packed attention is an operator that a package calls through the dispatcher."""
    first = run(name, tmp_path / "cache", "encoder", inductor=tmp_path / "first")
    assert first["equal"] and len(first["rows"]) == 2
    assert all(row["graphs"] >= 1 for row in first["rows"])
    second = run(name, tmp_path / "cache", "encoder", inductor=tmp_path / "second", PYTHONHASHSEED="5")
    assert_warm(second, tmp_path / "second")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cache"),
    [(name, kind) for name in ("tiny:mamba2", "tiny:qwen3_5") for kind in ("dynamic", "static")]
    + [("tiny:qwen3_next", "dynamic")],
)
def test_linear_attention(tmp_path: Path, name: str, cache: str) -> None:
    """The rules of linear attention are operators in Python, which the backend registers before it loads an entry.

    Code names them, and what is handed to them, under several names: the hash seeds are of processes that come to
    these names in other orders.
    """
    options = ("static",) if cache == "static" else ()
    first = run(name, tmp_path / "cache", *options, inductor=tmp_path / "first", PYTHONHASHSEED="1")
    assert first["equal"] and [row["graphs"] for row in first["rows"]] == [1]
    noise = {"PYTHONHASHSEED": "3", "PATH": "/nowhere", "CXX": "/bin/false"}
    second = run(name, tmp_path / "cache", "seed=3", *options, inductor=tmp_path / "second", **noise)
    assert_warm(second, tmp_path / "second")


@pytest.mark.slow
def test_a_moved_store_is_as_good(tmp_path: Path) -> None:
    """Nothing in an artifact depends on where the store is."""
    run("tiny:llama", tmp_path / "cache", inductor=tmp_path / "first")
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    assert_warm(run("tiny:llama", tmp_path / "elsewhere", inductor=tmp_path / "second"), tmp_path / "second")
