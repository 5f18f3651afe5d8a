"""What a component notes about its calls is what eager would have noted, the first call included."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import compile_policy as cp
from compile_policy.binder import SignatureBinder
from compile_policy.errors import PolicyWarning
from compile_policy.options import RegionOptions
from compile_policy.region import Region, region_of
from compile_policy_transformers import tiny_model

_SEEN: list[Any] = []
_TOTAL = torch.zeros(1)
_COUNT = 0


def _global_count(m: Any, x: torch.Tensor) -> None:
    global _COUNT
    _COUNT += 1


def _cell() -> Callable[..., Any]:
    calls = 0

    def note(m: Any, x: torch.Tensor) -> int:
        nonlocal calls
        if x is not None:
            calls += 1
        return calls

    return note


def _draws(m: Any, x: torch.Tensor) -> None:
    random.random()


#: How a call is noted, and whether a graph can note it too: writes into tensors, that is.
RECORDERS: dict[str, tuple[Callable[..., Any], bool]] = {
    "buffer": (lambda m, x: m.buffer.add_(x.shape[0]), True),
    "tensor in a list": (lambda m, x: m.rooms[0].add_(1), True),
    "tensor in a tuple": (lambda m, x: m.pair[0].add_(1), True),
    "tensor in nested containers": (lambda m, x: m.nested["a"][0][0].add_(1), True),
    "tensor in an object": (lambda m, x: m.held.t.add_(x.abs().amax()), True),
    "global tensor": (lambda m, x: _TOTAL.add_(1), True),
    "counter": (lambda m, x: setattr(m, "count", m.count + 1), False),
    "list": (lambda m, x: m.seen.append(x.shape[0]), False),
    "dict": (lambda m, x: m.table.__setitem__(x.shape[0], 1), False),
    "set": (lambda m, x: m.names.add(x.shape[0]), False),
    "deque": (lambda m, x: m.queue.append(1), False),
    "counter of collections": (lambda m, x: m.counter.update("a"), False),
    "attribute of an object": (lambda m, x: m.held.items.append(1), False),
    "list of tensors": (lambda m, x: m.seen.append(x.detach().sum()), False),
    "global list": (lambda m, x: _SEEN.append(1), False),
    "global number": (_global_count, False),
    "closure": (_cell(), False),
    "printed": (lambda m, x: print("called"), False),
    "Python's random numbers": (_draws, False),
}


class Recording(nn.Module):
    def __init__(self, note: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("buffer", torch.zeros(()))
        self.rooms, self.pair, self.nested = [torch.zeros(1)], (torch.zeros(1),), {"a": [(torch.zeros(1),)]}
        self.held = SimpleNamespace(t=torch.zeros(()), items=[])
        self.count = 0
        self.seen: list[Any] = []
        self.table: dict[int, int] = {}
        self.names: set[int] = set()
        self.queue: deque[int] = deque()
        self.counter: Counter[str] = Counter()
        self.note = note

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.note(self, x)
        return self.linear(x)


def _noted(m: Recording, capsys: Any) -> Any:
    tensors = [m.buffer, *m.rooms, *m.pair, m.nested["a"][0][0], m.held.t, _TOTAL]
    calls = m.note(m, None) if m.note is RECORDERS["closure"][0] else 0
    plain = (m.count, m.table, m.names, list(m.queue), dict(m.counter), m.held.items, len(_SEEN), _COUNT, calls)
    return [t.item() for t in tensors], [float(s) for s in m.seen], repr(plain), capsys.readouterr().out


def _used(kind: str, how: Callable[[Recording], Any], sizes: tuple[int, ...], capsys: Any) -> Any:
    """What is noted in calls of these sizes, and what the calls leave in the random numbers."""
    global _COUNT
    _SEEN.clear()
    _TOTAL.zero_()
    _COUNT = 0
    if kind == "closure":
        RECORDERS[kind] = (_cell(), False)
    torch.manual_seed(0)
    random.seed(0)
    m = Recording(RECORDERS[kind][0])
    call = how(m)
    for size in sizes:
        call(torch.linspace(-2, 3, size * 4).reshape(size, 4))
    return m, (_noted(m, capsys), torch.get_rng_state().tolist(), random.getstate())


@pytest.mark.parametrize("kind", RECORDERS)
@torch.no_grad()
def test_a_component_notes_what_eager_notes(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where only tensors are written, there is one graph; else every call runs eager, the first included."""
    sizes = (3, 5, 1)

    def compiled(m: Recording) -> Region:
        options = RegionOptions(backend="eager")
        return Region(m, role="m", binder=SignatureBinder({"x": {0: None}}), options=options)

    regions: list[Region] = []
    _, expected = _used(kind, lambda m: m, sizes, capsys)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, found = _used(kind, lambda m: regions.append(compiled(m)) or regions[-1], sizes, capsys)
    assert found == expected
    assert any(issubclass(w.category, PolicyWarning) for w in told) is not RECORDERS[kind][1]  # eager, and loud
    assert (regions[0].graphs, regions[0].eager_calls) == ((1, 0) if RECORDERS[kind][1] else (0, 3))
    _, once_more = _used(kind, lambda m: m, (*sizes, 7), capsys)  # the comparison sees one call too many
    assert once_more != expected


@pytest.mark.filterwarnings("ignore::compile_policy.errors.PolicyWarning")
@pytest.mark.parametrize("kind", ["tensor of a closure", "list of a closure", "hook"])
@torch.no_grad()
def test_a_decoder_notes_what_eager_notes(kind: str) -> None:
    """Calibration and the like: a forward that was replaced, or a hook, below a decoder that generates."""
    noted = []
    for apply in (False, True):
        model = tiny_model("llama")
        mlp, most, seen = model.model.layers[0].mlp, torch.zeros(64), []
        forward = mlp.forward

        def recording(x: torch.Tensor, forward: Any = forward, most: Any = most, seen: Any = seen) -> Any:
            if kind == "tensor of a closure":
                most.copy_(torch.maximum(most, x.abs().amax((0, 1))))
            else:
                seen.append(tuple(x.shape))
            return forward(x)

        if kind == "hook":
            mlp.register_forward_hook(lambda m, args, out, seen=seen: seen.append(tuple(out.shape)))
        else:
            mlp.forward = recording
        if apply:
            cp.apply(model, cp.CompilationConfig(backend="eager", cache_dir=False))
        model.generate(torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), max_new_tokens=3, do_sample=False)
        noted.append((most, seen))
    region = region_of(model.model)
    assert region is not None and (region.graphs == 1) is (kind == "tensor of a closure"), region.fallback
    torch.testing.assert_close(noted[1][0], noted[0][0])
    assert noted[1][1] == noted[0][1]


def test_transformers_in_a_checkout_is_not_the_users_code(tmp_path: Path) -> None:
    """A checkout or an editable install lies outside site-packages; a module of the user's beside it stays theirs."""
    (tmp_path / "transformers").symlink_to(Path(transformers.__file__).parent)
    (tmp_path / "of_the_user.py").write_text("class Model: ...")
    code = (
        "import compile_policy_transformers, of_the_user, transformers;"
        "from compile_policy.reach import is_users;"
        "print(transformers.__file__, is_users(transformers.LlamaModel), is_users(of_the_user.Model))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    file, library, users = ran.stdout.split()[-3:]
    assert Path(file).parent == tmp_path / "transformers" and (library, users) == ("False", "True")
