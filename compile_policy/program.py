"""The lowered code of an entry as data: native packages and the order in which they run.

A program works on numbered slots: first the inputs (bound tensors, then leaves of the call), then every result in the
order in which it is made. A graph lowered as one package is a program with one segment; where blocks repeat, many
segments share one package, which is loaded once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from compile_policy import compat

Runner = Callable[[list[torch.Tensor]], list[torch.Tensor]]


@dataclass(frozen=True)
class Package:
    """A native package: the bytes of its ``.pt2`` file, and the function that it is once loaded."""

    data: bytes = field(repr=False)
    run: Runner = field(repr=False, compare=False)

    @classmethod
    def load(cls, data: bytes) -> Package:
        """Load a package. This executes native code: check where the bytes come from first.

        Raises:
            RuntimeError: these are not the bytes of a package, or it does not fit this machine.
        """
        with tempfile.TemporaryDirectory(prefix="compile_policy_") as folder:
            path = Path(folder) / "graph.pt2"
            path.write_bytes(data)
            return cls(data, compat.load_package(str(path)))


@dataclass(frozen=True)
class Segment:
    """One run of a package: the slots that it reads, and the slots that its results become."""

    package: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Program:
    """Packages and the segments that run them.

    Args:
        packages: the distinct packages.
        segments: in the order in which they run; their outputs are numbered on from ``n_inputs``, without a gap.
        outputs: the slots of the results.
        n_inputs: number of inputs.

    Raises:
        ValueError: a segment reads a slot that nothing has filled, or names a package that is not there.
    """

    def __init__(
        self, packages: Sequence[Package], segments: Sequence[Segment], outputs: Sequence[int], n_inputs: int
    ) -> None:
        self.packages = list(packages)
        self.segments = tuple(segments)
        self.outputs = tuple(outputs)
        self.n_inputs = n_inputs
        self._check()
        last = {slot: step for step, segment in enumerate(self.segments) for slot in segment.inputs}
        made = {slot: step for step, segment in enumerate(self.segments) for slot in segment.outputs}
        done: list[list[int]] = [[] for _ in self.segments]
        for slot, step in made.items():
            if slot not in self.outputs:
                done[last.get(slot, step)].append(slot)
        self._steps = [
            (self.packages[s.package].run, picker(s.inputs), tuple(free))
            for s, free in zip(self.segments, done, strict=True)
        ]
        self._results = picker(self.outputs)

    def run(self, inputs: list[Any]) -> list[torch.Tensor]:
        """Run all segments on ``inputs``, a list of ``n_inputs`` tensors that is used up; intermediate results are
        let go after their last use."""
        for run, pick, free in self._steps:
            inputs += run(pick(inputs))
            for slot in free:
                inputs[slot] = None
        return self._results(inputs)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the packages, as JSON types."""
        return {
            "n_inputs": self.n_inputs,
            "segments": [[s.package, list(s.inputs), list(s.outputs)] for s in self.segments],
            "outputs": list(self.outputs),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], packages: Sequence[Package]) -> Program:
        """The inverse of `to_dict`.

        Raises:
            ValueError: the data does not describe a program over these packages.
        """
        try:
            segments = [Segment(int(p), tuple(map(int, i)), tuple(map(int, o))) for p, i, o in data["segments"]]
            outputs, n_inputs = tuple(map(int, data["outputs"])), int(data["n_inputs"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the description of a program: {error!r}") from error
        return cls(packages, segments, outputs, n_inputs)

    def _check(self) -> None:
        filled = self.n_inputs
        for number, segment in enumerate(self.segments):
            if not 0 <= segment.package < len(self.packages):
                raise ValueError(f"segment {number} runs package {segment.package} of {len(self.packages)}")
            if not all(0 <= slot < filled for slot in segment.inputs):
                raise ValueError(f"segment {number} reads a slot that is not filled yet")
            if segment.outputs != tuple(range(filled, filled + len(segment.outputs))):
                raise ValueError(f"segment {number} has its results in the wrong slots")
            filled += len(segment.outputs)
        if not all(0 <= slot < filled for slot in self.outputs):
            raise ValueError("the result is a slot that nothing fills")


def picker(slots: Sequence[int]) -> Callable[[list[Any]], list[Any]]:
    """The given places of a list, as a new list."""
    if len(slots) > 1:
        pick = itemgetter(*slots)
        return lambda values: list(pick(values))
    return lambda values: [values[slot] for slot in slots]
