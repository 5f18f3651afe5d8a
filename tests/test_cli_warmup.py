"""``compile-policy warmup`` and ``cache why-miss MODEL``: what is compiled ahead, what is stored, what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compile_policy.cli.app import USER_MISTAKE, main


@pytest.mark.parametrize("sizes", ["8", "0x8", "1x1", "axb", "1x8;2x8", ""])
def test_sizes_that_are_none(sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that says how sizes are written."""
    assert main(["warmup", "tiny:llama", "--sizes", sizes]) == USER_MISTAKE
    assert "BATCHxTOKENS" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["warmup", "--check"], ["cache", "why-miss"]])
def test_an_empty_store_is_said(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is compiled; each component says what it lacks, and the exit code says so too."""
    assert main([*command, "tiny:llama", "--json", f"-cc.cache_dir={tmp_path / 'cache'}"]) == 1
    [row] = json.loads(capsys.readouterr().out)["components"]
    assert row["missing"] == ["nothing is stored for this component"]
    assert row["graphs"] == row["loaded"] == 0 and row["eager_calls"] == row["calls"] > 0


@pytest.mark.slow
def test_warm_then_nothing_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One graph for all sizes; the second run loads; another level is a miss that names it."""
    words = ["tiny:llama", f"-cc.cache_dir={tmp_path / 'cache'}"]
    assert main(["warmup", *words, "--sizes", "1x8,2x5", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["components"]
    assert (row["graphs"], row["loaded"], row["fallback"]) == (1, 0, None)
    assert main(["warmup", *words]) == 0
    printed = capsys.readouterr()
    assert "loaded in" in printed.err and "compiled" in printed.out
    assert main(["warmup", *words, "--check"]) == 0
    assert main(["cache", "why-miss", *words, "-O3", "--json"]) == 1
    [row] = json.loads(capsys.readouterr().out.splitlines()[-1])["components"]
    assert row["missing"] == ["option.autotune changed"]
