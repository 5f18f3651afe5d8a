"""Layers replaced where a Transformers model is built.

`layer_scope` drives Transformers' own patch mapping (``transformers.monkey_patching``), which replaces classes by name
while `from_pretrained` or `from_config` builds a model. The scope adds what that lacks: claims are checked as a whole
first, direct construction is covered, and everything is as it was afterwards, also when a model's ``__init__`` raises.
"""

from __future__ import annotations

import copy
import gc
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel
from transformers.monkey_patching import (
    get_patch_mapping,
    register_patch_mapping,
    unregister_patch_mapping,
)
from transformers.utils.output_capturing import OutputRecorder

from compile_policy.caller import warn_user
from compile_policy.layers import Claim, LayerError
from compile_policy.layers.checks import check_claim, conflicts, import_target
from compile_policy.layers.identity import qualified
from compile_policy.layers.pluggable import compare_state_dicts
from compile_policy.layers.registry import claims as registered_claims
from compile_policy.layers.registry import count_built

# The patch mapping belongs to the whole process: one scope at a time.
_lock = threading.RLock()


@dataclass
class LayerScope:
    """What a `layer_scope` replaces, and how often it did.

    Attributes:
        applied: class that is replaced -> the claim that holds.
        counts: its name -> instances that were replaced, known when the scope ends.
        used: classes that were replaced at all.
        models: the models that were built inside and are still there.
    """

    applied: Mapping[type, Claim]
    counts: Counter[str] = field(default_factory=Counter)
    used: set[type] = field(default_factory=set)
    models: WeakSet[PreTrainedModel] = field(default_factory=WeakSet)

    def check(self, model: PreTrainedModel) -> None:
        """Prove that each replaced layer of ``model`` has the state dict that it has without the scope.

        To be called after the scope, which itself does so where an override is no subclass.

        Raises:
            LayerError: the names or shapes that differ.
        """
        with torch.device("meta"):
            reference = type(model)(copy.deepcopy(model.config))
        replaced = {claim.cls for claim in self.applied.values()}
        for name, module in model.named_modules():
            if name and type(module) in replaced:
                compare_state_dicts(reference.get_submodule(name), module, dtypes=False)


@contextmanager
def layer_scope(
    replacements: Mapping[type, type] | None = None, *, plugins: bool = True, strict: bool = False
) -> Iterator[LayerScope]:
    """Models that are built inside the block get the overrides: registered ones (`override`) and ``replacements``.

    Args:
        replacements: class of Transformers -> its subclass.
        plugins: also the registered overrides.
        strict: an override that replaced nothing is an error; otherwise it is a warning for ``replacements``, and for
            registered ones, which may be meant for other models, ``compile-policy layers ls`` tells.

    Raises:
        LayerError: conflicting overrides, a class that is no subclass, a name that stands for several classes;
            nothing is changed then. After the block: a dead override (``strict``), or one whose state dict differs.
    """
    given = [Claim(target, cls, "model", "argument") for target, cls in (replacements or {}).items()]
    registered = [c for c in registered_claims() if c.where == "model"] if plugins else []
    with _lock:
        scope = LayerScope(_resolved(registered + given))
        names = {target.__name__: claim.cls for target, claim in scope.applied.items()}
        with ExitStack() as stack:
            stack.enter_context(_restored(scope.applied))
            register_patch_mapping(names)
            stack.callback(unregister_patch_mapping, list(names))
            _patch(scope.applied)
            stack.enter_context(_counting(scope))
            yield scope
    if any(not issubclass(claim.cls, target) for target, claim in scope.applied.items()):
        for model in list(scope.models):
            scope.check(model)
    _report_dead(scope, strict)


def _resolved(claims: list[Claim]) -> dict[type, Claim]:
    """Target class -> winning claim, once nothing is wrong with any of them."""
    by_target: dict[type, list[Claim]] = {}
    for claim in claims:
        by_target.setdefault(import_target(claim), []).append(claim)
    problems: list[str] = []
    for target, rivals in by_target.items():
        problems += conflicts(qualified(target), rivals)
        problems += [problem for claim in rivals for problem in check_claim(claim, target)]
        problems += _ambiguities(target)
        if any(not issubclass(claim.cls, target) for claim in rivals) and _is_recorded(target):
            problems.append(
                f"Transformers records outputs of {qualified(target)} by its class; derive the override from it."
            )
    if problems:
        raise LayerError("\n".join(problems))
    return {target: max(rivals, key=lambda c: c.priority) for target, rivals in by_target.items()}


def _ambiguities(target: type) -> list[str]:
    """The patch mapping goes by name alone: refuse a name that would hit another class, or that somebody else uses."""
    name = target.__name__
    if name in get_patch_mapping():
        return [f"{name} is already replaced by {qualified(get_patch_mapping()[name])} in Transformers' patch mapping."]
    others = {value for module in _modules() if isinstance(value := vars(module).get(name), type)} - {target}
    if not others:
        return []
    listed = ", ".join(sorted(qualified(other) for other in others))
    return [f"{qualified(target)} shares its name with {listed}, and building replaces by name. Use replace_layers_."]


def _modules() -> list[ModuleType]:
    """The modules that Transformers patches (a module of custom code is called ``transformers_modules...``)."""
    return [m for n, m in list(sys.modules.items()) if n.startswith("transformers") and isinstance(m, ModuleType)]


def _patch(applied: Mapping[type, Claim]) -> None:
    """For models that are built directly. `from_pretrained` and `from_config` apply the mapping themselves."""
    for target, claim in applied.items():
        for module in _modules():
            if vars(module).get(target.__name__) is target:
                setattr(module, target.__name__, claim.cls)


@contextmanager
def _restored(applied: Mapping[type, Claim]) -> Iterator[None]:
    """Put every patched name and recorder back, whatever happened inside.

    Transformers' `apply_patches` has no ``finally``, nor does it know of modules first imported while classes were
    replaced. What it does to output recorders is done to the classes, for good. Drop this once it restores all three.
    """
    recorders = [(table, _copied(table)) for table in _recorder_tables()]
    back = {claim.cls: target for target, claim in applied.items()}
    try:
        yield
    finally:
        for target, claim in applied.items():
            for module in _modules():
                if vars(module).get(target.__name__) is claim.cls:
                    setattr(module, target.__name__, target)
        known = {id(table) for table, _ in recorders}
        for table, values in recorders:
            table.update(values)
        for table in _recorder_tables():
            if id(table) not in known:
                table.update(_copied(table, back))


def _recorder_tables() -> list[dict[str, Any]]:
    classes: list[type] = [PreTrainedModel]
    for cls in classes:
        classes.extend(cls.__subclasses__())
    tables = {id(t): t for cls in classes if isinstance(t := vars(cls).get("_can_record_outputs"), dict)}
    return list(tables.values())


def _copied(table: dict[str, Any], back: Mapping[Any, type] | None = None) -> dict[str, Any]:
    def copied(value: Any) -> Any:
        if isinstance(value, list):
            return [copied(v) for v in value]
        if isinstance(value, OutputRecorder):
            target = (back or {}).get(value.target_class, value.target_class)
            return OutputRecorder(**{**vars(value), "target_class": target})
        return (back or {}).get(value, value)

    return {key: copied(value) for key, value in table.items()}


def _is_recorded(target: type) -> bool:
    values = [v for table in _recorder_tables() for value in table.values() for v in _listed(value)]
    return any((v.target_class if isinstance(v, OutputRecorder) else v) is target for v in values)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@contextmanager
def _counting(scope: LayerScope) -> Iterator[None]:
    """Note replaced instances as torch hears of them: every module is some module's child, or its parent.

    What counts are those alive in the end: loading a model may build another one first, only to look at it.
    """
    targets = {claim.cls: target for target, claim in scope.applied.items()}
    seen: WeakSet[nn.Module] = WeakSet()

    def look(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        for module in (parent, child):
            if type(module) in targets:
                assert module is not None
                seen.add(module)
                scope.used.add(targets[type(module)])
        if isinstance(parent, PreTrainedModel):
            scope.models.add(parent)
        if isinstance(child, PreTrainedModel):
            scope.models.discard(child)

    handle = register_module_module_registration_hook(look)
    try:
        yield
    finally:
        handle.remove()
        if len(scope.models) > 1:
            gc.collect()  # a model that was only looked at may hold itself alive
        for module in seen:
            scope.counts[qualified(targets[type(module)])] += 1
            count_built(targets[type(module)], type(module))


def _report_dead(scope: LayerScope, strict: bool) -> None:
    dead = [(t, c) for t, c in scope.applied.items() if t not in scope.used]
    messages = [f"{c} overrides {qualified(t)} and replaced 0 instances." for t, c in dead]
    if messages and strict:
        raise LayerError("\n".join(messages), remedy="Remove the override, or build the model inside the scope.")
    for message, (_, claim) in zip(messages, dead, strict=True):
        if claim.origin == "argument":
            warn_user(f"{message} Build the model inside the scope.")
