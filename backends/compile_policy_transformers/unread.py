"""Arguments that a component is handed and nobody below it reads.

A model hands its keyword arguments on to its towers, which swallow what they do not know: two calls that differ in
such an argument alone are the same call.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from types import ModuleType
from typing import Any

from torch import nn

_RETURN_DICT = "return_dict"
#: What Transformers' decorators round a forward read; of their code nothing else is asked.
_OUTPUT = "output_"
_DECORATED = (_OUTPUT, "use_cache")
_TORCH = ("torch", "builtins", "typing")


def without_unread(module: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` without words and switches that do not change what ``module`` computes.

    These are names that stand neither in its signature nor anywhere in the code that it is made of, a ``return_dict``
    that asks for what it returns anyway, and an ``output_...=False`` where the configuration asks for none either. That
    it is so is proved by the first call of the form (`compile_policy.proof`), which knows the value.
    """
    known = inspect.signature(module.forward).parameters
    config = getattr(module, "config", None)
    kept = dict(values)
    for name, value in values.items():
        if value is False and name.startswith(_OUTPUT) and not getattr(config, name, False):
            del kept[name]
            continue
        if not isinstance(value, (str, bool)) or name in known or name.startswith(_DECORATED):
            continue
        if name == _RETURN_DICT:
            needless = value is getattr(config, _RETURN_DICT, True)
        else:
            needless = not _may_be_read(name, frozenset(_homes(module)))
        if needless:
            del kept[name]
    return kept


def _homes(module: nn.Module) -> Iterator[str]:
    """The Python modules of all classes, and of every forward, also of one that was put in the place of theirs."""
    for cls in {type(m) for m in module.modules()}:
        yield from (known.__module__ for known in cls.__mro__)
    for m in module.modules():
        forward: Any = getattr(m.forward, "__func__", m.forward)
        while forward is not None:
            yield str(getattr(forward, "__globals__", {}).get("__name__", ""))
            forward = getattr(forward, "__wrapped__", None)


@cache
def _may_be_read(argument: str, homes: frozenset[str]) -> bool:
    """Whether the word stands in the code of these modules, comments included, or of what that has from its package."""
    names = {name for name in homes if name.split(".")[0] not in _TORCH and _may_read(name, name.split(".")[0])}
    seen: set[str] = set()
    while names - seen:
        name = (names - seen).pop()
        seen.add(name)
        words, imported = _code(name)
        if words is None or argument in words:
            return True
        names |= imported
    return False


@cache
def _code(name: str) -> tuple[frozenset[str] | None, frozenset[str]]:
    """Words of a Python module (``None``: it has no source), and the modules of its package that it has names from."""
    try:
        module = sys.modules[name]
        words = frozenset(re.findall(r"\w+", inspect.getsource(module)))
    except (KeyError, OSError, TypeError):
        return None, frozenset()
    package = name.split(".")[0]
    parts = {_home(value) for value in vars(module).values()}
    return words, frozenset(part for part in parts if part in sys.modules and _may_read(part, package))


def _may_read(part: str, package: str) -> bool:
    """Whether arguments may be handed to code there: in the same package, and not among its utilities."""
    return part.split(".")[0] == package and "utils" not in part.split(".")


def _home(value: Any) -> str:
    if isinstance(value, ModuleType):
        return value.__name__
    return str(getattr(value, "__module__", None) or type(value).__module__)
