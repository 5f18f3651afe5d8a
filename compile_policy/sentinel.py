"""The sentinel: compares sampled calls with eager while the model is in use.

A graph that was right on its example can still be wrong: a kernel that misbehaves at one size, a driver, a damaged
file. The sentinel runs a sampled call eager and compiled on copies of its tensors, and says how far they are apart.
The user's cache, random state, buffers and result are not touched.
"""

from __future__ import annotations

import itertools

import torch

from compile_policy.call_key import Call
from compile_policy.entry import Entry
from compile_policy.errors import NotCompilable
from compile_policy.reference import Reference, preserved

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


def disagreement(module: torch.nn.Module, call: Call, entry: Entry) -> str:
    """How the entry differs from eager on this call, in words; empty when it doesn't.

    A call on which eager itself fails is not compared: it is the caller's to hear of.
    """
    with preserved(module), torch.no_grad():
        try:
            reference = Reference(module, call, call.leaves)
        except Exception:
            return ""
        try:
            reference.check(entry.graph, TOLERANCE)
        except NotCompilable as why:
            return why.reason
    return ""
