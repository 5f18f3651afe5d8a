"""The random generators that a forward may draw from: torch's on all devices in use, Python's and NumPy's."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def device_generators() -> list[torch.Generator]:
    """The default generators of torch: of the processor, and of each device of a backend that has been started."""
    found = [torch.default_generator]
    for kind in ("cuda", "xpu"):
        backend = getattr(torch, kind, None)
        started = getattr(backend, "is_initialized", None)
        if started is not None and started():
            found += list(getattr(backend, "default_generators", ()))
    return found


def drawn_states() -> tuple[Any, ...]:
    """Torch's states, to be compared with `same_states`: did a run draw?"""
    return tuple([generator.get_state() for generator in device_generators()])


def same_states(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """Whether nothing was drawn between two readings."""
    return len(before) == len(after) and all(map(torch.equal, before, after))


def seed_for_comparison() -> None:
    """Seed torch's generators alike for two runs that are compared. No seed is queued for a device not yet in use."""
    for generator in device_generators():
        generator.manual_seed(0)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Give every generator back the state that it has now, also when the block raises."""
    generators = device_generators()
    states = [generator.get_state() for generator in generators]
    numpy: Any = sys.modules.get("numpy")
    of_numpy = numpy.random.get_state(legacy=False) if numpy is not None else None
    of_python = random.getstate()
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(of_python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)
