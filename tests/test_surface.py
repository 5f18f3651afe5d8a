"""The public names of the package: what a user may import, and nothing by accident."""

from __future__ import annotations

import re
import types

import compile_policy

PUBLIC = {
    "CompilationConfig",
    "IntermediateTensors",
    "PolicyError",
    "PolicyWarning",
    "apply",
    "eager",
    "ignore_torch_compile",
    "load_model",
    "plan",
    "remove",
    "report",
    "support_torch_compile",
    "use_config",
}


def test_the_public_names_are_these() -> None:
    """A name that appears or disappears here is a decision, not an accident."""
    found = {
        n for n, v in vars(compile_policy).items() if not n.startswith("_") and not isinstance(v, types.ModuleType)
    }
    assert found == PUBLIC


def test_every_public_name_is_documented() -> None:
    """Whatever can be imported says what it is."""
    assert all(vars(compile_policy)[name].__doc__ for name in PUBLIC)


def test_functions_hide_no_module() -> None:
    """A public function keeps its name although modules of the package have similar ones."""
    import compile_policy.applied
    import compile_policy.plan
    import compile_policy.region

    for name in ("apply", "plan", "remove", "report", "load_model", "eager"):
        assert isinstance(getattr(compile_policy, name), types.FunctionType), name


def test_the_version_is_a_version() -> None:
    """Three numbers."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", compile_policy.__version__)
