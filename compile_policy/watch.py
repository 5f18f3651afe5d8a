"""Structural changes noticed at once, through torch's registration hooks.

torch calls a hook whenever a sub-module, a parameter or a buffer is registered with a module: ``add_module``,
``register_parameter``, ``register_buffer``, and an assignment such as ``block.linear = LoraLinear(...)`` or
``layers[0] = ...``. While a region is attached, one hook of each kind is installed; it raises `structure_epoch` when
the module belongs to an attached region, and does nothing for any other. A fingerprint that finds the epoch raised
looks at its module again, in the middle of a sequence too.

Torch has no such hook for the rest, which is seen where a sequence starts: forward hooks put on sub-modules or taken
off, ``requires_grad_``, ``train()`` of a part, plain attributes and configuration values, adapters switched or merged
(plain attributes too), ``module.bias = None``, ``del module.part``, ``parameter.data = ...``, and changes made in
``_modules`` directly.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules import module as registration

from compile_policy import compat

_epoch = 0
_lock = threading.RLock()
compat.renew_after_fork(_lock)
_attached: dict[int, tuple[weakref.ref[Any], weakref.WeakSet[torch.nn.Module]]] = {}
_handles: list[Any] = []


def structure_epoch() -> int:
    """Raised by every registration on a watched module; never lowered."""
    return _epoch


def watch(owner: Any, module: torch.nn.Module) -> None:
    """Watch ``module`` and everything below it until `unwatch`, or until ``owner`` or the module is gone."""
    key = id(owner)
    with _lock:
        _attached[key] = (weakref.ref(owner, lambda _: _forget(key)), weakref.WeakSet(module.modules()))
        _install()


def unwatch(owner: Any) -> None:
    """Watch for ``owner`` no longer; the last one takes the hooks away."""
    _forget(id(owner))


def _forget(key: int) -> None:
    # The collector calls this as well, at any allocation of a thread that may be in here already: it takes one key away
    # and goes through nothing.
    with _lock:
        if _attached.pop(key, None) is not None and not _attached:
            _uninstall()


@contextmanager
def suspended() -> Iterator[None]:
    """Without the hooks inside the block: Dynamo would trace through them. What is registered meanwhile counts too."""
    global _epoch
    with _lock:
        installed = bool(_handles)
        _uninstall()
    try:
        yield
    finally:
        with _lock:
            if installed and _attached:
                _install()
            _epoch += installed


def _install() -> None:
    if not _handles:
        _handles.extend(
            register(_registered)
            for register in (
                registration.register_module_module_registration_hook,
                registration.register_module_parameter_registration_hook,
                registration.register_module_buffer_registration_hook,
            )
        )


def _uninstall() -> None:
    while _handles:
        _handles.pop().remove()


def _registered(module: torch.nn.Module, name: str, what: Any) -> None:
    global _epoch
    if torch.compiler.is_dynamo_compiling():  # somebody else's compile; nothing is registered by tracing
        return
    holding = [watched for _, watched in [*_attached.values()] if module in watched]
    if holding:
        _epoch += 1
        if isinstance(what, torch.nn.Module):
            for watched in holding:
                watched.update(what.modules())
