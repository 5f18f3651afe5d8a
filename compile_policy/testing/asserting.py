"""`assert_compiles_once` and `capture`: run a model, and look at the graphs that it needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from compile_policy.applied import apply, regions, remove, report
from compile_policy.binder import SignatureBinder
from compile_policy.config import CompilationConfig
from compile_policy.configured import region_options
from compile_policy.explain import ComponentExplained, explain
from compile_policy.graphs.source import model_source, op_name
from compile_policy.region import Region
from compile_policy.shapes import DimSpec, normalise
from compile_policy.testing.captured import Captured
from compile_policy.testing.limits import told_by_assertion

Call = Callable[[Any, Any], Any]


def assert_compiles_once(
    model: torch.nn.Module,
    inputs: Any,
    *,
    component: str | None = None,
    config: CompilationConfig | None = None,
    dynamic_arg_dims: Mapping[str, DimSpec] | None = None,
    call: Call | None = None,
) -> None:
    """Run ``model`` on ``inputs`` and assert that one graph was enough, and that nothing ran eager.

    A model that has no policy gets one for the call: a Transformers model as `compile_policy.apply` does, any other
    module as `support_torch_compile` would.

    Args:
        inputs: one call, or a list of calls; a call is a mapping of names, a tuple of positions, or one argument.
        component: role, path or class of the component to look at; all that are compiled without it. For a plain
            module, the path of the part to compile.
        config: the configuration for a model without policy; by default ``backend="eager"``, which captures and
            does not lower.
        dynamic_arg_dims: as of `support_torch_compile`, for a plain module; inferred from annotations without it.
        call: how to call, when not ``model(...)``: given the model and one call's inputs.

    Raises:
        AssertionError: names the line that cannot be compiled, or the argument that needed another graph.
    """
    with told_by_assertion(), _policed(model, component, config, dynamic_arg_dims):
        for region in _run(model, inputs, component, call):
            _check_once(model, region)


def capture(
    model: torch.nn.Module,
    inputs: Any,
    *,
    component: str | None = None,
    config: CompilationConfig | None = None,
    dynamic_arg_dims: Mapping[str, DimSpec] | None = None,
    call: Call | None = None,
) -> Captured:
    """Run ``model`` on ``inputs`` and return the graph of its one component; arguments as `assert_compiles_once`.

    Raises:
        AssertionError: there is no graph, or there are several; the message names the line or the argument.
    """
    with told_by_assertion(), _policed(model, component, config, dynamic_arg_dims):
        found = _run(model, inputs, component, call)
        names = ", ".join(region.name for region in found)
        assert len(found) == 1, f"{len(found)} components are compiled ({names}); name one of them"
        row = _check_once(model, found[0])
        [entry] = [entry for entries in found[0].entries.values() for entry in entries]
        kinds = tuple(op_name(str(op["op"])) for op in entry.graph.sources)
        lines = tuple(_line(str(op.get("stack", ""))) for op in entry.graph.sources)
        told = row.entries[0]
        return Captured(found[0].name, entry.graph.readable, kinds, lines, dict(row.sizes), told.conditions, told)


def _run(model: torch.nn.Module, inputs: Any, component: str | None, call: Call | None) -> list[Region]:
    """Call the model; the regions to look at, each of which was called."""
    chosen = _chosen(model, component)
    before = [region.calls for region in chosen]
    for given in inputs if isinstance(inputs, list) else [inputs]:
        _call(model, given) if call is None else call(model, given)
    idle = [region.name for region, calls in zip(chosen, before, strict=True) if region.calls == calls]
    assert not idle or (component is None and len(idle) < len(chosen)), f"{', '.join(idle)} was never called"
    return [region for region in chosen if region.name not in idle]


def _call(model: torch.nn.Module, given: Any) -> Any:
    if isinstance(given, Mapping):
        return model(**given)
    return model(*given) if isinstance(given, tuple) else model(given)


def _chosen(model: torch.nn.Module, component: str | None) -> list[Region]:
    places = {id(module): name for name, module in model.named_modules()}
    found = regions(model)
    names = [(r.role, r.qualname or places[id(r.module)], type(r.module).__name__, r.name) for r in found]
    chosen = [r for r, known in zip(found, names, strict=True) if component is None or component in known]
    rows = report(model).components
    told = "; ".join(f"{r.role} {r.qualname} ({r.cls}): {r.decision}, {r.reason}" for r in rows) or "there is none"
    wanted = "component" if component is None else f"component {component!r}"
    assert chosen, f"{type(model).__name__} has no compiled {wanted}. Components: {told}"
    return chosen


def _check_once(model: torch.nn.Module, region: Region) -> ComponentExplained:
    """Its explanation, when it has one graph and ran no call eager."""
    rows = explain(model).components
    place = next(name for name, module in model.named_modules() if module is region.module)
    [row] = [row for row in rows if row.decision == "compile" and row.qualname == place]
    name = f"{row.role} {row.qualname or row.cls}"
    assert row.fallback is None, f"{name} ran eager: {_why_eager(row)}"
    more = [f"graph {e.number}: {e.because or 'its sizes do not fit the graphs before'}" for e in row.entries[1:]]
    assert len(row.entries) == 1, f"{name} needed {len(row.entries)} graphs. " + "; ".join(more)
    return row


def _line(stack: str) -> str:
    source = model_source(stack)
    return "" if source is None else f"{source.place} {source.code}"


def _why_eager(row: ComponentExplained) -> str:
    failure = row.failure
    if failure is None or not failure.place:
        return str(row.fallback)
    where = f"{failure.file}:{failure.line}: `{failure.code}`"
    return f"{failure.cause}\n  {where}\n  {failure.remedy}".rstrip()


@contextmanager
def _policed(
    model: torch.nn.Module,
    component: str | None,
    config: CompilationConfig | None,
    dims: Mapping[str, DimSpec] | None,
) -> Iterator[None]:
    """The model with a policy: its own, or one for the block."""
    config = config or CompilationConfig(backend="eager")
    if regions(model):
        yield
    elif hasattr(model, "config") and hasattr(model, "generate"):
        apply(model, config)
        try:
            yield
        finally:
            remove(model)
    else:
        module = _part(model, component)
        cls = type(module)
        if dims is None:
            binder = SignatureBinder.inferred(cls)
        else:
            binder = SignatureBinder(normalise(cls, dims))
        region = Region(
            module, role="component", qualname=component or "", binder=binder, options=region_options(config)
        )
        region.attach()
        try:
            yield
        finally:
            region.detach()


def _part(model: torch.nn.Module, path: str | None) -> torch.nn.Module:
    """A part of a plain module.

    Raises:
        AssertionError: there is none at this path.
    """
    try:
        return model.get_submodule(path or "")
    except AttributeError:
        raise AssertionError(f"{type(model).__name__} has no part {path!r}") from None
