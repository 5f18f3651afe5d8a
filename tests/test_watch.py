"""What is registered with a module of a region is noticed at once; nobody else pays for it."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from falling import falls_back
from torch import nn
from torch.nn.modules import module as registration

from compile_policy import watch
from compile_policy.fingerprint import Fingerprint
from compile_policy.region import Bound, Region, RegionOptions, SignatureBinder
from compile_policy.watch import structure_epoch


def hooks() -> int:
    return (
        len(registration._global_module_registration_hooks)
        + len(registration._global_parameter_registration_hooks)
        + len(registration._global_buffer_registration_hooks)
    )


class Sequence(SignatureBinder):
    """Only the first call starts a sequence."""

    started = False

    def bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        bound = super().bind(module, args, kwargs)
        first, self.started = not self.started, True
        return Bound(bound.values, bound.label, boundary=first)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.register_buffer("offset", torch.ones(4))
        self.eps = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.linear(x) + self.offset + self.eps


@pytest.fixture(autouse=True)
def hooks_as_before() -> Iterator[None]:
    """Whatever a test leaves attached is taken off, so that one failure is not five."""
    gc.collect()
    yield
    watch._attached.clear()
    watch._uninstall()


def region(model: nn.Module) -> Region:
    return Region(model, role="t", binder=Sequence({"x": {0: None}}), options=RegionOptions("eager"))


REGISTRATIONS = {
    "sub-module": lambda m: setattr(m, "linear", nn.Linear(4, 4)),
    "sub-module in a list": lambda m: m.layers.__setitem__(0, nn.Linear(4, 4)),
    "sub-module appended": lambda m: m.layers.append(nn.Linear(4, 4)),
    "add_module": lambda m: m.add_module("linear", nn.Identity()),
    "parameter": lambda m: setattr(m.linear, "weight", nn.Parameter(torch.ones(4, 4))),
    "parameter by name": lambda m: m.linear.register_parameter("bias", nn.Parameter(torch.ones(4))),
    "buffer": lambda m: setattr(m, "offset", torch.zeros(4)),
    "buffer by name": lambda m: m.register_buffer("offset", torch.zeros(4)),
}


@pytest.mark.parametrize("how", REGISTRATIONS)
def test_a_registration_is_seen_within_a_sequence(how: str) -> None:
    """A call that starts no sequence finds the structure changed and does not run the old graph."""
    model, x = Model().eval(), torch.rand(3, 4)
    ours = region(model)
    ours.attach()
    assert torch.equal(model(x), model.forward(x)) and torch.equal(model(x), model.forward(x)) and ours.graphs == 1
    epoch = structure_epoch()
    REGISTRATIONS[how](model)
    assert structure_epoch() > epoch
    assert torch.equal(model(x), model.forward(x)) and ours.graphs == 2
    ours.detach()


def test_a_hook_that_comes_or_goes_within_a_sequence_is_seen() -> None:
    """Hooks on sub-modules are noticed at the next call, whether it starts a sequence or not."""
    model, x = Model().eval(), torch.rand(3, 4)
    ours = region(model)
    plain = ours(x)
    handle = model.linear.register_forward_hook(lambda m, a, r: r + 1)
    with falls_back("linear has a hook"):
        hooked = ours(x)
    assert torch.equal(hooked, model.forward(x)) and not torch.equal(hooked, plain)
    assert (ours.graphs, ours.eager_calls, ours.fallback) == (1, 1, "linear has a hook")
    handle.remove()
    assert torch.equal(ours(x), plain) and (ours.graphs, ours.eager_calls) == (1, 1)


def test_without_the_hooks_it_would_be_wrong() -> None:
    """Control: a region that is not attached sees a new sub-module only where a sequence starts."""
    model, x = Model().eval(), torch.rand(3, 4)
    ours = region(model)
    ours(x)
    model.linear = nn.Linear(4, 4)
    assert not torch.equal(ours(x), model.forward(x))


def test_a_plain_attribute_waits_for_the_next_sequence() -> None:
    """As documented: torch has no hook for it, so it is seen where a sequence starts."""
    model, x = Model().eval(), torch.rand(3, 4)
    ours = region(model)
    ours.attach()
    model(x)
    before, epoch = model(x), structure_epoch()  # the call after a capture looks again
    model.eps = 2.0
    assert structure_epoch() == epoch and torch.equal(model(x), before)
    ours.binder.started = False  # type: ignore[attr-defined]
    assert torch.equal(model(x), model.forward(x)) and not torch.equal(model(x), before)
    ours.detach()


def test_the_number_is_looked_up_again_when_something_was_registered() -> None:
    """The short road compares ``number``: it moves with a registration, and only then looks at the module."""
    model = Model()
    seen = Fingerprint(model)
    seen.attach()
    first = seen.current(look_again=True)
    model.eps = 5.0
    assert seen.number == first, "nothing was registered"
    model.linear = nn.Linear(4, 4)
    assert seen.number != first and seen.number == seen.current(look_again=False)
    seen.detach()


def test_registrations_elsewhere_cost_nothing() -> None:
    """Building other modules does not raise the epoch; what was added to a watched module is watched too."""
    model = Model()
    seen = Fingerprint(model)
    seen.attach()
    epoch = structure_epoch()
    other = Model()
    other.linear = nn.Linear(2, 2)
    assert structure_epoch() == epoch
    model.extra = nn.Sequential(nn.Linear(2, 2))
    epoch = structure_epoch()
    model.extra[0].weight = nn.Parameter(torch.ones(2, 2))
    assert structure_epoch() == epoch + 1
    seen.detach()


def test_hooks_are_there_only_while_a_region_is() -> None:
    """Installed by the first region, shared by the next, gone with the last, also when it was never detached."""
    assert hooks() == 0
    first, second = region(Model()), region(Model())
    first.attach()
    first.attach()
    second.attach()
    assert hooks() == 3
    first.detach()
    assert hooks() == 3
    watched, other = second.module, first.module
    epoch = structure_epoch()
    other.linear = nn.Identity()
    assert structure_epoch() == epoch
    watched.linear = nn.Identity()
    assert structure_epoch() == epoch + 1
    del second, watched
    gc.collect()
    assert hooks() == 0


def test_the_collector_may_come_in_between() -> None:
    """Regions that nobody detached are collected while another is attached, looked at or taken off."""

    class Collecting(Model):
        def modules(self, *args: Any) -> Iterator[nn.Module]:
            gc.collect()
            return super().modules(*args)

        def __hash__(self) -> int:
            gc.collect()
            return super().__hash__()

    def left_behind() -> None:
        lost = region(Model())
        lost.attach()
        lost.itself = lost  # type: ignore[attr-defined]

    gc.disable()
    try:
        for _ in range(3):
            kept, taken_off = region(Collecting()), region(Collecting())
            left_behind()
            kept.attach()
            left_behind()
            taken_off.attach()
            left_behind()
            taken_off.detach()
            epoch = structure_epoch()
            left_behind()
            kept.module.linear = nn.Identity()
            assert structure_epoch() == epoch + 1
            kept.detach()
    finally:
        gc.enable()
    gc.collect()
    assert hooks() == 0 and not watch._attached


def test_importing_installs_nothing() -> None:
    """``import compile_policy`` leaves torch as it is."""
    code = (
        "import compile_policy, compile_policy.region; from torch.nn.modules import module as m; "
        "print(len(m._global_module_registration_hooks), len(m._global_buffer_registration_hooks))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["0", "0"]


def test_a_capture_does_not_trace_through_the_hooks() -> None:
    """Modules that a forward makes, such as a slice of the layers, are registered without the hooks in a trace."""

    class Slices(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers[:1]:
                x = layer(x)
            return x

    model, x = Slices().eval(), torch.rand(3, 4)
    ours = region(model)
    ours.attach()
    assert torch.equal(model(x), model.forward(x)) and ours.fallback is None and hooks() == 3
    (entry,) = next(iter(ours.entries.values()))
    assert not any("watch" in guard.name for guard in entry.graph.guards)
    ours.detach()
    with watch.suspended():
        assert hooks() == 0
    assert hooks() == 0
