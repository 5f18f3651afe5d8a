"""The lowered code of an entry as data: native packages and the order in which they run.

A program works on numbered slots: first the inputs (bound tensors, then leaves of the call), then every result in the
order in which it is made. A graph lowered as one package is a program with one segment; where blocks repeat, many
segments share one package, which is loaded once.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from compile_policy import captured, compat

_STEP = 16  # whole vectors of keys

Runner = Callable[[list[torch.Tensor]], list[torch.Tensor]]
#: What runs, what it is given, and the slots that nobody reads afterwards.
Step = tuple[Runner, Callable[[list[Any]], list[Any]], tuple[int, ...]]


@dataclass(frozen=True)
class Package:
    """A native package: the bytes of its ``.pt2`` file, and the function that it is once loaded.

    Where nothing is compiled (`captured`), the bytes name operators instead.
    """

    data: bytes = field(repr=False)
    run: Runner = field(repr=False, compare=False)

    @classmethod
    def load(cls, data: bytes) -> Package:
        """Load a package. This executes native code: check where the bytes come from first.

        Raises:
            RuntimeError: these are not the bytes of a package, or it does not fit this machine.
            ValueError: they name operators, of which one is not known.
        """
        if data.startswith(captured.FIRST_LINE):
            return cls(data, captured.runner(data))
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


@dataclass(frozen=True)
class Special:
    """Other packages for inputs of certain sizes.

    Attributes:
        sizes: (slot of an input, dim, size): all must hold.
        packages: for every segment the package that then runs instead of its own.
        masks: slots of inputs, (1, 1, 1, keys) and true where seen, that these packages take without hidden tail.
    """

    sizes: tuple[tuple[int, int, int], ...]
    packages: tuple[int, ...]
    masks: tuple[int, ...] = ()


class Program:
    """Packages and the segments that run them.

    Args:
        packages: the distinct packages.
        segments: in the order in which they run; their outputs are numbered on from ``n_inputs``, without a gap.
        outputs: the slots of the results.
        n_inputs: number of inputs.
        special: packages for frequent sizes, if any.

    Raises:
        ValueError: a segment reads a slot that nothing has filled, or names a package that is not there.
    """

    def __init__(
        self,
        packages: Sequence[Package],
        segments: Sequence[Segment],
        outputs: Sequence[int],
        n_inputs: int,
        special: Special | None = None,
    ) -> None:
        self.packages = list(packages)
        self.segments = tuple(segments)
        self.outputs = tuple(outputs)
        self.n_inputs = n_inputs
        self.special = special
        self._check()
        self._steps = self._plan([s.package for s in self.segments])
        self._special_steps = self._plan(special.packages) if special else self._steps
        self._special_sizes = special.sizes if special else ()
        self._masks = special.masks if special else ()
        self._results = picker(self.outputs)

    def _plan(self, packages: Sequence[int]) -> list[Step]:
        last = {slot: step for step, segment in enumerate(self.segments) for slot in segment.inputs}
        done: list[list[int]] = [[] for _ in self.segments]
        for step, segment in enumerate(self.segments):
            for slot in segment.outputs:
                if slot not in self.outputs:
                    done[last.get(slot, step)].append(slot)
        steps = zip(packages, self.segments, done, strict=True)
        return [(self.packages[p].run, picker(s.inputs), tuple(free)) for p, s, free in steps]

    def run(self, inputs: list[Any]) -> list[torch.Tensor]:
        """Run all segments on ``inputs``, a list of ``n_inputs`` tensors that is used up; intermediate results are
        let go after their last use."""
        steps = self._special_steps
        for slot, dim, size in self._special_sizes:
            if inputs[slot].shape[dim] != size:
                steps = self._steps
                break
        else:
            for slot in self._masks:
                inputs[slot] = without_tail(inputs[slot])
        for run, pick, free in steps:
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
            "special": [list(map(list, s.sizes)), list(s.packages), list(s.masks)] if (s := self.special) else None,
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
            special = None
            if data["special"] is not None:
                sizes, others, masks = data["special"]
                special = Special(
                    tuple((int(s), int(d), int(n)) for s, d, n in sizes),
                    tuple(map(int, others)),
                    tuple(map(int, masks)),
                )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the description of a program: {error!r}") from error
        return cls(packages, segments, outputs, n_inputs, special)

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
        if self.special is not None:
            known = all(0 <= package < len(self.packages) for package in self.special.packages)
            if not known or len(self.special.packages) != len(self.segments):
                raise ValueError("the packages for special sizes do not fit the segments")
            slots = [*(slot for slot, _, _ in self.special.sizes), *self.special.masks]
            if not self.special.sizes or not all(0 <= slot < self.n_inputs for slot in slots):
                raise ValueError("special sizes and masks are those of inputs")


def without_tail(mask: torch.Tensor) -> torch.Tensor:
    """A mask (1, 1, 1, keys) on a CPU, true where seen, up to about the last key that is seen; all of it if none is.

    Its bytes are read in place: any operator would take several times as long.
    """
    keys = mask.shape[3]
    if not mask.is_contiguous():
        return mask
    seen = ctypes.string_at(mask.data_ptr(), keys).rfind(1) + 1
    upto = -(-seen // _STEP) * _STEP
    return mask.narrow(3, 0, upto) if 0 < upto < keys else mask


def picker(slots: Sequence[int]) -> Callable[[list[Any]], list[Any]]:
    """The given places of a list, as a new list."""
    if len(slots) > 1:
        pick = itemgetter(*slots)
        return lambda values: list(pick(values))
    return lambda values: [values[slot] for slot in slots]
