"""A call and the sizes of a graph in words: which dims vary, what is part of the key, what a graph assumes of sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import sympy

from compile_policy.call_key import Call

_PLACE = re.compile(r"s\[(\d+)\]\[(\d+)\]")
_NUMBER = re.compile(r"\[(\d+)\]")
_MODES = ("grad mode", "inference mode", "training flag", "autocast")
_SPLIT = re.compile(r"^\((.*) (==|!=|<=|>=|<|>) (.*)\)$|^(.*) (==|!=|<=|>=|<|>) (.*)$")


def dynamic_dims(call: Call) -> dict[str, tuple[str, ...]]:
    """label -> the dims that have it, as ``argument dim``; tensors that differ in a number only are one."""
    places: dict[str, list[tuple[str, int]]] = {}
    for path, labels in zip(call.paths, call.labels, strict=True):
        for dim, label in enumerate(labels):
            if label is not None:
                places.setdefault(label, []).append((path, dim))
    return {label: tuple(_together(found)) for label, found in places.items()}


def _together(places: Sequence[tuple[str, int]]) -> list[str]:
    """``layers[0].keys``, ``layers[1].keys``, ``layers[2].keys`` as ``layers[0-2].keys``."""
    groups: dict[tuple[str, int], list[int]] = {}
    for path, dim in places:
        numbers = _NUMBER.findall(path)
        shape = _NUMBER.sub("[#]", path) if len(numbers) == 1 else path
        groups.setdefault((shape, dim), []).extend(map(int, numbers) if len(numbers) == 1 else [])
    return [f"{shape.replace('[#]', f'[{_spans(found)}]')} dim {dim}" for (shape, dim), found in groups.items()]


def _spans(numbers: Sequence[int]) -> str:
    first, last = numbers[0] if numbers else 0, numbers[-1] if numbers else 0
    if list(numbers) == list(range(first, last + 1)):
        return str(first) if first == last else f"{first}-{last}"
    return ", ".join(map(str, numbers))


def argument_sizes(call: Call) -> dict[str, list[int | str]]:
    """Tensor -> its sizes: a number where it is part of the call key, a label where it varies.

    Tensors of equal sizes that differ in a number only are one; ``*`` is a size with a name of its own.
    """
    found: dict[tuple[str, tuple[int | str, ...]], list[int]] = {}
    for path, labels, metadata in zip(call.paths, call.labels, call.key[1], strict=True):
        pairs = zip(labels, metadata[2], strict=True)
        sizes = tuple(n if m is None else "*" if m == f"{path}.{dim}" else m for dim, (m, n) in enumerate(pairs))
        numbers = _NUMBER.findall(path)
        shape = _NUMBER.sub("[#]", path) if len(numbers) == 1 else path
        found.setdefault((shape, sizes), []).extend(map(int, numbers) if len(numbers) == 1 else [])
    return {shape.replace("[#]", f"[{_spans(numbers)}]"): list(sizes) for (shape, sizes), numbers in found.items()}


def modes_of(call: Call) -> dict[str, Any]:
    """Modes of the process in the call key, by name; empty for a call that was never made."""
    if len(call.key) < 3:
        return {}
    modes, ambient = call.key[2], [pair for pairs in call.key[4:] for pair in pairs]
    named = {**dict(zip(_MODES, modes, strict=False)), **dict(ambient)}
    return {name: value if isinstance(value, (bool, str)) else _spelled(value) for name, value in named.items()}


def _spelled(value: Any) -> str:
    return "off" if value == () else str(value).removeprefix("torch.")


def constants_of(call: Call) -> dict[str, str]:
    """Arguments that are constants of the graph, as written; what an adapter carries by its kind."""
    found: dict[str, str] = {}
    for name, spec in call.spec:
        text = spelled(spec)
        if text != "tensor":
            found[name] = text
    return found


def spelled(spec: Any) -> str:
    """One argument's part of the key, short."""
    kind = spec[0]
    if kind == "const":
        return str(spec[2].__name__ if isinstance(spec[2], type) else repr(spec[2]))
    if kind in ("list", "tuple"):
        inside = list(dict.fromkeys(map(spelled, spec[1])))
        return f"{len(spec[1])} x {inside[0]}" if len(inside) == 1 else f"({', '.join(inside)})"
    if kind == "dict":
        inside = list(dict.fromkeys(spelled(s) for _, s in spec[1]))
        return "tensor" if inside == ["tensor"] else "{" + ", ".join(f"{k}: {spelled(s)}" for k, s in spec[1]) + "}"
    if kind == "adapted":
        cls = spec[2][0] if isinstance(spec[2], tuple) and spec[2] and isinstance(spec[2][0], type) else spec[1]
        return cls.__name__
    if kind == "unread":
        return f"any {spec[1].__name__}"
    return str(spec[1].__name__ if kind in ("data", "node") else kind)


def conditions_in_words(call: Call, conditions: Sequence[str]) -> list[str]:
    """What a graph assumes about sizes beyond what its labels and its key say already.

    Args:
        call: the entry's call, whose leaves the conditions speak of.
        conditions: of `ShapeConditions`.
    """
    symbols: dict[str, sympy.Symbol] = {}
    sizes = [
        [_size(label, size, path, dim, symbols) for dim, (label, size) in enumerate(zip(labels, key[2], strict=True))]
        for path, labels, key in zip(call.paths, call.labels, call.key[1], strict=True)
    ]
    names = {"s": sizes, "Max": sympy.Max, "Min": sympy.Min, "max": sympy.Max, "min": sympy.Min, "floor": sympy.floor}
    return list(dict.fromkeys(said for c in conditions if (said := _said(c, call, names))))


def _size(label: str | None, size: int, path: str, dim: int, symbols: dict[str, sympy.Symbol]) -> Any:
    """A size as an expression of labels; ``past+sequence`` is the sum of two."""
    if label is None:
        return sympy.Integer(size)
    parts = [symbols.setdefault(p, sympy.Symbol(_symbol(p), integer=True, nonnegative=True)) for p in label.split("+")]
    return sympy.Add(*parts)


def _symbol(label: str) -> str:
    found = re.fullmatch(r"(.*)\.(\d+)", label)
    return f"{found[1]}.shape[{found[2]}]" if found else label


def _said(condition: str, call: Call, names: dict[str, Any]) -> str:
    """One condition in words; empty when labels and key say it already."""
    found = _SPLIT.match(condition)
    try:
        assert found is not None
        left, relation, right = [part for part in found.groups() if part is not None]
        a, b = (sympy.sympify(eval(side, {"__builtins__": {}}, names)) for side in (left, right))
    except Exception:  # an expression beyond ours: as the graph has it, with the names of its tensors
        return _PLACE.sub(lambda m: f"{call.paths[int(m[1])]}.shape[{m[2]}]", condition)
    if relation == "==":
        if sympy.simplify(a - b) == 0:
            return ""
        rest = a.as_coeff_Mul()[1]
        if isinstance(rest, sympy.Mod) and b == 0:
            return f"{rest.args[0]} is a multiple of {rest.args[1]}"
        return f"{a} is {b}"
    if getattr(sympy, "Rel")(a, b, relation) == sympy.true:  # noqa: B009
        return ""
    if relation == "!=" and isinstance(a, sympy.Mod) and b == 0:
        return f"{a.args[0]} is no multiple of {a.args[1]}"
    said = {"!=": "is not", "<=": "is at most", ">=": "is at least", "<": "is less than", ">": "is more than"}
    return f"{a} {said[relation]} {b}"
