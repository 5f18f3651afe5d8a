"""Hooks, which neither a graph nor torch's own guards see by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules import module as global_hooks

from .case import Case, Hazard, bent, chunk, forward, gradients, training


def _bend(module: Any, args: Any, result: Any) -> Any:
    return bent(result)


def _bend_input(module: Any, args: Any, kwargs: Any) -> Any:
    if args:
        return (args[0] + 1, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + 1}


def _hooked(case: Case) -> None:
    chunk(case)
    case.kept["handle"] = case.decoder.layers[0].register_forward_hook(_bend)


def _steered(case: Case) -> None:
    """A hook that adds a vector, as steering does; its strength is in a list."""
    chunk(case)
    strength = case.kept["strength"] = [0.5]
    case.layer.register_forward_hook(lambda module, args, result: bent(result, strength[0]))


def _steered_by_tensor(case: Case) -> None:
    chunk(case)
    strength = case.kept["strength"] = torch.tensor(0.5)
    case.layer.register_forward_hook(lambda module, args, result: bent(result, strength))


class Steering:
    """A hook with state of its own."""

    def __init__(self) -> None:
        self.strength = 0.5

    def __call__(self, module: Any, args: Any, result: Any) -> Any:
        return bent(result, self.strength)


def _steered_by_object(case: Case) -> None:
    chunk(case)
    case.kept["hook"] = Steering()
    case.layer.register_forward_hook(case.kept["hook"])


def _recording(case: Case) -> Any:
    """What a recording hook has noted during the call."""
    noted = case.kept.setdefault("noted", [])
    noted.clear()
    return [forward(case), *noted]


def _record(case: Case) -> None:
    noted = case.kept.setdefault("noted", [])

    def record(module: Any, args: Any, result: Any) -> None:
        noted.append((result[0] if isinstance(result, tuple) else result).sum())

    case.layer.mlp.register_forward_hook(record)


def _halve_gradient(module: Any, given: Any, wanted: Any) -> Any:
    return tuple(None if g is None else g * 0.5 for g in given)


HAZARDS = [
    Hazard(
        "hook on a layer",
        "A forward hook changes a layer's result.",
        lambda c: c.decoder.layers[0].register_forward_hook(_bend),
        chunk,
        forward,
        ("hook", "_bend"),
    ),
    Hazard(
        "hook before a layer",
        "A forward pre-hook changes a layer's arguments.",
        lambda c: c.layer.register_forward_pre_hook(_bend_input, with_kwargs=True),
        chunk,
        forward,
        ("hook", "_bend_input"),
    ),
    Hazard(
        "hook on the decoder",
        "A forward hook on the component itself.",
        lambda c: c.decoder.register_forward_hook(lambda m, a, r: (setattr(r, "last_hidden_state", r[0] + 1), r)[1]),
        chunk,
        forward,
    ),
    Hazard(
        "hook on the embedding",
        "A forward hook on the token embedding.",
        lambda c: c.base.get_input_embeddings().register_forward_hook(_bend),
        chunk,
        forward,
        ("hook", "_bend"),
    ),
    Hazard(
        "hook on the head",
        "A forward hook outside the component.",
        lambda c: c.base.get_output_embeddings().register_forward_hook(_bend),
        chunk,
        forward,
    ),
    Hazard(
        "hook removed",
        "A forward hook of a compiled model goes.",
        lambda c: c.kept["handle"].remove(),
        _hooked,
        forward,
    ),
    Hazard("hook that records", "A forward hook notes what it sees.", _record, chunk, _recording, ("hook",)),
    Hazard(
        "hook with another strength",
        "A number that a hook reads from a list changes.",
        lambda c: c.kept["strength"].__setitem__(0, 5.0),
        _steered,
        forward,
    ),
    Hazard(
        "hook with another vector",
        "A tensor that a hook adds changes in place.",
        lambda c: c.kept["strength"].fill_(5.0),
        _steered_by_tensor,
        forward,
    ),
    Hazard(
        "hook object with another strength",
        "An attribute of a hook object changes.",
        lambda c: setattr(c.kept["hook"], "strength", 5.0),
        _steered_by_object,
        forward,
    ),
    Hazard(
        "hook for all modules",
        "`register_module_forward_hook`.",
        lambda c: global_hooks.register_module_forward_hook(lambda m, a, r: r + 1 if m is c.layer.mlp else None),
        chunk,
        forward,
    ),
    Hazard(
        "backward hook on a layer",
        "A backward hook changes gradients.",
        lambda c: c.layer.mlp.register_full_backward_hook(_halve_gradient),
        training,
        gradients,
        ("hook",),
    ),
    Hazard(
        "gradient hook on a parameter",
        "A hook on a weight changes its gradient.",
        lambda c: next(c.layer.mlp.parameters()).register_hook(lambda g: g * 0.5),
        training,
        gradients,
    ),
]
