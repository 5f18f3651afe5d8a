"""Layers and overrides that installed packages bring, found by entry point.

A package declares ``[project.entry-points."compile_policy.layers"]`` with ``name = "its.module"``, which registers when
it is imported, or ``name = "its.module:function"``, which is called without arguments. A plug-in that fails is left out
as a whole and named; the overrides of the others are applied together, after all of them are known.
"""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Collection
from dataclasses import dataclass, replace

from compile_policy.caller import warn_user
from compile_policy.events import emit
from compile_policy.layers import registry
from compile_policy.layers.records import Claim

GROUP = "compile_policy.layers"


@dataclass(frozen=True)
class Plugin:
    """An installed plug-in.

    Attributes:
        name: name of its entry point.
        origin: distribution and version.
        value: what the entry point refers to.
        status: ``loaded``, ``skipped`` or ``failed``.
        error: the exception, for a failed one.
        claims: overrides that it brought.
    """

    name: str
    origin: str
    value: str
    status: str
    error: str = ""
    claims: tuple[Claim, ...] = ()


# A module registers only when it is first imported: what a plug-in claimed is kept, or a second look would find
# nothing.
_known: dict[tuple[str, str, str], Plugin] = {}
_lock = threading.RLock()


def load_plugins(*, enabled: bool = True, skip: Collection[str] = ()) -> tuple[Plugin, ...]:
    """Load what is installed and apply its overrides. A second call loads what is new and applies nothing twice.

    Args:
        enabled: ``False`` is the kill switch: nothing is imported, all are reported as skipped.
        skip: names of entry points, or of distributions, to leave out.

    Returns:
        All installed plug-ins, by name.

    Raises:
        LayerError: overrides that conflict; the message names the plug-ins, and none of them is applied.
    """
    with _lock:
        plugins = tuple(_load(entry, enabled, skip) for entry in _entry_points())
        new = [c for p in plugins for c in p.claims if p.status == "loaded" and c not in registry.claims()]
        registry.add_claims(new)
        return plugins


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    return sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: (e.name, e.value))


def _load(entry: importlib.metadata.EntryPoint, enabled: bool, skip: Collection[str]) -> Plugin:
    dist = entry.dist
    origin = f"{dist.name} {dist.version}" if dist is not None else entry.value
    if not enabled or entry.name in skip or (dist is not None and dist.name in skip):
        return Plugin(entry.name, origin, entry.value, "skipped")
    key = (entry.name, origin, entry.value)
    if key not in _known:
        _known[key] = _imported(entry, origin)
    return _known[key]


def _imported(entry: importlib.metadata.EntryPoint, origin: str) -> Plugin:
    try:
        with registry.staging() as claims:
            found = entry.load()
            if callable(found):
                found()
    except Exception as error:
        registry.forget_failed_modules()
        reason = f"{type(error).__name__}: {error}"
        message = f"The layer plug-in {entry.name!r} of {origin} failed and is left out: {reason}."
        emit("skipped", "", message, plugin=entry.name, origin=origin)
        warn_user(f"{message} Repair or uninstall it, or skip it by name.")
        return Plugin(entry.name, origin, entry.value, "failed", error=reason)
    brought = tuple(replace(claim, origin=origin) for claim in claims)
    return Plugin(entry.name, origin, entry.value, "loaded", claims=brought)
