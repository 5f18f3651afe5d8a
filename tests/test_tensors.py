"""One list of a module's tensors, and runs that write into copies."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from compile_policy.errors import NotCompilable
from compile_policy.saving.structure import tensor_places
from compile_policy.stand_ins import StandIns
from compile_policy.tensors import attribute_tensors, tensors_of
from compile_policy.unseen import probed, unseen
from compile_policy.walk import Coverage


@dataclass
class Held:
    inner: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class Slotted:
    t: torch.Tensor


def _closing_over(t: torch.Tensor) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x + t

    return forward


ROOMS = {
    "attribute": lambda t: t,
    "list": lambda t: [t],
    "tuple": lambda t: (1, t),
    "dict": lambda t: {"a": t},
    "nested": lambda t: {"a": [(t,)]},
    "object": lambda t: SimpleNamespace(t=t),
    "dataclass": lambda t: Held([t]),
    "slots": lambda t: Slotted(t),
    "closure": _closing_over,
}


@pytest.mark.parametrize("room", ROOMS)
def test_tensors_of_a_module_are_found_wherever_they_are_kept(room: str) -> None:
    """Binding, trial runs and saved entries ask one list; parameters and buffers are in it, and no tensor twice."""
    module = nn.Sequential(nn.BatchNorm1d(2))
    loose = torch.ones(3)
    module[0].kept = ROOMS[room](loose)
    module[0].other = torch.ones(1)
    found = dict(tensors_of(module))
    assert {id(t) for t in attribute_tensors(module)} == {id(loose), id(module[0].other)}
    assert {id(t) for t in found.values()} >= {id(t) for t in (*module.parameters(), *module.buffers(), loose)}
    assert tensor_places(module) == found
    assert any(place.startswith("0.kept") and t is loose for place, t in found.items())
    if room not in ("slots", "closure"):  # what a fingerprint reads, it reads of the same tensors
        assert id(loose) in Coverage(module).tensors


def _write(kind: str, t: torch.Tensor) -> None:
    view = t[1:]
    {
        "in place": lambda: t.add_(1),
        "through a view": lambda: t.view(2, 2)[0].mul_(3),
        "through an older view": lambda: view.fill_(7),
        "item": lambda: t.__setitem__(0, 9.0),
        "out": lambda: torch.add(t, 1, out=t),
        "list of tensors": lambda: torch._foreach_add_([t], 1.0),
        "read after write": lambda: t.add_(1).mul_(t),
    }[kind]()


KINDS = ["in place", "through a view", "through an older view", "item", "out", "list of tensors", "read after write"]


@pytest.mark.parametrize("kind", KINDS)
def test_writes_go_into_copies(kind: str) -> None:
    """What was there before keeps its values and its count of writes; what the run reads is what it wrote."""
    expected = torch.arange(4.0)
    _write(kind, expected)
    live = torch.arange(4.0)
    before = live._version
    mode = StandIns(nn.Linear(1, 1))
    with mode:
        _write(kind, live)
        seen = live + 0
    assert torch.equal(seen, expected) and not torch.equal(expected, torch.arange(4.0))
    assert torch.equal(live, torch.arange(4.0)) and live._version == before and mode.is_written(live)


def test_what_a_run_makes_is_written_as_it_is() -> None:
    """No copy is made of an example, of new tensors, or of what is only read."""
    example, read = torch.zeros(3), torch.ones(3)
    mode = StandIns(nn.Linear(1, 1), [example])
    with mode:
        example.add_(read)
        fresh = torch.zeros(3)
        fresh.add_(read)[1:].mul_(2)
    assert example.tolist() == [1, 1, 1] and fresh.tolist() == [1, 2, 2] and not mode.written


def test_a_write_into_a_parameter_is_refused() -> None:
    """A trial run must not change what was trained, nor pretend to."""
    module = nn.Linear(2, 2)
    with torch.no_grad(), StandIns(module), pytest.raises(NotCompilable, match="parameter weight"):
        module.weight.add_(1)
    with torch.no_grad():
        module.weight.add_(0)


def test_statistics_of_batch_norm_are_writes() -> None:
    """The schema of its operator does not say so."""
    norm = nn.BatchNorm1d(3)
    mode = StandIns(norm)
    with mode:
        norm(torch.randn(5, 3))
    assert norm.running_mean.tolist() == [0, 0, 0] and norm.num_batches_tracked == 0
    assert mode.is_written(norm.running_mean) and mode.is_written(norm.running_var)
    with mode:
        norm.eval()(torch.randn(5, 3))


def test_every_generator_is_given_back() -> None:
    """Torch's, Python's and NumPy's, and generators that the module keeps."""
    module = nn.Module()
    module.own, module.pythons, module.numpys = torch.Generator(), random.Random(0), numpy.random.default_rng(0)

    def draw() -> list[float]:
        own = torch.rand(1, generator=module.own).item()
        of_libraries = [module.pythons.random(), module.numpys.random(), random.random(), numpy.random.rand()]
        return [own, *of_libraries, torch.rand(1).item()]

    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    first = probed(module, draw)
    assert first == draw() and first != draw()


def test_python_state_is_given_back() -> None:
    """Lists, dicts in their order, sets, objects, slots, cells and attributes, the same objects as before."""
    module: Any = nn.Module()
    module.seen, module.table, module.names = [1], {"a": 1, "b": 2}, {"x"}
    module.held, module.count = Held([1]), 0
    calls = 0

    def forward() -> None:
        nonlocal calls
        calls += 1
        module.seen.append(2)
        module.table.pop("a"), module.table.setdefault("c", 3)
        module.names.clear()
        module.held.inner = []
        module.count += 1
        module.new = 1

    module.forward = forward
    containers = (module.seen, module.table, module.names, module.held)
    with unseen(module) as world:
        module.forward()
        assert len(world.changed()) >= 6
    assert (module.seen, list(module.table.items()), module.names) == ([1], [("a", 1), ("b", 2)], {"x"})
    assert module.held.inner == [1] and module.count == 0 and calls == 0 and not hasattr(module, "new")
    assert all(a is b for a, b in zip(containers, (module.seen, module.table, module.names, module.held), strict=True))


def test_a_module_with_a_hook_below_is_not_probed() -> None:
    """Nobody can tell what a hook notes."""
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].register_forward_hook(lambda *_: None)
    with pytest.raises(NotCompilable, match="0 has a hook"):
        probed(module, lambda: module(torch.ones(1, 2)))
