"""Buffers that a module assigns to itself while it is traced: a private mark of torch.

``self.table = self.table.to(x.device)`` asks an ``nn.Buffer`` whether it is persistent, which Dynamo cannot tell of a
tensor. Without the mark the module is asked instead, which knows. Drop this once Dynamo traces the assignment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MARK = "_is_buffer"


@contextmanager
def plain_buffers(module: torch.nn.Module | None) -> Iterator[None]:
    """Inside the block, the buffers of ``module`` are tensors like any others; which are persistent stays as it is."""
    found = {} if module is None else {id(b): b for b in module.buffers() if vars(b).get(_MARK)}
    for buffer in found.values():
        delattr(buffer, _MARK)
    try:
        yield
    finally:
        for buffer in found.values():
            setattr(buffer, _MARK, True)
