"""The values of a graph that torch has printed: what each is, and of what it is made."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_PARAMETER = re.compile(r'(?P<name>\w+): "(?P<kind>[^"]*)"')
_ASSIGNED = re.compile(r'^ {8}(?P<name>\w+)(?:: "(?P<kind>[^"]*)")? = (?P<text>.*)$')
_FREED = re.compile(r";  (?:\w+ = )+None$")
_RETURNED = re.compile(r"^ {8}return (?P<text>.*)$")
_WORD = re.compile(r"(?<![.\w'\"])[A-Za-z_]\w*(?!\w|\s*=[^=])")
_TENSOR = re.compile(r"^(?P<dtype>\w+)\[(?P<shape>[^\]]*)\]")
RETURNED = "return"


@dataclass(frozen=True)
class Value:
    """One name of a printed graph.

    Attributes:
        dtype: as torch abbreviates it, such as ``f32``; empty for what is no tensor.
        shape: sizes as text, ``None`` for what is no tensor.
        inputs: the names that it is made of, in the order in which they are read; empty for an input of the graph.
        text: the right side of its line, such as ``torch.sigmoid(x)``; empty for an input of the graph.
    """

    name: str
    dtype: str = ""
    shape: tuple[str, ...] | None = None
    inputs: tuple[str, ...] = ()
    text: str = ""


def values_of(printed: str) -> dict[str, Value]:
    """Every value of a graph as ``print_readable`` writes it, by name, inputs first.

    What the graph returns is the value `RETURNED`, a word that no other value can have as its name.
    """
    values: dict[str, Value] = {}
    for value in _values(printed, values):
        values[value.name] = value
    return values


def _values(printed: str, known: dict[str, Value]) -> Iterator[Value]:
    for line in printed.splitlines():
        if (assigned := _ASSIGNED.match(line)) is not None:
            text = _FREED.sub("", assigned["text"])
            if text in known and not known[text].text:  # an input under its node's name
                yield Value(assigned["name"], known[text].dtype, known[text].shape)
            else:
                read = (word for word in _WORD.findall(text) if word in known)
                yield Value(assigned["name"], *_tensor(assigned["kind"]), tuple(dict.fromkeys(read)), text)
        elif (returned := _RETURNED.match(line)) is not None:
            read = (word for word in _WORD.findall(returned["text"]) if word in known)
            yield Value(RETURNED, inputs=tuple(dict.fromkeys(read)), text=returned["text"])
        elif line.startswith("    def forward(") or (line.startswith("        ") and _PARAMETER.match(line.strip())):
            for parameter in _PARAMETER.finditer(line):
                yield Value(parameter["name"], *_tensor(parameter["kind"]))


def _tensor(kind: str | None) -> tuple[str, tuple[str, ...] | None]:
    found = _TENSOR.match(kind or "")
    if found is None:
        return "", None
    return found["dtype"], tuple(size for size in found["shape"].split(", ") if size)
