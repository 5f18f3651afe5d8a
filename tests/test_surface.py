"""The public names of the package: what a user may import, and nothing by accident."""

from __future__ import annotations

import ast
import importlib
import re
import types
from pathlib import Path

import pytest

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
    named = {name for name in dir(compile_policy) if not name.startswith("_")} - {"TYPE_CHECKING"}
    found = {name for name in named if not isinstance(getattr(compile_policy, name), types.ModuleType)}
    assert found == PUBLIC
    assert set(compile_policy.__all__) == PUBLIC | {"trace"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A name that is imported on first use is not every name."""
    with pytest.raises(AttributeError, match="no attribute 'complie'"):
        _ = compile_policy.complie  # type: ignore[attr-defined]
    assert not hasattr(compile_policy, "cli_")


def test_type_checkers_see_the_same_names() -> None:
    """The names under ``TYPE_CHECKING`` are those that are imported on first use, from the same modules."""
    tree = ast.parse(Path(compile_policy.__file__).read_text(encoding="utf-8"))
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    stated = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(stated) == set(compile_policy.__all__)
    for name, module in stated.items():
        assert getattr(compile_policy, name) is getattr(importlib.import_module(str(module)), str(name))


def test_every_public_name_is_documented() -> None:
    """Whatever can be imported says what it is."""
    assert all(getattr(compile_policy, name).__doc__ for name in PUBLIC)


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
