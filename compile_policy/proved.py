"""Entries that were tried on calls: what the component's own forward does is what counts, for every form of call.

An entry is compared with eager on its example when it is made. That a call brought to its canonical form means the same
as the call itself, only the call can tell: the first of each form runs both ways.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from compile_policy import compat
from compile_policy.binder import Binder
from compile_policy.call_key import Call
from compile_policy.entries import Entries, PassingObstacle
from compile_policy.entry import TOLERANCE, Entry
from compile_policy.errors import InternalError, NotCompilable, PolicyWarning
from compile_policy.options import RegionOptions
from compile_policy.proof import Answer, NoMemory, Run, answered, misfit
from compile_policy.stand_ins import Substitutes
from compile_policy.unseen import Unseen

NO_MEMORY = "there is no memory to compare this call with eager"
_MISFIT = "the graph does not fit calls of this form: "


class Misfit(PassingObstacle):
    """The graph is not what the component's own forward is, for calls of one form.

    Attributes:
        difference: what differs.
    """

    def __init__(self, difference: str) -> None:
        super().__init__(f"{_MISFIT}{difference}")
        self.difference = difference


class ProvedEntries(Entries):
    """The entries of a component, and the forms of call that each was tried on.

    Attributes:
        proved: by entry and form: what speaks against it; empty where nothing does.
    """

    def __init__(self, module: torch.nn.Module, name: str, binder: Binder, options: RegionOptions) -> None:
        super().__init__(module, name, binder, options)
        self.proved: dict[tuple[int, Hashable], str] = {}
        self._runs_parts = bool(getattr(binder, "runs_parts", False))  # binding runs a part of the component

    def forget(self) -> None:
        super().forget()
        self.proved.clear()

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Bring a call to its canonical form."""
        raise NotImplementedError

    def proved_entry(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], call: Call, form: tuple[Hashable, Any] | None
    ) -> tuple[Entry, Answer | None]:
        """The entry for a call, proved for its form, and for sizes for which tracing was told what does not hold.

        The first call of a form is answered by the component itself: the second value is its answer.

        Raises:
            PassingObstacle: the graph was found not to fit calls of this form.
        """
        entry = self.look_up(call)
        unlike = entry.graph.accepts.unlike(call.leaves)
        kind, rows = form or (None, None)
        sizes = entry.new_sizes(call)
        if not unlike:
            if form is None and not sizes:
                return entry, None
            return entry, self._prove(args, kwargs, entry, (kind, sizes) if sizes else kind, rows)
        form_of_sizes = (kind, unlike, sizes) if sizes else (kind, unlike)
        try:  # on copies: where the graph does not hold for these sizes, another one is compared next
            return entry, self._prove(args, kwargs, entry, form_of_sizes, rows, on_copies=True)
        except Misfit:
            if self.shelf is not None:  # where the entry would be found again as it was
                self.shelf.note_minded(entry, unlike)
            entry.graph.accepts = entry.graph.accepts.minding(unlike)
            return self.proved_entry(args, kwargs, call, form)

    def _prove(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        entry: Entry,
        form: Hashable,
        rows: torch.Tensor | None,
        *,
        on_copies: bool = False,
    ) -> Answer | None:
        """The component's own answer to the first call of a form; none for a form that was looked at before."""
        place = (entry.number, form)
        if place not in self.proved and self.shelf is not None and self.shelf.proved(entry, form):
            self.proved[place] = ""
        if place in self.proved:
            if self.proved[place]:
                raise Misfit(self.proved[place])
            return None
        try:
            answer = self.answer(args, kwargs, entry, rows, TOLERANCE, on_copies=on_copies)
        except Misfit as misfits:
            self.proved[place] = misfits.difference
            raise
        if answer is not None and not answer.known:
            return answer
        reason = "" if answer is None else answer.reason
        self.proved[place] = reason
        if self.shelf is not None and not reason:
            self.shelf.note_proof(entry, form)
        return answer

    def answer(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        entry: Entry,
        rows: torch.Tensor | None,
        tolerance: Mapping[torch.dtype, float],
        *,
        on_copies: bool = False,
    ) -> Answer | None:
        """The component's own answer to a call that is compared with the entry.

        ``None`` where the entry is to answer, and was compared on copies alone: a call whose saved tensors somebody
        counts, as activation checkpointing does, must take the same road when it is repeated; and where binding runs
        a part of the component, that part has run by now.

        Args:
            on_copies: in any case.

        Raises:
            Misfit: the entry does not fit, and nothing has answered yet.
            PassingObstacle: there is no memory to tell.
        """
        run = self._run_copies(entry)
        answers = not (on_copies or compat.saves_tensors_for_others() or self._runs_parts)
        gradients = entry.wants_gradients
        if answers and not gradients:
            return answered(self.module, args, kwargs, run, entry, rows, tolerance)
        try:
            written = entry.graph.written
            reason = misfit(
                *(self.module, args, kwargs, run, rows, tolerance, written), gradients=gradients, shared=entry.unread
            )
        except NoMemory:
            raise PassingObstacle(NO_MEMORY) from None
        except (NotCompilable, PolicyWarning):
            raise
        except Exception as error:
            raise InternalError("an entry was compared with eager", error) from error
        if answers:  # gradients were compared on copies, and the call leaves what eager leaves
            return Answer(self.module.forward(*args, **kwargs), reason)
        if reason:
            raise Misfit(reason)
        return None

    def _run_copies(self, entry: Entry) -> Run:
        def run(args: tuple[Any, ...], kwargs: dict[str, Any], world: Unseen, copies: Substitutes) -> Any:
            self.building.now = True
            try:
                with world.stand_ins if self._runs_parts else nullcontext():
                    call = self.bind(args, kwargs)
                return entry.run_unseen(call, copies)
            finally:
                self.building.now = False

        return run
