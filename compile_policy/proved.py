"""Entries that were tried on calls: what the component's own forward does is what counts, for every form of call.

An entry is compared with eager on its example when it is made. That a call brought to its canonical form means the same
as the call itself, only the call can tell: the first of each form runs both ways.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch

from compile_policy.binder import Binder
from compile_policy.call_key import Call
from compile_policy.entries import Entries, PassingObstacle
from compile_policy.entry import TOLERANCE, Entry
from compile_policy.options import RegionOptions
from compile_policy.proof import misfit


class ProvedEntries(Entries):
    """The entries of a component, and the forms of call that each was tried on.

    Attributes:
        proved: by entry and form: what speaks against it; empty where nothing does.
    """

    def __init__(self, module: torch.nn.Module, name: str, binder: Binder, options: RegionOptions) -> None:
        super().__init__(module, name, binder, options)
        self.proved: dict[tuple[int, Hashable], str] = {}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Bring a call to its canonical form."""
        raise NotImplementedError

    def proved_entry(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], call: Call, form: tuple[Hashable, Any] | None
    ) -> Entry:
        """The entry for a call, proved for its form, and for sizes for which tracing was told what does not hold."""
        entry = self.find(call) or self.obtain(call)
        unlike = entry.graph.accepts.unlike(call.leaves)
        kind, rows = form or (None, None)
        sizes = entry.new_sizes(call)
        if not unlike:
            if form is not None or sizes:
                self._prove(args, kwargs, entry, (kind, sizes) if sizes else kind, rows)
            return entry
        try:
            self._prove(args, kwargs, entry, (kind, unlike, sizes) if sizes else (kind, unlike), rows)
        except PassingObstacle:
            if self.shelf is not None:  # where the entry would be found again as it was
                self.shelf.note_minded(entry, unlike)
            entry.graph.accepts = entry.graph.accepts.minding(unlike)
            return self.proved_entry(args, kwargs, call, form)
        return entry

    def _prove(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], entry: Entry, form: Hashable, rows: torch.Tensor | None
    ) -> None:
        """Refuse a form of call for which the graph is not what the component's own forward is; looked at once."""
        place = (entry.number, form)
        if place not in self.proved and self.shelf is not None and self.shelf.proved(entry, form):
            self.proved[place] = ""
        if place not in self.proved:
            self.proved[place] = self.misfit(args, kwargs, entry, rows, TOLERANCE)
            if self.shelf is not None and not self.proved[place]:
                self.shelf.note_proof(entry, form)
        if self.proved[place]:
            raise PassingObstacle(f"the graph does not fit calls of this form: {self.proved[place]}")

    def misfit(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        entry: Entry,
        rows: torch.Tensor | None,
        tolerance: Mapping[torch.dtype, float],
    ) -> str:
        """What speaks against an entry for this call, in which it and the component's own forward run on copies."""
        self.building.now = True
        try:
            return misfit(
                *(self.module, args, kwargs, lambda a, k: entry.run(self.bind(a, k)), rows, tolerance),
                gradients=entry.wants_gradients,
            )
        finally:
            self.building.now = False
