"""Installed versions against the tested ones, and the self-test for those that are newer."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from compile_policy import glance, self_test
from compile_policy.self_test import failures
from compile_policy.versions import TESTED, compare, installed, release_of


def test_every_tested_package_is_found_and_compared() -> None:
    """What is installed here is tested; the pins are within the tested releases."""
    found = compare(installed())
    assert [f.package for f in found] == ["python", "torch", "transformers"]
    assert all(f.state in ("tested", "newer") and f.version for f in found)
    for tested in TESTED:
        pinned = release_of(tested.pinned)
        assert pinned is not None and tested.oldest <= pinned <= tested.newest


@pytest.mark.parametrize(
    ("package", "version", "state", "remedy"),
    [
        ("torch", "2.10.1", "older", "pip install 'torch>=2.11,<2.16'"),
        ("torch", "2.15.0+cu130", "tested", ""),
        ("torch", "2.16.0a0", "newer", "pip install 'torch>=2.11,<2.16'"),
        ("transformers", "5.24.0", "tested", ""),
        ("transformers", "6.0.0.dev0", "newer", "pip install 'transformers>=5.17,<5.25'"),
        ("transformers", "", "missing", "pip install 'transformers>=5.17,<5.25'"),
        ("python", "3.14.1", "newer", "Run it with Python 3.11 to 3.13."),
        ("torch", "strange", "unreadable", "pip install 'torch>=2.11,<2.16'"),
    ],
)
def test_states_and_remedies(package: str, version: str, state: str, remedy: str) -> None:
    """Each state has its remedy, and a tested version has none."""
    (finding,) = compare({package: version})
    assert (finding.state, finding.remedy) == (state, remedy)
    assert package in finding.message


def test_the_table_is_read_without_torch() -> None:
    """Other commands than those that compile show it at once."""
    code = (
        "import sys, compile_policy.versions as v; v.compare(v.installed()); print(v.__name__, 'torch' in sys.modules)"
    )
    code = f"import sys; {code}"
    env = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.stdout.split() == ["compile_policy.versions", "False"], ran.stderr


def test_the_self_test_passes_and_leaves_nothing_behind() -> None:
    """Three checks, each with what was seen; the random state is as before."""
    state = torch.get_rng_state()
    results = self_test.self_test()
    assert [(name, passed) for name, passed, _ in results] == [
        ("attribute change", True),
        ("mask change", True),
        ("recompile", True),
    ]
    assert failures(results) == "" and torch.equal(state, torch.get_rng_state())


def test_the_self_test_sees_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a write to an attribute is not noticed, its check fails and says by how much."""
    monkeypatch.setattr(glance.Glance, "holds", lambda self: True)
    results = {name: (passed, detail) for name, passed, detail in self_test.self_test()}
    assert not results["attribute change"][0] and "differs from eager" in results["attribute change"][1]
    assert results["mask change"][0]
