"""Modelling backends, found by entry point.

A backend is a module that knows one modelling library: it loads models, says what their components are and applies
the policy to them. Packages add one under the entry point group ``compile_policy.backends``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from typing import Any, Protocol, cast

import torch

from compile_policy.config import CompilationConfig
from compile_policy.errors import PolicyError, first_line
from compile_policy.plan import Plan
from compile_policy.versions import compare, installed, refuse_unsupported

GROUP = "compile_policy.backends"
DEFAULT_BACKEND = "transformers"
# Where the project runs from a plain checkout there is no installed metadata to ask.
_BUILT_IN = {"transformers": "compile_policy_transformers"}


class Backend(Protocol):
    """What a backend module offers."""

    def load_model(
        self, name: str | None = None, *, config: CompilationConfig | None = None, **kwargs: Any
    ) -> torch.nn.Module: ...

    def plan(self, model: Any = None, *, config: CompilationConfig | None = None) -> Plan: ...

    def apply(self, model: torch.nn.Module, config: CompilationConfig) -> Plan: ...

    def remove(self, model: torch.nn.Module) -> None: ...

    def self_test(self) -> list[tuple[str, bool, str]]: ...


def _refuse_old(name: str) -> None:
    for finding in compare(installed()):
        if finding.package == name and finding.state in ("older", "unreadable"):
            refuse_unsupported((finding,))


def backend_names() -> dict[str, str]:
    """name -> module of every backend there is."""
    installed = {point.name: point.value for point in importlib.metadata.entry_points(group=GROUP)}
    return {**_BUILT_IN, **installed}


def find_backend(name: str = DEFAULT_BACKEND) -> Backend:
    """Import a backend.

    Raises:
        PolicyError: no backend of this name, or it cannot be imported: its library is not installed, or fails itself.
        EnvironmentNotSupported: its library is older than the oldest tested release.
    """
    names = backend_names()
    if name not in names:
        raise PolicyError(f"No backend {name!r} is installed.", remedy=f"There are: {', '.join(sorted(names))}.")
    if names[name] not in sys.modules:  # an old library may fail obscurely
        _refuse_old(name)
    try:
        return cast(Backend, importlib.import_module(names[name]))
    except ImportError as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None:  # a library is there, and one of its own cannot be loaded
            said = f"The backend {name!r} cannot be imported: {first_line(error)}."
            raise PolicyError(said, remedy=f"python -c 'import {names[name]}' shows where it fails.") from error
        said = f"The backend {name!r} needs {missing}, which is not installed."
        raise PolicyError(said, remedy=f"pip install {missing}") from error
