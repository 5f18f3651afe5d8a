"""What Dynamo knows that the traced Python would change besides tensors: private state of a running capture.

Public is only the setting ``side_effect_replay_policy`` (torch 2.13 and later), which tells of such effects after the
graph has been handed over, in words. The same list is read here while it is complete and nothing has run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting

_EXISTING = (AttributeMutationExisting, ValueMutationExisting)


class Stopped(Exception):
    """The trace is complete, and is not to be run."""


def raised_by_the_code(error: BaseException) -> bool:
    """True if the traced code itself raised, so that an eager run on the same arguments would raise too."""
    return isinstance(error, Unsupported) and "Your code may result in an error when running in eager" in str(error)


def stop_and_note(effects: list[str], owned: tuple[str, ...] = ()) -> Callable[..., Any]:
    """A backend of Dynamo that puts down the effects on Python objects from outside, and runs nothing.

    Args:
        owned: names of sources below which effects do not count.
    """

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        effects.extend(_noted(InstructionTranslator.current_tx(), owned))
        raise Stopped

    return backend


def _noted(translator: Any, owned: tuple[str, ...]) -> list[str]:
    found: list[str] = []
    effects = translator.output.side_effects
    for variable in list(effects.id_to_variable.values()):
        if isinstance(variable.mutation_type, _EXISTING) and effects.is_modified(variable):
            if owned and _source_name(variable).startswith(owned):
                continue
            names = _changed_attributes(translator.output, variable)
            if names is None and not _holds_the_same(variable):
                found.append(f"writes into {_place(variable)}")
            elif names:
                found.append(f"sets {' and '.join(names)} of {_place(variable)}")
    if getattr(effects, "tensor_hooks", None):
        found.append("registers a hook on a tensor")
    if getattr(translator, "random_calls", None) or getattr(translator.output, "random_calls", None):
        found.append("draws from Python's random numbers")
    return found


def _changed_attributes(output: Any, variable: Any) -> list[str] | None:
    """Attributes that get another value; ``None`` where something else than attributes is written."""
    stored = output.side_effects.store_attr_mutations.get(variable)
    if not stored:
        return None
    owner = getattr(variable, "value", None)
    return [name for name, value in stored.items() if not _is_what_is_there(output, owner, name, value)]


def _is_what_is_there(output: Any, owner: Any, name: str, value: Any) -> bool:
    """Whether an attribute is set to what it holds: the same constant, or the same tensor after ``to(device)``."""
    try:
        old = getattr(owner, name)
        if isinstance(old, torch.Tensor):
            sources = output.tracked_fakes_id_to_source.get(id(old), ())
            fakes = [tracked.fake for tracked in output.tracked_fakes if tracked.source in sources]
            return any(fake is _fake_of(value) for fake in fakes)
        if not value.is_python_constant():
            return False
        new = value.as_python_constant()
    except Exception:  # deleted, or not known
        return False
    return type(new) is type(old) and bool(new == old)


def _holds_the_same(variable: Any) -> bool:
    """Whether a dict holds, in the same order, what it held before."""
    try:
        now, before = list(variable.items.items()), list(variable.original_items.items())
        keys_now = [key.vt.as_python_constant() for key, _ in now]
        keys_before = [getattr(key, "vt", key).as_python_constant() for key, _ in before]
        pairs = [(new.realize(), old.realize()) for (_, new), (_, old) in zip(now, before, strict=True)]
        return keys_now == keys_before and all(_is_same(new, old) for new, old in pairs)
    except Exception:  # no dict, or of another size
        return False


def _is_same(new: Any, old: Any) -> bool:
    if new is old:
        return True
    if _fake_of(new) is not None:
        return _fake_of(new) is _fake_of(old)
    return bool(new.is_python_constant() and new.as_python_constant() == old.as_python_constant())


def _fake_of(variable: Any) -> Any:
    """The fake tensor that stands for a tensor while it is traced; ``None`` for anything else."""
    proxy = getattr(variable, "proxy", None)
    return None if proxy is None else proxy.node.meta.get("example_value")


def _source_name(variable: Any) -> str:
    """How Dynamo reaches the object; empty where it does not say."""
    if variable.source is None:
        return ""
    try:
        name = variable.source.name
        return str(name() if callable(name) else name)
    except Exception:
        return ""


def _place(variable: Any) -> str:
    text = _source_name(variable)
    if not text:
        return f"a {variable.python_type_name()}"
    text = text.replace("L['run'].__closure__[0].cell_contents", "forward")
    return text.replace("forward.__self__", "self")
