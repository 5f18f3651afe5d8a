"""Versions that the tests have not run on: refused, or told of once and tried."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import compile_policy as cp
from compile_policy import backend, environment
from compile_policy.applied import regions
from compile_policy.errors import EnvironmentNotSupported
from compile_policy.self_test import Result
from compile_policy_transformers.self_test import self_test as decoder_self_test
from compile_policy_transformers.tiny import tiny_inputs, tiny_model

EAGER = cp.CompilationConfig(backend="eager", cache_dir=False)


@cp.support_torch_compile(config=EAGER)
class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Versions are asked for again in each test, and after it."""
    environment.forget()
    yield
    environment.forget()


def _installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    found = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.24.0", **versions}
    monkeypatch.setattr(environment, "installed", lambda: found)
    monkeypatch.setattr(backend, "installed", lambda: found)


def _failing() -> list[Result]:
    return [("attribute change", False, "differs from eager by 3"), ("mask change", True, "as eager")]


def test_a_newer_torch_is_told_of_once_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning that names the version and what to install; the self-test passes, and calls are compiled."""
    _installed(monkeypatch, torch="2.99.0")
    with pytest.warns(cp.PolicyWarning, match=r"torch 2\.99\.0 is newer.*passed.*pip install 'torch>=") as caught:
        module = Doubled()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Doubled()
        with torch.no_grad():
            assert torch.equal(again(torch.ones(3)), torch.full((3,), 2.0))
    assert [(r.graphs, r.eager_calls) for r in regions(again)] == [(1, 0)] and len(regions(module)) == 1


def test_a_failed_self_test_keeps_everything_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are eager's, and warning and report say which check failed."""
    _installed(monkeypatch, python="3.99.1")
    with pytest.warns(cp.PolicyWarning, match=r"python 3\.99\.1.*attribute change: differs from eager by 3"):
        reason = environment.obstacle(environment.CORE, _failing)
    assert "attribute change" in reason and "mask change" not in reason
    module = Doubled()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", cp.PolicyWarning)
        assert torch.equal(module(torch.ones(3)), torch.full((3,), 2.0))
    (region,) = regions(module)
    assert (region.graphs, region.eager_calls) == (0, 1) and region.report().fallback == reason


def test_a_self_test_that_raises_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exception is the reason."""
    _installed(monkeypatch, torch="3.0")

    def raising() -> list[Result]:
        raise RuntimeError("no such symbol")

    with pytest.warns(cp.PolicyWarning, match="RuntimeError: no such symbol"):
        assert environment.obstacle(environment.CORE, raising)


@pytest.mark.parametrize(("package", "version"), [("torch", "2.10.0"), ("python", "3.10.4"), ("torch", "")])
def test_library_users_are_refused_an_old_version(monkeypatch: pytest.MonkeyPatch, package: str, version: str) -> None:
    """A decorated class says what to install when it is built; asked again, it says so again."""
    _installed(monkeypatch, **{package: version})
    for _ in range(2):
        with pytest.raises(EnvironmentNotSupported, match=rf"{package} {version}.*(pip install|Run it with)"):
            Doubled()


def test_an_old_transformers_is_refused_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the backend that needs it, and by `apply`; decorated classes do without."""
    _installed(monkeypatch, transformers="5.16.1")
    assert len(regions(Doubled())) == 1
    with pytest.raises(EnvironmentNotSupported, match=r"pip install 'transformers>=5\.17,<5\.25'"):
        cp.apply(nn.Linear(2, 2), EAGER)
    monkeypatch.setattr(backend.sys, "modules", {})
    with pytest.raises(EnvironmentNotSupported, match=r"transformers 5\.16\.1"):
        backend.find_backend()


def test_a_newer_transformers_that_fails_keeps_a_model_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decoder is as eager, and the report has the reason."""
    _installed(monkeypatch, transformers="7.1.0")
    with pytest.warns(cp.PolicyWarning, match=r"transformers 7\.1\.0"):
        environment.obstacle(("transformers",), _failing)
    model = cp.apply(tiny_model("llama"), EAGER)
    inputs: Any = tiny_inputs(model, text_len=4)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", cp.PolicyWarning)
        got = model(**inputs).logits
        with cp.eager(model):
            assert torch.equal(got, model(**inputs).logits)
    (row,) = [c for c in cp.report(model).components if c.role == "decoder"]
    assert row.graphs == 0 and row.eager_calls == 1 and "transformers 7.1.0" in str(row.fallback)


def test_the_decoder_passes_its_self_test() -> None:
    """Three checks on a decoder; the random state is as before."""
    state = torch.get_rng_state()
    results = decoder_self_test()
    assert [passed for _, passed, _ in results] == [True, True, True], results
    assert torch.equal(state, torch.get_rng_state())
