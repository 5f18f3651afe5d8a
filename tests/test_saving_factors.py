"""What an artifact is found by: every factor that changes is a miss that names it, everything else is a hit."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from compile_policy import compat
from compile_policy.artifacts.key import differences
from compile_policy.layers import PluggableLayer
from compile_policy.layers.registry import registry_scope
from compile_policy.region import Region, RegionOptions, SignatureBinder
from compile_policy.saving import machine, sources
from compile_policy.saving.factors import entry_factors, label_factors
from compile_policy.saving.form import Unsaveable
from compile_policy.saving.shelf import Index, _code
from compile_policy.saving.sources import SourceChanged, TracedCode, package_digest, watched_places
from compile_policy.saving.stable import Stable, Unstable, digest, ignore_attributes

_MODEL = """
import torch
from torch import nn
import {helper}

class Net(nn.Module):
    STEPS = 3

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.inner = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)

    def forward(self, x, flag=None):
        return {helper}.scaled(self.inner(x)) + self.config.eps + {helper}.OFFSET * self.STEPS
"""
_HELPER = "FACTOR = 2.0\nOFFSET = 1.0\n\ndef scaled(x):\n    return x * FACTOR  # as the paper has it\n"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A model in a file of its own, with a helper in another."""
    name = f"saved_model_{tmp_path.name.strip('0123456789').replace('-', '_')}_{abs(hash(tmp_path))}"
    helper = f"{name}_helper"
    (tmp_path / f"{name}.py").write_text(_MODEL.format(helper=helper))
    (tmp_path / f"{helper}.py").write_text(_HELPER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sources, "_STARTED", sources._STARTED + 1e9)
    importlib.invalidate_caches()
    yield importlib.import_module(name)
    sys.modules.pop(name), sys.modules.pop(helper)


def region_for(module: nn.Module, dims: dict[int, str | None] | None = None) -> Region:
    binder = SignatureBinder({"x": {0: None} if dims is None else dims})
    return Region(module, role="t", binder=binder, options=RegionOptions("eager"))


def factors(module: nn.Module, x: torch.Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
    region = region_for(module, kwargs.pop("dims", None))
    options = kwargs.pop("options", {"backend": "inductor"})
    call = region.bind((torch.ones(3, 4) if x is None else x,), kwargs)
    return {**entry_factors(module, call, options, region.binder), **label_factors(call, call.labels)}


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {difference.factor for difference in differences(before, after)}


def _tie(net: Any) -> None:
    net.other.weight = net.inner.weight


class _Plain(PluggableLayer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class _Other(_Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x


_ANY_MODULE = {"structure.modules", "structure.attributes", "structure.weights"}
CHANGES: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
    "config value": (lambda net: setattr(net.config, "eps", 0.5), {"config.eps", "structure.attributes"}),
    "attention implementation": (
        lambda net: setattr(net.config, "_attn_implementation", "eager"),
        {"config._attn_implementation", "structure.attributes"},
    ),
    "attribute": (lambda net: setattr(net.inner, "scale", 3.0), {"structure.attributes"}),
    "adapter": (lambda net: net.add_module("lora", nn.Linear(4, 4)), _ANY_MODULE),
    "hook": (lambda net: net.inner.register_forward_hook(lambda *a: None), {"structure.hooks"}),
    "weight dtype": (lambda net: net.half(), {"structure.weights"}),
    "gradients wanted": (lambda net: net.requires_grad_(False), {"structure.weights"}),
    "tied weights": (_tie, {"structure.weights"}),
    "training": (lambda net: net.eval(), {"mode.training flag", "structure.modules"}),
    "a forward of its own": (lambda net: setattr(net.inner, "forward", lambda x: x), {"structure.attributes"}),
    "class": (lambda net: setattr(net, "other", nn.Identity()), _ANY_MODULE),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_of_the_component_is_named(model: ModuleType, case: str) -> None:
    """Configuration, structure, weights' metadata."""
    net = model.Net(SimpleNamespace(eps=0.0, _attn_implementation="sdpa"))
    before = factors(net)
    change, expected = CHANGES[case]
    change(net)
    assert changed(before, factors(net)) == expected


def test_a_change_of_the_call_is_named(model: ModuleType) -> None:
    """Arguments, dtypes, static sizes, which dims vary, how it is lowered."""
    net = model.Net(SimpleNamespace(eps=0.0))
    before = factors(net)
    assert changed(before, factors(net, torch.ones(7, 4))) == set(), "a dynamic size"
    given = factors(net, flag=True)
    assert changed(before, given) == {"argument.flag", "value.flag"}
    assert changed(given, factors(net, flag=False)) == {"value.flag"}, "of the same class"
    assert changed(before, factors(net, torch.ones(3, 4).double())) == {"tensors.x"}
    assert changed(before, factors(net, dims={0: None, 1: None})) == {"tensors.x", "dynamic dims"}
    assert changed(before, factors(net, options={"backend": "inductor", "autotune": True})) == {"option.autotune"}


def test_a_change_of_the_process_is_named(model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions, machine, modes, numerics, Inductor's settings, overridden layers."""
    net = model.Net(SimpleNamespace(eps=0.0))
    before = factors(net)

    def now() -> set[str]:
        return changed(before, factors(net))

    with torch.no_grad():
        assert now() == {"mode.grad mode"}
    with torch.inference_mode():
        assert now() == {"mode.grad mode", "mode.inference mode"}
    with torch.autocast("cpu", torch.bfloat16):
        assert now() == {"mode.autocast"}
    with torch._inductor.config.patch(epilogue_fusion=False):
        assert now() == {"inductor"}
    flash = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(not flash)
    try:
        assert now() == {"numerics"}
    finally:
        torch.backends.cuda.enable_flash_sdp(flash)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99")
        patch.setattr(platform, "python_version", lambda: "3.99")
        assert now() == {"version.torch", "version.python"}
    with monkeypatch.context() as patch:
        patch.setattr(machine, "policy_digest", lambda backend: "edited")
        patch.setattr(compat, "cpu_capability", lambda: "NO AVX")
        assert now() == {"version.policy", "machine.instructions"}
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert now() == {"machine.threads"}
    finally:
        torch.set_num_threads(threads)
    with registry_scope():
        PluggableLayer.register("a_layer_of_this_test")(_Plain)
        _Plain.register_oot(_Other)
        assert now() == {"layers"}
    assert now() == set()


def test_noise_and_other_weights_are_no_change(model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of weights, where a checkpoint was loaded from, environment, directory, another instance."""

    class Config(SimpleNamespace):
        pass

    ignore_attributes(Config, {"_name_or_path"})
    before = factors(model.Net(Config(eps=0.0, _name_or_path="a")))
    monkeypatch.setenv("FOO_BAR", "1")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir("/")
    assert changed(before, factors(model.Net(Config(eps=0.0, _name_or_path="b")))) == set()


def test_a_value_that_nobody_can_recognise_is_said(model: ModuleType) -> None:
    """The message names module and attribute."""
    net = model.Net(SimpleNamespace(eps=0.0))
    net.inner.helper = iter(())
    with pytest.raises(Unstable, match=r"inner\.helper.*says nothing about itself"):
        factors(net)


def _captured(net: nn.Module) -> Any:
    region = region_for(net)
    with torch.no_grad():
        region(torch.ones(3, 4))
    [[entry]] = region.entries.values()
    return entry.graph


def test_traced_code_is_named(model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of every traced file, comments included, a helper's too; globals that this code names."""
    net = model.Net(SimpleNamespace(eps=0.0))
    graph = _captured(net)
    code = TracedCode(graph.traced)
    helper = f"{model.__name__}_helper"
    assert {model.__name__, helper} <= code.modules()
    index = Index(code.modules(), code.places() | watched_places(graph.watched, [model.Net]))

    def now() -> dict[str, Any]:
        return dict(index.key({}).factors)

    before = now()
    path = Path(str(sys.modules[helper].__file__))
    path.write_text(_HELPER.replace("paper", "report"))
    assert changed(before, now()) == {f"code.text.{helper}"}
    path.write_text(_HELPER)
    monkeypatch.setattr(sys.modules[helper], "FACTOR", 3.0)
    assert changed(before, now()) == {f"code.global.{helper}:FACTOR"}
    monkeypatch.undo()
    monkeypatch.setattr(sys.modules[helper], "scaled", lambda x: x)
    replaced = {f"code.global.{model.__name__}:{helper}.scaled", f"code.global.{helper}:scaled"}
    assert changed(before, now()) == replaced
    monkeypatch.undo()
    monkeypatch.setattr(sys.modules[helper], "OFFSET", 3.0)
    replaced = {f"code.global.{model.__name__}:{helper}.OFFSET", f"code.global.{helper}:OFFSET"}
    assert changed(before, now()) == replaced
    monkeypatch.undo()
    monkeypatch.setattr(model.Net, "STEPS", 4)
    assert changed(before, now()) == {f"code.global.{model.__name__}:Net.STEPS"}
    monkeypatch.undo()
    assert changed(before, now()) == set()


def test_code_that_reads_the_environment_is_not_saved() -> None:
    """Its graph may be another one in every process."""

    def reads(x: torch.Tensor) -> torch.Tensor:
        return x * len(os.environ)

    entry: Any = SimpleNamespace(graph=SimpleNamespace(traced=[reads.__code__]))
    with pytest.raises(Unsaveable, match="environ"):
        _code(entry)


def test_code_that_was_edited_meanwhile_is_not_told_by_its_file(
    model: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text on disk may be another than the one that ran."""
    traced = _captured(model.Net(SimpleNamespace(eps=0.0))).traced
    monkeypatch.setattr(sources, "_STARTED", 0.0)
    with pytest.raises(SourceChanged, match="edited"):
        TracedCode(traced)
    scope: dict[str, Any] = {}
    exec("def typed(x):\n    return x", scope)
    with pytest.raises(SourceChanged, match="<string>"):
        TracedCode([scope["typed"].__code__])


def test_forms_are_equal_for_equal_values() -> None:
    """Sets, dicts and objects without their order; functions by what they do; different values differ."""

    def make(n: int) -> Callable[[], int]:
        return lambda: n

    stable = Stable()
    assert stable({"b": 1, "a": {2, 3}}) == stable({"a": {3, 2}, "b": 1})
    assert stable(make(1)) == stable(make(1)) != stable(make(2))
    different = [
        1,
        1.0,
        True,
        "1",
        None,
        (1,),
        [1],
        {1},
        torch.float32,
        torch.device("cpu"),
        nn.Linear,
        print,
        0.0,
        -0.0,
    ]
    assert len({digest(stable(value)) for value in different}) == len(different)
    loop: list[Any] = []
    loop.append(loop)
    assert stable(loop)


def test_the_policys_own_sources_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any file of a package, but for the rooms that are left out."""
    package = tmp_path / "some_package_of_this_test"
    for name in ("__init__.py", "cli/a.py", "b.py"):
        (package / name).parent.mkdir(exist_ok=True, parents=True)
        (package / name).write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = package_digest(package.name, ("cli",))
    (package / "cli" / "a.py").write_text("x = 2\n")
    assert package_digest(package.name, ("cli",)) == before
    (package / "b.py").write_text("x = 2\n")
    assert package_digest(package.name, ("cli",)) != before
