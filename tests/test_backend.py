"""Backends are found by name; one that cannot be imported says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from compile_policy import backend
from compile_policy.backend import find_backend
from compile_policy.errors import PolicyError


def test_an_unknown_backend() -> None:
    """What there is, is said."""
    with pytest.raises(PolicyError, match=r"No backend 'jax' is installed\. There are: .*transformers"):
        find_backend("jax")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import a_library_that_is_not_there", r"needs a_library_that_is_not_there.* pip install a_library"),
        ("raise ModuleNotFoundError('no kernels here')", r"cannot be imported: ModuleNotFoundError: no kernels here\."),
        ("raise ImportError('too old', name='kernels')", r"cannot be imported: ImportError: too old\. python -c 'imp"),
    ],
)
def test_a_backend_that_cannot_be_imported(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing library is named with its remedy, another failure with its own words."""
    (tmp_path / "failing_backend.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(backend._BUILT_IN, "failing", "failing_backend")
    with pytest.raises(PolicyError, match=said):
        find_backend("failing")
