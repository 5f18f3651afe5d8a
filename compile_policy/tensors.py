"""The one list of a module's tensors, and the one definition of what an attribute holds.

A tensor belongs to a module when it is a parameter, a buffer, or can be reached from an attribute through lists,
tuples, sets, dicts, plain objects, dataclasses, and functions with what they close over (a ``forward`` replaced on the
instance). Whoever asks which tensors a module has asks here: binding, trial runs, saved entries.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch

#: What every module has, and the hook through which calls are routed.
OWN_ATTRIBUTES = frozenset(torch.nn.Module().__dict__) | {"_compiled_call_impl"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
#: Packages whose objects hold machinery, not state of a model.
_MACHINERY = ("torch", "compile_policy", "accelerate", "threading", "_thread", "logging", "weakref", "concurrent")
_DEPTH = 12
_CLOSURE = (types.FunctionType, types.MethodType, functools.partial)


def parts_of(value: Any) -> Iterator[tuple[str, Any]]:
    """What ``value`` holds, each with how it is written behind the name of ``value``; nothing for plain values.

    Modules, classes, tensors and Python modules are not opened: who meets one decides.
    """
    if isinstance(value, (*_PLAIN, torch.Tensor, torch.nn.Module, type, types.ModuleType)):
        return
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", item) for key, item in list(value.items()))
    elif isinstance(value, (list, tuple, set, frozenset)) or _is_deque(value):
        yield from ((f"[{i}]", item) for i, item in enumerate(list(value)))
    if isinstance(value, _CLOSURE):
        yield from _parts_of_callable(value)
    elif not is_machinery(type(value)):
        yield from _attributes(value)


def tensors_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(place, tensor) of everything that belongs to ``module``; a tensor that stands in several places comes again."""
    known = set(map(id, module.modules()))
    for path, m in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for group in (m._parameters, m._buffers):
            yield from ((prefix + name, t) for name, t in sorted(group.items()) if t is not None)
        for name in sorted(m.__dict__.keys() - OWN_ATTRIBUTES):
            yield from _tensors_in(m.__dict__[name], prefix + name, set(known))


def attribute_tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    """Plain tensors of the module that are neither parameters nor buffers, each once."""
    registered = {id(t) for t in (*module.parameters(), *module.buffers())}
    found = {id(t): t for _, t in tensors_of(module) if type(t) is torch.Tensor and id(t) not in registered}
    return list(found.values())


def is_machinery(cls: type) -> bool:
    """Whether objects of the class are no state of a model: locks, loggers, hooks of a library."""
    root = str(getattr(cls, "__module__", "")).split(".")[0]
    return root in _MACHINERY or root.startswith("compile_policy")


def _tensors_in(value: Any, place: str, seen: set[int], depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield place, value
        return
    if isinstance(value, _PLAIN) or depth > _DEPTH or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.nn.Module):  # kept beside the tree of modules
        yield from ((f"{place}.{name}", t) for name, t in tensors_of(value))
        return
    for step, item in parts_of(value):
        yield from _tensors_in(item, place + step, seen, depth + 1)


def _parts_of_callable(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, types.MethodType):
        yield ".__func__", value.__func__
        yield ".__self__", value.__self__
    elif isinstance(value, functools.partial):
        yield ".func", value.func
        yield ".args", value.args
        yield ".keywords", value.keywords
    else:
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            yield f"<{name}>", cell_contents(cell)
        yield ".__defaults__", value.__defaults__
        yield ".__kwdefaults__", value.__kwdefaults__
        yield from ((f".{name}", item) for name, item in list(vars(value).items()))


def cell_contents(cell: Any) -> Any:
    """What a closure's cell holds; ``None`` for an empty one."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def slots_of(value: Any) -> list[str]:
    """Names of an object's attributes that are not in its ``__dict__``."""
    found: list[str] = []
    for cls in type(value).__mro__:
        own = cls.__dict__.get("__slots__", ())
        found += [own] if isinstance(own, str) else list(own)
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict):
        yield from ((f".{name}", item) for name, item in list(own.items()))
    for name in slots_of(value):
        try:
            yield f".{name}", getattr(value, name)
        except Exception:  # an empty slot, or one that is computed and fails
            continue


def _is_deque(value: Any) -> bool:
    cls = type(value)
    return cls.__module__ == "collections" and cls.__name__ == "deque"
