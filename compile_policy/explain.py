"""Why each component is compiled or not, which of its dims vary, what would make another graph: data only.

`explain` works on a name or a model. A model without regions, or without memory for its weights, is explained from
its plan; one that has run also from what happened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch

from compile_policy.applied import report
from compile_policy.backend import find_backend
from compile_policy.binder import Bound, SignatureBinder
from compile_policy.call_key import Call, make_call
from compile_policy.config import CompilationConfig
from compile_policy.decorators import dims_of, policy_of
from compile_policy.entry import Entry
from compile_policy.errors import NotCompilable
from compile_policy.explanation import Another as Another
from compile_policy.explanation import ComponentExplained as ComponentExplained
from compile_policy.explanation import DynamicDim as DynamicDim
from compile_policy.explanation import EntryExplained as EntryExplained
from compile_policy.explanation import Explanation as Explanation
from compile_policy.failure import failure_of
from compile_policy.plan import Component, ComponentReport
from compile_policy.region import Region, region_of
from compile_policy.words import argument_sizes, conditions_in_words, constants_of, dynamic_dims, modes_of

_FIELDS = frozenset(each.name for each in fields(ComponentExplained))


def explain(model: Any = None, *, config: CompilationConfig | None = None) -> Explanation:
    """Explain a model.

    Args:
        model: a model, or a name as `compile_policy.load_model` takes it; a name's weights are not loaded.
        config: the configuration for a model that has no policy yet.

    Raises:
        PolicyError: the model cannot be read, or cannot do what the configuration asks.
    """
    if not isinstance(model, torch.nn.Module):
        model = _explaining().model_of(model)
    told = report(model)
    if told.components:
        return Explanation(type(model).__name__, *_reported(model, told.components), told.notes)
    plan = find_backend().plan(model, config=config)
    rows = [_planned(model, component) for component in plan.components]
    return Explanation(type(model).__name__, False, *_with_facts(model, rows), plan.notes)


def _explaining() -> Any:
    """What the backend knows beyond planning."""
    backend: Any = find_backend()
    return backend.explaining


def _reported(
    model: torch.nn.Module, reported: Sequence[ComponentReport]
) -> tuple[bool, tuple[ComponentExplained, ...], tuple[str, ...]]:
    rows = []
    free = {name: region for name, module in model.named_modules() if (region := region_of(module)) is not None}
    for row in reported:
        known = {name: value for name, value in asdict(row).items() if name in _FIELDS}
        if row.decision == "compile":  # a decorated module's region does not know where it stands
            place = row.qualname if row.qualname in free else _place(row, free)
            known |= {"qualname": place, **_about(model, free.pop(place))}
        rows.append(ComponentExplained(**known))
    return any(row.calls for row in reported), *_with_facts(model, rows)


def _place(row: ComponentReport, free: Mapping[str, Region]) -> str:
    return next(name for name, region in free.items() if region.report() == row)


def _planned(model: torch.nn.Module, component: Component) -> ComponentExplained:
    """A component before anything ran, with the call that its binder makes of no data."""
    known = asdict(component)
    if component.decision != "compile":
        return ComponentExplained(**known)
    return ComponentExplained(**known, **_unseen(model, component))


def _with_facts(
    model: torch.nn.Module, rows: Sequence[ComponentExplained]
) -> tuple[tuple[ComponentExplained, ...], tuple[str, ...]]:
    """Rows with what the model itself says, and what it says about the whole."""
    facts = _explaining().facts(model) if hasattr(model, "config") else {}
    whole = () if any(row.qualname == "" for row in rows) else tuple(facts.get("", ()))
    return tuple(replace(row, facts=tuple(facts.get(row.qualname, ()))) for row in rows), whole


def _about(model: torch.nn.Module, region: Region) -> dict[str, Any]:
    """Dims, other graphs, entries and failure of a component with a region."""
    entries = sorted((e for found in region.entries.values() for e in found), key=lambda entry: entry.number)
    failure = region.failures.get(region.fallback or "")
    known = {"failure": failure, "entries": tuple(_entry(region, e, entries[i - 1 : i]) for i, e in enumerate(entries))}
    if entries:
        call = entries[-1].call
        another = tuple(_another(call, region, region.role))
        return {**known, "sizes": argument_sizes(call), "dims": tuple(_dims(region, call)), "another": another}
    if isinstance(region.binder, SignatureBinder):
        return {**known, "dims": tuple(_declared(region.module, region.binder))}
    component = Component(region.role, region.qualname, type(region.module).__name__, "compile", "")
    return {**known, **_unseen(model, component)}


def _unseen(model: torch.nn.Module, component: Component) -> dict[str, Any]:
    """Dims and other graphs of a component that was never called."""
    try:
        bound: Bound = _explaining().sample_bound(model, component)
        call = make_call(bound.values, bound.label, (), bound.fillers, bound.sizes, bound.example)
    except NotCompilable as why:
        return {"dims_unknown": f"a call as generate() makes it runs eager: {why.reason}"}
    except Exception as error:
        found = failure_of(error)
        where = f"at {found.place}: {found.code}" if found.place else f"with: {found.cause}"
        return {"dims_unknown": f"known at the first call; without data it stops {where}"}
    module = model.get_submodule(component.qualname)
    dims = [_dim(module, label, where) for label, where in dynamic_dims(call).items()]
    another = tuple(_another(call, None, component.role))
    return {"sizes": argument_sizes(call), "dims": tuple(dims), "another": another}


def _dims(region: Region, call: Call) -> Iterator[DynamicDim]:
    for label, where in dynamic_dims(call).items():
        if isinstance(region.binder, SignatureBinder):
            yield DynamicDim(label, where, _origin(region.module, region.binder), "dims with this name are equal")
        else:
            yield _dim(region.module, label, where)


def _dim(module: torch.nn.Module, label: str, where: tuple[str, ...]) -> DynamicDim:
    origin, meaning = _explaining().meaning(label, module)
    return DynamicDim(label, where, origin, meaning)


def _declared(module: torch.nn.Module, binder: SignatureBinder) -> Iterator[DynamicDim]:
    """Dims of a decorated module that was never called."""
    origin = _origin(module, binder)
    for name, dims in binder.dims.items():
        for dim, label in dims.items():
            yield DynamicDim(label or f"{name}.{dim}", (f"{name} dim {dim}",), origin, "declared for this argument")


def _origin(module: torch.nn.Module, binder: SignatureBinder) -> str:
    """Who said which dims vary."""
    policy = policy_of(type(module))
    if policy is None or binder.dims != dims_of(type(module), policy):
        return "configuration" if policy is not None else "argument"
    return "annotation" if policy.dynamic_arg_dims is None else "decorator"


def _entry(region: Region, entry: Entry, before: Sequence[Entry]) -> EntryExplained:
    graph, call = entry.graph, entry.call
    covered = Counter(str(getattr(guard, "covered_by", "") or "unclassified") for guard in graph.guards)
    key = {"arguments": constants_of(call), "sizes": argument_sizes(call), "modes": modes_of(call)}
    return EntryExplained(
        entry.number,
        because=region.difference(before[0], call) if before and before[0].call.key != call.key else "",
        road=graph.road,
        why_jit=graph.why_jit,
        depth=graph.depth,
        seconds=round(entry.seconds, 3),
        calls=entry.calls,
        ops=len(graph.sources),
        max_error=entry.max_error,
        key=key,
        conditions=tuple(conditions_in_words(call, graph.accepts.conditions)),
        guards=dict(covered.most_common()),
    )


def _another(call: Call, region: Region | None, role: str) -> Iterator[Another]:
    """What would need another graph: everything that is in the call key."""
    constants = constants_of(call)
    for name, spec in call.spec:
        if spec[0] == "adapted":
            yield Another(f"another kind of {name}", constants.pop(name), "Use one kind; each is one graph.")
    if constants:
        now = ", ".join(f"{name}={value}" for name, value in constants.items())
        yield Another("other constants, arguments given or left out", now, "Call it the same way, or pass tensors.")
    sizes = {path: size for path, size in argument_sizes(call).items() if "*" not in size and not _all_labels(size)}
    if role.startswith("encoder"):
        sizes = {path: size for path, size in sizes.items() if _fixes_extent(size)}
    if role != "decoder" and sizes:  # a decoder's are the sizes of its weights, and so are those of packed patches
        now = ", ".join(f"{path} {' x '.join(map(str, size))}" for path, size in sizes.items())
        yield Another("another size of a fixed dim", now, _SIZES.get(role, _SIZES[""]))
    kinds = dict.fromkeys(_dtype(m[0], m[1]) for m in call.key[1] if m[0].is_floating_point)
    yield Another("another dtype or device", ", ".join(kinds), "Convert the model once, before the first call.")
    on = [f"{n} {'on' if v is True else v}" for n, v in modes_of(call).items() if v not in (False, "off")]
    now = ", ".join(on) or "grad or inference mode, training, autocast, defaults"
    yield Another("another mode of torch", now, "Call it under the same modes.")
    changes = "a layer replaced, an adapter added or switched, a hook inside"
    yield Another("another structure", changes, "Change the module before its first call.")
    if region is not None:
        limit = region.options.max_entries
        yield Another(f"at most max_entries={limit} in all", f"{region.entry_count()} so far", "Raise max_entries.")


def _all_labels(sizes: Sequence[int | str]) -> bool:
    return all(isinstance(size, str) for size in sizes)


def _fixes_extent(sizes: Sequence[int | str]) -> bool:
    """Whether the size of each picture, or the length of each piece of sound, is fixed, and not just a width."""
    return all(isinstance(size, int) for size in sizes[1:]) and len(sizes) > 2


def _dtype(dtype: Any, device: Any) -> str:
    """A dtype, and its device where there is one."""
    name = str(dtype).removeprefix("torch.")
    return name if str(device) == "meta" else f"{name} on {device}"


_SIZES = {
    "encoder[image]": "Bring the pictures to one size.",
    "encoder[video]": "Bring the frames to one size.",
    "encoder[audio]": "Pad the pieces of sound to one length.",
    "": "Name the dim in dynamic_arg_dims to have it vary.",
}
