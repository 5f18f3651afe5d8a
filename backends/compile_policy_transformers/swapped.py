"""Another forward for some modules while a block runs; their class stays as it is."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def swapped(modules: Sequence[torch.nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``modules``, none of which has a forward of its own, run ``forward`` instead of their class's."""
    for module in modules:
        vars(module)["forward"] = types.MethodType(forward, module)
    try:
        yield
    finally:
        for module in modules:
            del vars(module)["forward"]
