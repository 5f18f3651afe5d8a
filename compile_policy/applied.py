"""`apply`, `remove`, `plan`, `report`, `eager`: the policy on a model that exists.

What was applied is kept beside the model, not on it: its type, ``state_dict`` and pickle stay as they are, and a copy
of the model is a model without policy.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch

from compile_policy.backend import DEFAULT_BACKEND, Backend, find_backend
from compile_policy.caller import warn_user
from compile_policy.config import CompilationConfig
from compile_policy.configured import check_dump_path
from compile_policy.environment import obstacle
from compile_policy.plan import Component, ComponentReport, Plan, Report
from compile_policy.region import Region, region_of

#: Fields that are accepted and do nothing yet.
RESERVED = ("splitting_ops",)
M = TypeVar("M", bound=torch.nn.Module)
_plans: weakref.WeakKeyDictionary[torch.nn.Module, Plan] = weakref.WeakKeyDictionary()


def load_model(name: str | None = None, *, config: CompilationConfig | None = None, **kwargs: Any) -> Any:
    """Load a model with the policy applied before its modules are built.

    Args:
        name: a local folder, a hub id, ``tiny:<model type>`` (random weights) or nothing (the embedded model).
        config: the configuration; defaults where not given.
        kwargs: for the library's own loader, such as ``dtype`` or ``device_map``.

    Raises:
        PolicyError: the model cannot be loaded, or cannot do what the configuration asks.
        ConfigError: nothing can be written to ``debug_dump_path``.
    """
    config = config or CompilationConfig()
    check_dump_path(config)
    backend, unsupported = _tested_backend()
    warn_of_reserved(config)
    model = backend.load_model(name, config=config, **kwargs)
    _plans[model] = _with_decorated(model, backend.apply(model, config))
    _keep_eager(model, unsupported)
    _dump_plan(_plans[model], config)
    return model


def _with_decorated(model: torch.nn.Module, made: Plan) -> Plan:
    """A plan with the components that the user decorated, whatever the plan says of them, or of what holds them."""
    paths = {name: region for name, module in model.named_modules() if (region := region_of(module)) is not None}
    own = {name: region for name, region in paths.items() if region.decorated}
    rows = [
        replace(row, decision="compile", reason=own.pop(row.qualname).reason, remedy="") if row.qualname in own else row
        for row in made.components
    ]
    for name, region in own.items():
        region.qualname, region.name = name, f"{region.role} {name}".strip()
        rows.append(Component(region.role, name, type(region.module).__name__, "compile", region.reason))
    return replace(made, components=tuple(rows))


def warn_of_reserved(config: CompilationConfig) -> None:
    """Say of every field that was set and has no effect that it has none."""
    for name in RESERVED:
        if config.origin(name) != "default":
            message = f"{name} ({config.origin(name)}) has no effect in this version. Leave it out to silence this."
            warn_user(message)


def apply(model: M, config: CompilationConfig | None = None) -> M:
    """Put the policy on a model that exists; a policy applied earlier is removed first. Returns the same model.

    Components whose class the user decorated with `support_torch_compile` stay as they are, and are reported.

    Raises:
        UnsupportedModelError: the configuration asks for something that this model doesn't have.
        ConfigError: nothing can be written to ``debug_dump_path``; the model stays as it was.
    """
    config = config or CompilationConfig()
    check_dump_path(config)
    remove(model)
    warn_of_reserved(config)
    backend, unsupported = _tested_backend()
    _plans[model] = _with_decorated(model, backend.apply(model, config))
    _keep_eager(model, unsupported)
    _dump_plan(_plans[model], config)
    return model


def _tested_backend() -> tuple[Backend, str]:
    """The backend, and why nothing may be compiled with its library; empty where nothing forbids it."""
    backend = find_backend()
    return backend, obstacle((DEFAULT_BACKEND,), lambda: backend.self_test())


def _keep_eager(model: torch.nn.Module, unsupported: str) -> None:
    """Have every component run eager for a reason, where there is one."""
    for region in regions(model) if unsupported else ():
        region.condemned = region.condemned or unsupported


def _dump_plan(made: Plan, config: CompilationConfig) -> None:
    """Keep the plan beside the graphs, where these are dumped."""
    if config.debug_dump_path is not None:
        from compile_policy.graphs.runs import note_plan  # for those who dump

        note_plan(config.debug_dump_path, made.to_dict())


def remove(model: M) -> M:
    """Take the policy off a model and everything below it. Returns the same model.

    What the user's own `support_torch_compile` compiles stays compiled.
    """
    for region in regions(model):
        if not region.decorated:
            region.detach()
    if _plans.pop(model, None) is not None:
        find_backend().remove(model)
    return model


def plan(model: Any = None, *, config: CompilationConfig | None = None) -> Plan:
    """What would be compiled and why, without loading weights.

    Args:
        model: a model, or a name as `load_model` takes it.
    """
    made = find_backend().plan(model, config=config)
    return _with_decorated(model, made) if isinstance(model, torch.nn.Module) else made


def report(model: torch.nn.Module) -> Report:
    """What was planned for a model, and what happened since."""
    found = {id(region): region for region in regions(model)}
    paths = {id(module): name for name, module in model.named_modules()}
    planned = _plans.get(model)
    rows: list[ComponentReport] = []
    for component in planned.components if planned else ():
        region = region_of(model.get_submodule(component.qualname))
        if region is None or component.decision != "compile":
            rows.append(_as_planned(component))
        else:
            rows.append(replace(found.pop(id(region)).report(), role=component.role, qualname=component.qualname))
    for region in found.values():  # of a class that the user decorated, on a model without policy
        rows.append(replace(region.report(), qualname=paths.get(id(region.module), region.qualname)))
    return Report(tuple(rows), planned.notes if planned else ())


def _as_planned(component: Component) -> ComponentReport:
    """A component without a region; one that was to have one lost it, and runs eager."""
    known = (component.role, component.qualname, component.cls, component.decision, component.reason)
    return ComponentReport(*known, remedy=component.remedy)


@contextmanager
def eager(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block, the model runs as if no policy were applied."""
    with ExitStack() as stack:
        for region in regions(model):
            stack.enter_context(region.pause())
        yield


def regions(model: torch.nn.Module) -> list[Region]:
    """The regions in front of a model and the modules below it."""
    return [region for module in model.modules() if (region := region_of(module)) is not None]
