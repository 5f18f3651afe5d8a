"""The policy's own registries: layers replaced by others, operators switched."""

from __future__ import annotations

import torch
from torch import nn

from compile_policy.layers import PluggableLayer

from .case import Case, Hazard, chunk, forward


class Gate(PluggableLayer):
    """A layer that can be replaced."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0


def _wrap(case: Case, gate: nn.Module) -> None:
    case.layer.mlp = nn.Sequential(case.layer.mlp, gate)


def _with_gate(case: Case) -> None:
    chunk(case)
    _wrap(case, Gate())


def _register_another(case: Case) -> None:
    """A replacement is registered and an instance made of it."""

    @Gate.register_oot
    class Louder(Gate):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 3.0

    case.layer.mlp[1] = Gate()


HAZARDS = [
    Hazard(
        "layer replaced by its registry",
        "A replacement of a layer is registered and built.",
        _register_another,
        _with_gate,
        forward,
        ("registry of layers",),
    ),
]
