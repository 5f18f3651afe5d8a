"""What a workload is, and what it is handed: one run in one way, which notes the results that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from compile_policy.applied import apply, remove, report
from compile_policy.config import CompilationConfig
from compile_policy_transformers import compat

Way = Literal["eager", "policy", "stock"]

#: Largest error of a number in float32, relative to the largest of its tensor; see `measure.error`.
FLOAT32 = 1e-3
#: The same where products are rounded to 8 bits (bfloat16) or 11 (float16), of which a result sums many.
LOW_PRECISION = 5e-2
#: The same with weights of eight bits, whose products are the same in every way, but summed in another order.
FEW_BITS = 1e-2


@dataclass
class Counts:
    """Graphs of all components, calls of these, and those that ran eager; stock's graphs are those of Dynamo."""

    graphs: int = 0
    calls: int = 0
    eager_calls: int = 0


@dataclass
class Trial:
    """One run of a workload.

    Attributes:
        way: ``eager``, ``policy`` (the default configuration) or ``stock`` (``model.compile(dynamic=True)``).
        mistaken: make the mistake that the workload names; the results must then differ.
        wishes: fields of the configuration other than its defaults, for every model.
        folder: an empty folder for files.
        store: where the policy keeps compiled code.
        results: what was kept, by name.
        elsewhere: counts of other processes.
    """

    way: Way
    folder: Path
    store: Path
    mistaken: bool = False
    wishes: dict[str, Any] = field(default_factory=dict)
    results: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    elsewhere: list[Counts] = field(default_factory=list)
    _models: list[nn.Module] = field(default_factory=list)
    _graphs_before: int = field(default_factory=compat.dynamo_graphs)

    def compiled(self, model: Any, **wishes: Any) -> Any:
        """Compile ``model`` in the way of this run, where a user would; returns the same model.

        Args:
            model: a model of Transformers, or one around it.
            wishes: fields of the configuration other than its defaults.
        """
        if self.way == "policy":
            apply(model, self.config(**wishes))
            self._models.append(model)
        elif self.way == "stock":
            model.compile(dynamic=True)
        return model

    def config(self, **wishes: Any) -> CompilationConfig:
        """The default configuration with this run's store."""
        return CompilationConfig(cache_dir=self.store, **self.wishes, **wishes)

    def keep(self, name: str, *tensors: Any) -> None:
        """Note copies of results under a name; they are compared with those of the other ways."""
        for tensor in tensors:
            self.results.setdefault(name, []).append(torch.as_tensor(tensor).detach().clone())

    def keep_gradients(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                self.keep("gradients", parameter.grad)

    def keep_weights(self, model: nn.Module) -> None:
        """Note the weights that are trained."""
        self.keep("weights", *(p for p in model.parameters() if p.requires_grad))

    def counts(self) -> Counts:
        """What was done for all models of this run: entries of the policy, from its store too; graphs of Dynamo."""
        total = Counts()
        if self.way == "stock":
            total.graphs = compat.dynamo_graphs() - self._graphs_before
        for one in [*self.elsewhere, *(counts_of(model) for model in self._models)]:
            total.graphs += one.graphs
            total.calls += one.calls
            total.eager_calls += one.eager_calls
        return total

    def close(self) -> None:
        """Let go of the models: what the policy watches for them would be seen by who compiles next."""
        for model in self._models:
            remove(model)
        self._models.clear()


def counts_of(model: nn.Module) -> Counts:
    """What the policy has done for one model."""
    rows = report(model).components
    return Counts(
        sum(row.graphs + row.loaded for row in rows),
        sum(row.calls for row in rows),
        sum(row.eager_calls for row in rows),
    )


@dataclass(frozen=True)
class Workload:
    """One use of a model.

    Attributes:
        name: unique, as it stands in the table.
        what: one sentence about what is done.
        mistake: what goes wrong in the control, in a few words.
        run: does it; a `Trial` says in which way, and whether with the mistake.
        tolerance: largest error, see `measure.error`.
        needs: packages beside Transformers.
    """

    name: str
    what: str
    mistake: str
    run: Callable[[Trial], None]
    tolerance: float = FLOAT32
    needs: tuple[str, ...] = ()
