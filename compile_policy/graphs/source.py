"""The line of the model that an operation of a captured graph comes from."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

import compile_policy

_FRAME = re.compile(r'^\s*File "(?P<file>[^"\n]*)", line (?P<line>\d+), in (?P<function>.*)\n\s*(?P<code>.*)', re.M)
_NAMES = (
    (re.compile(r"<built-in method (\w+) of type object at 0x[0-9a-f]+>"), r"torch.\1"),
    (re.compile(r"<built-in (?:function|method) ([\w.]+)(?: of .*)?>"), r"\1"),
    (re.compile(r"<(?:function|class) '?([\w.]+)'?(?: at 0x[0-9a-f]+)?>"), r"\1"),
)
_FORWARD = re.compile(r"^[GL]\['forward'\]\.__self__\.?")
# Frames inside these say how an operation is implemented, not what the model asked for.
_NOT_THE_MODEL = tuple(os.path.dirname(os.path.abspath(str(m.__file__))) + os.sep for m in (torch, compile_policy))
_OUR_BACKENDS = f"{os.sep}compile_policy_"


@dataclass(frozen=True)
class Source:
    """A line of the model.

    Attributes:
        file: as short as ``import`` would find it.
        line: its number.
        function: the function that it stands in.
        code: the line itself.
    """

    file: str
    line: int
    function: str
    code: str

    @property
    def place(self) -> str:
        """File without its folders, and line."""
        return f"{os.path.basename(self.file)}:{self.line}"


@dataclass(frozen=True)
class Op:
    """One operation of a captured graph."""

    name: str
    op: str
    shape: list[str] | None
    module: str
    source: Source | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def ops_of(records: Sequence[dict[str, Any]]) -> list[Op]:
    """Operations from what capture noted about each (`CompiledGraph.sources`)."""
    return [
        Op(r["name"], op_name(r["op"]), r.get("shape"), module_path(r.get("module")), model_source(r.get("stack", "")))
        for r in records
    ]


def module_path(name: Any) -> str:
    """A module as ``named_modules`` calls it, from how the traced function reaches it."""
    return _FORWARD.sub("", str(name or ""))


def op_name(target: str) -> str:
    """An operation by the name that people know, without addresses."""
    for pattern, name in _NAMES:
        if pattern.fullmatch(target):
            return pattern.sub(name, target)
    return re.sub(r" at 0x[0-9a-f]+", "", target)


@lru_cache(maxsize=4096)
def model_source(stack: str) -> Source | None:
    """The innermost line of a stack that belongs to the model, or the innermost at all."""
    frames = list(_FRAME.finditer(stack))
    if not frames:
        return None
    own = [f for f in frames if not f["file"].startswith(_NOT_THE_MODEL) and _OUR_BACKENDS not in f["file"]]
    frame = (own or frames)[-1]
    return Source(short_path(frame["file"]), int(frame["line"]), frame["function"], frame["code"].strip())


def short_path(file: str) -> str:
    """A path without the folder that ``import`` finds it in."""
    roots = [os.path.abspath(p) + os.sep for p in sys.path if p]
    found = [root for root in roots if file.startswith(root)]
    return file[len(max(found, key=len)) :] if found else file
