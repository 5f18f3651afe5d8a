"""The ways of running a model: eager, and three of compiling its decoder. All capture; none lowers any further."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import compile_policy as cp


def _eager(model: Any) -> None:
    """Nothing is put on the model."""


def _ours(model: Any) -> None:
    cp.apply(model, cp.CompilationConfig(backend="eager", max_entries=64, cache_dir=False))


def ours_at_every_call(model: Any) -> None:
    """Ours, with the structure looked at in the middle of a sequence too."""
    cp.apply(model, cp.CompilationConfig(backend="eager", max_entries=64, cache_dir=False, check_structure="call"))


def _stock(model: Any) -> None:
    model.get_decoder().compile(dynamic=True, backend="eager")


def _dropped(model: Any) -> None:
    """One graph for all calls: the first call makes it, and no guard is left that could ask for another.

    torch files a graph under the code of ``forward``, which all instances share; what was compiled for one model
    therefore serves the next one too.
    """
    decoder = model.get_decoder()
    options = {"guard_filter_fn": lambda guards: [False] * len(guards)}
    # nn.Module.compile would compile the call with its hooks; vLLM's decorator compiles `forward`.
    decoder._compiled_call_impl = torch.compile(
        decoder.forward, fullgraph=True, dynamic=True, backend="eager", options=options
    )


@dataclass(frozen=True)
class Way:
    """A way of compiling: ``attach`` puts it on a model."""

    name: str
    title: str
    attach: Callable[[Any], None]


EAGER = Way("eager", "eager", _eager)
STOCK = Way("stock", "stock `torch.compile`", _stock)
DROPPED = Way("dropped", "guards dropped, no key (vLLM's way)", _dropped)
OURS = Way("ours", "ours", _ours)
WAYS = {way.name: way for way in (EAGER, STOCK, DROPPED, OURS)}
