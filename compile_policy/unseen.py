"""Runs that the user did not ask for, and that leave nothing behind.

A made-up call of a component (a probe, a run on an example) may write into buffers, closures and global tensors, append
to lists, count, draw random numbers. Inside `unseen`, writes go to copies (`StandIns`), generators and Python state are
given back. What cannot be given back, such as a line that was printed, only code of the user's does; there Dynamo says
before the first run what the code does (`effects`), and a component with such an effect is not run at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from compile_policy.errors import NotCompilable
from compile_policy.random_state import kept_random_state
from compile_policy.reach import Reached
from compile_policy.stand_ins import StandIns
from compile_policy.walk import hooked_below

R = TypeVar("R")


class Unseen:
    """What runs inside the block do.

    Attributes:
        stand_ins: enter it round each eager run.
        users: where code of the user's was found; empty when there is none.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._reached = Reached(module)
        self.stand_ins = StandIns(module)
        self.users = self._reached.users

    def changed(self) -> list[str]:
        """Names of the Python state that runs have changed so far."""
        return self._reached.changed()

    def restore(self) -> None:
        self._reached.restore()


@contextmanager
def unseen(module: torch.nn.Module) -> Iterator[Unseen]:
    """Inside the block, runs of ``module`` are not noticed afterwards; eager ones go into its `Unseen.stand_ins`.

    Raises:
        NotCompilable: something below the module has a hook, which may note what it sees.
    """
    refuse_hooks(module)
    with kept_random_state():
        made = Unseen(module)
        try:
            yield made
        finally:
            made.restore()


def refuse_hooks(module: torch.nn.Module) -> None:
    """Raises NotCompilable for a module with somebody's hook below it: a graph would do nothing of what it does."""
    hooked = hooked_below(module)
    if hooked:
        raise NotCompilable(f"{hooked} has a hook", remedy="Remove the hook to have the component compiled.")


def probed(
    module: torch.nn.Module, run: Callable[[], R], own: Iterable[torch.Tensor] = (), *, gradients: bool = False
) -> R:
    """The result of ``run``, which calls parts of ``module`` with made-up arguments, unnoticed.

    Args:
        own: tensors made for the run, which it may write into.
        gradients: the result is used, so that gradients go back through it.

    Raises:
        NotCompilable: it cannot be kept unnoticed.
    """
    with unseen(module) as made:
        made.stand_ins.allow(own)
        with made.stand_ins, torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
            return run()
