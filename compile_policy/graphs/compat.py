"""Private symbols of torch that a dump observes compilation with, each in one place and each with a test."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import CodeType
from typing import Any

import torch._inductor.config as inductor
from torch._dynamo.convert_frame import register_bytecode_hook


def structured_trace() -> logging.Logger:
    """The logger of torch's structured trace, which `TORCH_TRACE` and tlparse read.

    It carries every graph on the way to a kernel, also when lowering finds its result in a cache, and is silent as
    long as no handler listens. Neither configuration nor cache keys depend on it.
    """
    return logging.getLogger("torch.__trace")


def trace_event(record: logging.LogRecord) -> tuple[str, Any, str | None]:
    """(name, metadata, payload) of a record of the structured trace; an artifact goes by its own name."""
    metadata = getattr(record, "metadata", {})
    name = next(iter(metadata), "")
    details = metadata.get(name)
    if name in ("artifact", "graph_dump") and isinstance(details, dict):
        name = str(details.get("name", name))
    return name, details, getattr(record, "payload", None)


def on_bytecode(hook: Callable[[CodeType, CodeType], None]) -> Callable[[], None]:
    """Call ``hook(original, transformed)`` for every code object that Dynamo makes; returns what ends it."""

    def observe(code: CodeType, new_code: CodeType) -> None:
        hook(code, new_code)  # what a hook returns would replace the code

    handle = register_bytecode_hook(observe)
    return lambda: handle.remove()


def kernel_origins() -> AbstractContextManager[Any]:
    """Have Inductor say which operations went into which kernel (level 2, which adds comments to the code, no more).

    The level is part of Inductor's cache key: what a cache holds without the origins is made once more with them.
    """
    if inductor.trace.provenance_tracking_level:
        return nullcontext()
    return inductor.patch({"trace.provenance_tracking_level": 2})  # type: ignore[no-any-return]
