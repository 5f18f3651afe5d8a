"""Runs that the user did not ask for, and that leave nothing behind.

A made-up call of a component (a probe, a run on an example) may write into buffers, closures and global tensors, append
to lists, count, draw random numbers. Inside `unseen`, writes go to copies (`StandIns`), generators and Python state are
given back. What cannot be given back, such as a line that was printed, only code of the user's does; there Dynamo says
before the first run what the code does (`effects`), and a component with such an effect is not run at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from compile_policy.compat import original_error
from compile_policy.compat_effects import raised_by_the_code
from compile_policy.effects import ChangesItself, effects_of
from compile_policy.errors import NotCompilable, first_line
from compile_policy.failure import failure_of
from compile_policy.random_state import kept_random_state
from compile_policy.reach import Reached
from compile_policy.shadow import different_layers, layer_list, with_layers
from compile_policy.stand_ins import StandIns
from compile_policy.walk import hooked_below

R = TypeVar("R")


class DoesNotRun(Exception):
    """A part of a component raises for the made-up arguments of a probe."""


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


def refuse_effects(
    run: Callable[..., Any],
    leaves: Sequence[torch.Tensor],
    module: torch.nn.Module,
    users: str,
    owned: Sequence[object] = (),
) -> None:
    """Refuse a run of the user's code that may leave something behind.

    Args:
        users: where that code was found.
        owned: objects made for the run, which it may change.

    Raises:
        ChangesItself: it would change Python state.
        Exception: whatever tracing raises where the code cannot be traced, which a capture would raise too.
    """
    found = effects_of(run, leaves, module, owned)
    if found:
        raise ChangesItself(f"{users} {found[0]}, which a graph would not do", always=False)


def refuse_effects_of_layers(
    remake: Callable[[torch.nn.Module], Callable[..., Any]],
    leaves: Sequence[torch.Tensor],
    module: torch.nn.Module,
    users: str,
) -> None:
    """`refuse_effects` for a component, of which one layer of each kind is traced where it runs with so few.

    Args:
        remake: makes the run of a stand-in for the component.
    """
    path = layer_list(module)
    if path is not None:
        layers = list(module.get_submodule(path).children())
        few = different_layers(layers)
        try:
            refuse_effects(remake(with_layers(module, path, few)), leaves, module, users)
        except ChangesItself:
            raise
        except Exception:  # it does not run with fewer layers
            if len(few) == len(layers):
                raise
        else:
            return
    refuse_effects(remake(module), leaves, module, users)


def probed(
    module: torch.nn.Module,
    run: Callable[[], R],
    own: Iterable[torch.Tensor] = (),
    *,
    owned: Sequence[object] = (),
    before: Callable[[], object] = lambda: None,
    gradients: bool = False,
) -> R:
    """The result of ``run``, which calls parts of ``module`` with made-up arguments, unnoticed.

    Args:
        own: tensors made for the run, which it may write into.
        owned: other objects made for the run, which it may change: what ``run`` closes over, or items of a dict that
            it closes over.
        before: is called before the run, and is no part of what is traced.
        gradients: the result is used, so that gradients go back through it.

    Raises:
        NotCompilable: it cannot be kept unnoticed.
        DoesNotRun: the user's code raises for these arguments, as its trace shows.
    """
    with unseen(module) as made:
        made.stand_ins.allow(own)
        if made.users:
            _refuse_probe(run, module, made.users, owned)
        with made.stand_ins, torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
            before()
            return run()


def _refuse_probe(run: Callable[[], Any], module: torch.nn.Module, users: str, owned: Sequence[object]) -> None:
    try:
        refuse_effects(run, (), module, users, owned)
    except NotCompilable:
        raise
    except Exception as error:
        if raised_by_the_code(error):
            raise DoesNotRun(first_line(error)) from error
        fault = NotCompilable("")
        fault.__cause__ = original_error(error)
        found = failure_of(fault)
        where = f" at {found.place}" if found.place else ""
        raise NotCompilable(
            f"{users} is code of your own, which cannot be traced{where}: {found.cause or first_line(error)}",
            remedy=found.remedy or "Write it so that it can be traced, or decorate a part that can.",
        ) from error
