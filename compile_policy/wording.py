"""Two looks at a structure, or at a call, that differ: what differs, and its two values, in words.

Works on the stand-ins that the walk of a fingerprint makes (``walk.py``): ``(class, value)`` for plain values, floats
by their text; ``(class, items)`` for containers; an identity; an identity, a class and attributes for objects; the
identities of a function and of its code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_LONGEST = 80
_ABSENT = ("absent",)
_TENSOR = ("", "object", "class", "dtype", "device", "shape", "strides", "requires_grad")


def change(name: str, was: Any, now: Any, of: str = "") -> str:
    """``'name' of is <now>, was <was>``, for the deepest place below ``name`` in which two stand-ins differ."""
    path, was, now = _deepest(was, now)
    before, after = described(was), described(now)
    if before == after:
        after = f"another {after}"
    return f"{f'{name}{path}'!r}{of} is {after}, was {before}"


def attribute_change(was: tuple[tuple[str, Any], ...], now: tuple[tuple[str, Any], ...], name: str, where: str) -> str:
    """The attribute ``name`` of a module in two looks at it."""
    return "attribute " + change(name, dict(was).get(name, _ABSENT), dict(now).get(name, _ABSENT), f" of {where}")


def class_change(was: tuple[Any, ...], now: tuple[Any, ...], where: str) -> str:
    """A module's class, or an attribute of it, in two looks: (bases, attributes)."""
    if was[0] != now[0]:
        return f"class of {where} is {_class_name(now[0])}, was {_class_name(was[0])}"
    for (name, old), (_, new) in zip(was[1], now[1], strict=False):
        if old != new:
            return "class attribute " + change(name, old, new, f" of {where}")
    return f"class attributes of {where}: {len(now[1])}, were {len(was[1])}"


def hook_change(was: tuple[Any, ...], now: tuple[Any, ...], where: str) -> str:
    """Hooks of a module in two looks: (kind, identity, flags)."""
    added = [f"{described(h[1])} added" for h in now if h not in was]
    removed = [f"{described(h[1])} removed" for h in was if h not in now]
    return f"hooks of {where}: {', '.join([*added, *removed]) or 'in another order'}"


def tensor_change(was: tuple[Any, ...], now: tuple[Any, ...], where: str) -> str:
    """Parameters and buffers of a module in two looks."""
    old, new = {t[0]: t[1:] for t in was}, {t[0]: t[1:] for t in now}
    name = next((n for n in {**old, **new} if old.get(n) != new.get(n)), "")
    said = f"parameter or buffer {name!r} of {where}"
    x, y = old.get(name, (None,)), new.get(name, (None,))
    if x[0] is None or y[0] is None:
        return f"{said} is {_presence(y)}, was {_presence(x)}"
    for part, a, b in list(zip(_TENSOR[1:], x, y, strict=False))[1:]:
        if a != b:
            return f"{part} of {said} is {_short(_plain(b))}, was {_short(_plain(a))}"
    return f"{said} is another tensor" if x[0] != y[0] else f"{said} holds other tensors"


def _presence(state: tuple[Any, ...]) -> str:
    return "absent" if state[0] is None else "a tensor"


def watched_change(name: str, was: Any, now: Any) -> str:
    """A value that is read again, in two looks; functions and other objects by their names."""
    before, after = _value(was), _value(now)
    return f"{name} is {f'another {after}' if before == after else after}, was {before}"


def _value(value: Any) -> str:
    plain = isinstance(value, (bool, int, float, complex, str, bytes, tuple, frozenset, type(None)))
    return _short(repr(value)) if plain else _object(value)


def described(stand: Any) -> str:
    """A stand-in in a few words."""
    if stand == _ABSENT:
        return "absent"
    of: Callable[[], Any] | None = getattr(stand, "_of", None)
    if of is not None:
        return _object(of())
    if isinstance(stand, tuple) and stand and getattr(stand[0], "_of", None) is not None:
        return f"a {stand[1].__name__}" if len(stand) == 3 else described(stand[0])  # an object, or a function
    if isinstance(stand, tuple) and len(stand) == 2 and isinstance(stand[0], type):
        kind, value = stand
        if issubclass(kind, (float, complex)):
            return str(value)
        if isinstance(value, (tuple, frozenset)) and not issubclass(kind, (str, bytes)):
            inside = ", ".join(map(_item, value))
            return _short(f"{kind.__name__}({inside})")
        return _short(repr(value))
    return _short(str(_plain(stand)))


def _item(stand: Any) -> str:
    if isinstance(stand, tuple) and len(stand) == 2 and isinstance(stand[0], str):
        return f"{stand[0]!r}: {described(stand[1])}"
    return described(stand)


def _object(value: Any) -> str:
    if value is None:
        return "something that is gone"
    name = getattr(value, "__qualname__", None)
    return _short(f"{name}" if isinstance(name, str) else f"a {type(value).__qualname__}")


def _plain(value: Any) -> Any:
    return value.__name__ if isinstance(value, type) else value


def _class_name(bases: Any) -> str:
    first = bases[0] if isinstance(bases, tuple) else bases
    return first.__qualname__ if isinstance(first, type) else described(first)


def _deepest(was: Any, now: Any) -> tuple[str, Any, Any]:
    """Path below two stand-ins to where they differ, and what is there."""
    both = isinstance(was, tuple) and isinstance(now, tuple)
    if both and len(was) == len(now) == 3 and was[0] == now[0] and getattr(was[0], "_of", None) is not None:
        return _below(dict(was[2]), dict(now[2]), lambda name: f".{name}")
    if both and len(was) == len(now) == 2 and was[0] is now[0] and isinstance(was[0], type):
        kind, old, new = was[0], was[1], now[1]
        if issubclass(kind, Mapping) and isinstance(old, tuple):
            return _below(dict(old), dict(new), lambda name: f"[{_key(name)}]")
        if issubclass(kind, (list, tuple)) and isinstance(old, tuple) and len(old) == len(new):
            return _below(dict(enumerate(old)), dict(enumerate(new)), lambda name: f"[{name}]")
    return "", was, now


def _below(old: dict[Any, Any], new: dict[Any, Any], step: Callable[[Any], str]) -> tuple[str, Any, Any]:
    for name in {**old, **new}:
        x, y = old.get(name, _ABSENT), new.get(name, _ABSENT)
        if x != y:
            path, was, now = _deepest(x, y)
            return step(name) + path, was, now
    return " in another order", tuple(old), tuple(new)


def _key(name: Any) -> str:
    return repr(name) if isinstance(name, str) else described(name)


def _short(text: Any) -> str:
    said = str(text)
    return said if len(said) <= _LONGEST else f"{said[: _LONGEST - 3]}..."
