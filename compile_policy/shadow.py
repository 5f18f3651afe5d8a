"""Stand-ins for a component that share all of its parts but one list of layers.

A stand-in is a shallow copy along the way to the list: parameters, sub-modules and attributes are the component's own.
So a component can be run and traced with fewer layers while other threads use it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, TypeVar

import torch

from compile_policy.tensors import OWN_ATTRIBUTES

M = TypeVar("M", bound=torch.nn.Module)
_FEWEST = 4  # layers that a list needs to be worth the trouble


def layer_list(module: torch.nn.Module) -> str | None:
    """Path of the longest list of layers that stands in no other list; ``None`` if there is none worth shortening."""
    found: dict[str, int] = {}
    for path, part in module.named_modules():
        inside = any(path.startswith(f"{other}.") for other in found)
        if isinstance(part, torch.nn.ModuleList) and not inside and len(set(part)) == len(part) >= _FEWEST:
            found[path] = len(part)
    return max(found, key=lambda path: found[path], default=None)


def with_layers(module: torch.nn.Module, path: str, layers: Sequence[torch.nn.Module]) -> torch.nn.Module:
    """A stand-in for ``module`` whose list at ``path`` holds these layers."""
    root = at = _copied(module)
    for name in path.split("."):
        below = _copied(at.get_submodule(name))
        at._modules[name] = below
        at = below
    at._modules.clear()
    at._modules.update({str(i): layer for i, layer in enumerate(layers)})
    return root


def announced(layer: M, before: Callable[[], None], after: Callable[[], None]) -> M:
    """A stand-in for ``layer`` that tells when its forward starts and ends."""
    copy = _copied(layer)
    forward = copy.forward

    def announced_forward(*args: Any, **kwargs: Any) -> Any:
        before()
        result = forward(*args, **kwargs)
        after()
        return result

    copy.__dict__["forward"] = announced_forward
    return copy


def different_layers(layers: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """The first of each kind of layer: same classes, same functions, same attributes but for whole numbers."""
    first: dict[Any, torch.nn.Module] = {}
    for layer in layers:
        first.setdefault(tuple([_looks(m) for m in layer.modules()]), layer)
    return list(first.values())


def _looks(module: torch.nn.Module) -> tuple[Any, ...]:
    own = [(name, _look(value)) for name, value in module.__dict__.items() if name not in OWN_ATTRIBUTES]
    return (type(module), module.training, tuple(module._modules), tuple(own))


def _look(value: Any) -> Any:
    if isinstance(value, (str, bool, float, type(None))):
        return value
    function = getattr(value, "__func__", value)
    return getattr(function, "__code__", type(value))


def _copied(module: M) -> M:
    copy: M = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__["_modules"] = dict(module._modules)
    copy.__dict__.pop("_compiled_call_impl", None)
    forward = copy.__dict__.get("forward")
    if isinstance(forward, MethodType) and forward.__self__ is module:  # a method of this instance alone
        copy.__dict__["forward"] = MethodType(forward.__func__, copy)
    return copy
