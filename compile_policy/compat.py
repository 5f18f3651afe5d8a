"""Versions that are supported, and private symbols of torch, each in one place and each with a test.

Nothing else in ``compile_policy`` reaches below torch's documented interface.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch._guards import TracingContext

from compile_policy.errors import EnvironmentNotSupported

#: Oldest versions that the tests have passed on.
TORCH_FLOOR = (2, 11)
TRANSFORMERS_FLOOR = (5, 17)

_SIZE_OF_LEAF = re.compile(r"L\['leaves'\]\[(\d+)\]\.size\(\)\[(\d+)\]")


def check_versions(torch_version: str, transformers_version: str) -> None:
    """Refuse a torch or Transformers older than the oldest tested one."""
    for name, version, floor in (
        ("torch", torch_version, TORCH_FLOOR),
        ("transformers", transformers_version, TRANSFORMERS_FLOOR),
    ):
        found = re.match(r"(\d+)\.(\d+)", version)
        if found is None or (int(found[1]), int(found[2])) < floor:
            least = ".".join(map(str, floor))
            raise EnvironmentNotSupported(
                f"{name} {version} is not supported, {least} is the oldest that is.",
                remedy=f"pip install '{name}>={least}'",
            )


def graph_argument(node: torch.fx.Node) -> tuple[Any, Any]:
    """(example, source) of a placeholder: Dynamo keeps the real tensor that it lifted, and where it stood."""
    argument = node.meta["grapharg"]
    return argument.example, argument.source


def source_name(source: Any) -> str:
    """The name is a method in torch 2.11 and a property since."""
    name = source.name
    return str(name() if callable(name) else name)


def leaf_dim_of_source(source: Any) -> tuple[int, int] | None:
    """(leaf, dim) of a size of a leaf, ``None`` for another source; the traced function takes ``*leaves``."""
    match = _SIZE_OF_LEAF.fullmatch(source_name(source))
    return None if match is None else (int(match[1]), int(match[2]))


def tracing_shape_env() -> Any:
    """The ``ShapeEnv`` of the capture that is running."""
    context = TracingContext.get()
    assert context.fake_mode is not None
    return context.fake_mode.shape_env


def symbol_sources(env: Any) -> dict[Any, list[Any]]:
    """symbol -> where its value comes from."""
    return dict(env.var_to_sources)


def guard_origin(guard: Any) -> str:
    """Where in torch or in the model a size relation was assumed."""
    return str(getattr(guard, "sloc", ""))


def compiled_call_impl(module: torch.nn.Module) -> Any:
    """What ``module(...)`` calls instead of ``_call_impl``; the hook that ``nn.Module.compile`` sets too."""
    return module.__dict__.get("_compiled_call_impl")


def set_compiled_call_impl(module: torch.nn.Module, call: Any) -> None:
    """Route calls of this instance through ``call``; ``None`` restores the module's own."""
    if call is None:
        module.__dict__.pop("_compiled_call_impl", None)
    else:
        module.__dict__["_compiled_call_impl"] = call


def plain_call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's own call with its hooks, past whatever is attached to the instance."""
    return module._call_impl(*args, **kwargs)


def autocast_state() -> tuple[Any, ...]:
    """Autocast as the calling thread sees it, for every device type that is in use."""
    return tuple(
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    )


def original_error(error: BaseException) -> BaseException:
    """What went wrong, without the wrappers that Dynamo puts round a backend's exception."""
    while isinstance(inner := getattr(error, "inner_exception", None), BaseException):
        error = inner
    return error
