"""The sentinel: compares sampled calls with eager while the model is in use.

A graph that was right on its example can still be wrong: a kernel that misbehaves at one size, a driver, a damaged
file. The sentinel chooses calls that run eager and compiled on copies of their tensors (`proof.misfit`): the user's
cache, random state, buffers and result are not touched.
"""

from __future__ import annotations

import itertools

import torch

#: Largest accepted error, relative to the largest value of the tensor. Measured on fp32 decoders: 1e-6 and below, so
#: a factor of 1.001 on one operation shows. Low precisions get room for a few roundings.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


class Sentinel:
    """Chooses the calls to compare.

    Args:
        verify_calls: from 1 on, how many calls from the first one; below 1, the share of all calls.
    """

    def __init__(self, verify_calls: float) -> None:
        assert verify_calls > 0
        self._first = int(verify_calls) if verify_calls >= 1 else 0
        self._every = 0 if verify_calls >= 1 else max(round(1 / verify_calls), 1)
        self._calls = itertools.count()  # safe to advance from several threads

    def due(self) -> bool:
        """Whether the call that begins now is one of them."""
        n = next(self._calls)
        return n < self._first if self._first else n % self._every == 0
