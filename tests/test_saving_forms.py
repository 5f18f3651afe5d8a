"""The form of a value is the same in every process, whatever was looked at before it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from compile_policy.saving.stable import Stable, digest

ROOT = Path(__file__).resolve().parents[1]

_OPERATORS = """
import torch

class Handed:
    def __init__(self):
        self.states, self.scale = None, {1.5: "b", 0.5: "a"}

handed = Handed()

@torch.library.custom_op("saving_forms::NAME", mutates_args=())
def NAME(x: torch.Tensor, power: int) -> torch.Tensor:
    return x**power

@NAME.register_fake
def _(x: torch.Tensor, power: int) -> torch.Tensor:
    return torch.empty_like(x)
"""
_PROCESS = """
import json, sys
from compile_policy.saving.sources import state_of
sys.path.insert(0, {path!r})
import torch, operators
if {noise!r}:
    import others
    operators.power(operators.torch.ones(3), 2)
places = {{f"operators:{{name}}" for name in ("power", "handed")}}
for i in range(4):
    setattr(operators, f"again_{{i}}", operators.power)
    setattr(operators, f"held_{{i}}", operators.handed)
    places |= {{f"operators:again_{{i}}", f"operators:held_{{i}}"}}
print(json.dumps(state_of({{"operators"}}, places)))
"""


def test_operators_and_shared_objects_in_another_process(tmp_path: Path) -> None:
    """One object under many names, in sets whose order the process decides; one process has run the operator."""
    (tmp_path / "operators.py").write_text(_OPERATORS.replace("NAME", "power"))
    (tmp_path / "others.py").write_text(_OPERATORS.replace("NAME", "cube"))
    processes = []
    for seed in (1, 2):
        code = _PROCESS.format(path=str(tmp_path), noise=seed == 1)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", code]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True))
    first, second = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    assert len(set(first["global"].values())) == 2  # of ten names
    assert second == first


def _forms(values: dict[str, Any], order: tuple[str, ...], *, lenient: bool) -> dict[str, Any]:
    stable = Stable(lenient=lenient)
    return {name: stable(values[name]) for name in order}


def test_what_was_looked_at_before_does_not_matter() -> None:
    """Of an object in another, of a loop of objects, and of one that is too deep to be looked at in full."""
    inner = SimpleNamespace(eps=1e-6)
    left, right = SimpleNamespace(name="left"), SimpleNamespace(name="right")
    left.other, right.other, right.inner = right, left, inner
    deep: Any = SimpleNamespace(below=inner)
    for _ in range(4):
        deep = SimpleNamespace(inside=[deep])

    def closed() -> tuple[Any, Any]:
        return left, inner

    values = {"inner": inner, "outer": [inner, inner], "left": left, "right": right, "deep": deep, "f": closed}
    for lenient in (False, True):
        expected = _forms(values, tuple(values), lenient=lenient)
        for order in itertools.permutations(values):
            assert _forms(values, order, lenient=lenient) == expected, order


def test_every_value_in_an_object_counts() -> None:
    """Those inside of objects that were looked at before too, and those of a loop."""

    def form(**changes: Any) -> str:
        shared = SimpleNamespace(eps=changes.get("eps", 1.0))
        first, second = SimpleNamespace(shared=shared), SimpleNamespace(shared=shared, size=changes.get("size", 1))
        first.second, second.first = second, first
        return digest(Stable()([shared, first, second]))

    assert form() == form()
    assert len({form(), form(eps=2.0), form(size=2)}) == 3


def test_operators_are_told_apart() -> None:
    """By name, code and what they are without data; not by what else is registered."""

    def operator(power: float, size: int) -> Any:
        @torch.library.custom_op("saving_forms::told", mutates_args=())
        def told(x: torch.Tensor) -> torch.Tensor:
            return x * power

        @told.register_fake
        def _(x: torch.Tensor) -> torch.Tensor:
            return x.new_empty(size)

        return told

    forms = [Stable(lenient=True)(operator(*values)) for values in ((2.0, 3), (2.0, 3), (4.0, 3), (2.0, 4))]
    assert forms[0] == forms[1] and len({digest(form) for form in forms}) == 3
    library = torch.library.Library("saving_forms", "FRAGMENT")
    before = Stable()(library)
    library.define("another(Tensor x) -> Tensor")
    assert Stable()(library) == before
