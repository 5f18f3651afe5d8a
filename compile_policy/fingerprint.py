"""Identity of the structure behind a region: what a graph takes for granted about the module itself.

Covered: the module tree and its classes, a ``forward`` set on an instance, hooks, training flags, plain Python
attributes that a forward may read (numbers, strings, flags, functions such as activations), and the identity, dtype
and device of every parameter and buffer. Two equal fingerprints trace to the same graph with the same bound tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_OWN = frozenset(torch.nn.Module().__dict__) | {"_compiled_call_impl"}


class Fingerprint:
    """Remembers the fingerprint of a module and looks again when asked.

    The full walk costs microseconds per sub-module, so it is done where a sequence starts and not once a token.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._known: dict[tuple[Any, ...], int] = {}
        self._current: int | None = None

    def current(self, *, look_again: bool) -> int:
        """A small number that stands for the structure; another structure has another number."""
        if self._current is None or look_again:
            structure = fingerprint(self._module)
            self._current = self._known.setdefault(structure, len(self._known))
        return self._current

    def difference(self, was: int, now: int) -> str:
        """The first place in which two structures differ, in words."""
        by_number = {number: structure for structure, number in self._known.items()}
        return difference(by_number[was], by_number[now])


def fingerprint(module: torch.nn.Module) -> tuple[Any, ...]:
    """The structure of ``module`` and everything below it as nested tuples."""
    return tuple((name, _one(m)) for name, m in module.named_modules(remove_duplicate=False))


def difference(was: tuple[Any, ...], now: tuple[Any, ...]) -> str:
    """The first module, and what about it, in which two fingerprints differ."""
    parts = ("class", "training flag", "hooks", "attribute", "parameter or buffer")
    for (name, before), (_, after) in zip(was, now, strict=False):
        for part, x, y in zip(parts, before, after, strict=True):
            if x == y:
                continue
            if part == "attribute":
                old, new = dict(x), dict(y)
                changed = next((n for n in {**old, **new} if old.get(n) != new.get(n)), "")
                return f"attribute {changed!r} of {name or 'the component'}"
            return f"{part} of {name or 'the component'}"
    return f"the module tree ({len(was)} modules, now {len(now)})"


def _one(m: torch.nn.Module) -> tuple[Any, ...]:
    own = m.__dict__
    attributes = tuple((n, _value(v)) for n, v in own.items() if n not in _OWN)
    hooks = tuple(id(h) for kind in _HOOKS for h in own[kind].values())
    tensors = tuple(_tensor(t) for group in ("_parameters", "_buffers") for t in own[group].values())
    return (type(m), own["training"], hooks, attributes, tensors)


def _tensor(t: torch.Tensor | None) -> tuple[Any, ...] | None:
    return None if t is None else (id(t), t.dtype, t.device, tuple(t.shape), t.requires_grad)


def _value(value: Any, depth: int = 0) -> Hashable:
    """Hashable stand-in for an attribute: by value where it is plain, else by identity."""
    if isinstance(value, _PLAIN):
        return (value.__class__, value)
    if isinstance(value, (list, tuple, set, frozenset)) and depth < 3:
        return (value.__class__, tuple(_value(v, depth + 1) for v in value))
    if isinstance(value, Mapping) and depth < 3:
        return (value.__class__, tuple((str(k), _value(v, depth + 1)) for k, v in value.items()))
    return (value.__class__, id(value))
