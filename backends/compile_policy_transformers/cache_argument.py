"""Which argument is a cache: told by its value or its annotation, and by its name only where neither exists."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, get_args

from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from compile_policy_transformers.releases import CACHE_NAMES

_CACHE_CLASS = re.compile(r"\b\w*Cache\b")


@cache
def cache_parameter(function: Callable[..., Any]) -> str | None:
    """Name of the parameter of ``function`` that takes a cache, or ``None``.

    A name of `releases.CACHE_NAMES` wins over other parameters that are annotated with a cache class, because a
    decoder may take a second cache beside its own.
    """
    parameters = inspect.signature(function).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    for name, parameter in parameters.items():
        if _names_a_cache(parameter.annotation):
            return name
    return None


#: What this release calls the argument.
CACHE = cache_parameter(create_causal_mask) or CACHE_NAMES[0]


@cache
def cache_name(function: Callable[..., Any]) -> str:
    """`cache_parameter`, or the name that this release uses for a function that hands its keywords on."""
    return cache_parameter(function) or CACHE


def cache_in(values: Mapping[str, Any]) -> Cache | None:
    """The first cache among the arguments of a call."""
    for value in values.values():
        if isinstance(value, Cache):
            return value
    return None


def name_cache(values: dict[str, Any], name: str, parameters: Mapping[str, Any]) -> None:
    """Move a cache that was given under another name to ``name``: a deprecated one, or one of two that a forward takes.

    Args:
        values: arguments of a call by name, changed in place.
        parameters: of the function that is called.
    """
    for given in list(values):
        if given == name:
            continue
        is_deprecated = given not in parameters and isinstance(values[given], Cache)
        if given in CACHE_NAMES or is_deprecated:
            moved = values.pop(given)
            if values.get(name) is None:
                values[name] = moved


def _names_a_cache(annotation: Any) -> bool:
    if isinstance(annotation, str):
        return _CACHE_CLASS.search(annotation) is not None
    if isinstance(annotation, type):
        return issubclass(annotation, Cache)
    return any(map(_names_a_cache, get_args(annotation)))
