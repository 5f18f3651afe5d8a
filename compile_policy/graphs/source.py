"""The line of the model that an operation of a captured graph comes from."""

from __future__ import annotations

import linecache
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

import compile_policy
from compile_policy.graphs.values import Value

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
        caller: the model's line that called this function, ``file:line: code``; empty where there is none.
    """

    file: str
    line: int
    function: str
    code: str
    caller: str = ""

    @property
    def place(self) -> str:
        """File without its folders, and line."""
        return f"{os.path.basename(self.file)}:{self.line}"


@dataclass(frozen=True)
class Op:
    """One operation of a captured graph.

    Attributes:
        name: of its result.
        op: what it does, by the name that people know.
        shape: sizes of the result as text, ``None`` for what is no tensor.
        module: path below the component.
        source: the line of the model that asks for it.
        dtype: as torch abbreviates it, such as ``f32``.
        inputs: names of operations and inputs of the graph that it reads.
    """

    name: str
    op: str
    shape: list[str] | None
    module: str
    source: Source | None
    dtype: str = ""
    inputs: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def ops_of(records: Sequence[dict[str, Any]], values: Mapping[str, Value]) -> list[Op]:
    """Operations from what capture noted about each (`CompiledGraph.sources`) and from the printed graph."""
    return [_op(record, values.get(record["name"], Value(record["name"]))) for record in records]


def _op(record: dict[str, Any], value: Value) -> Op:
    source = model_source(record.get("stack", ""))
    module = module_path(record.get("module"))
    return Op(value.name, op_name(record["op"]), record.get("shape"), module, source, value.dtype, value.inputs)


def module_path(name: Any) -> str:
    """A module as ``named_modules`` calls it, from how the traced function reaches it."""
    return _FORWARD.sub("", str(name or ""))


def op_name(target: str) -> str:
    """An operation by the name that people know, without addresses."""
    for pattern, name in _NAMES:
        if pattern.fullmatch(target):
            return pattern.sub(name, target)
    return re.sub(r" at 0x[0-9a-f]+", "", target)


def model_source(stack: str) -> Source | None:
    """The innermost line of a stack that belongs to the model, or the innermost at all."""
    frames = _model_frames(stack)
    if not frames:
        return None
    frame = frames[-1]
    caller = _said(frames[-2]) if len(frames) > 1 else ""
    return Source(short_path(frame["file"]), int(frame["line"]), frame["function"], frame["code"].strip(), caller)


def _said(frame: re.Match[str]) -> str:
    return f"{os.path.basename(frame['file'])}:{frame['line']}: {frame['code'].strip()}"


@lru_cache(maxsize=4096)
def _model_frames(stack: str) -> list[re.Match[str]]:
    frames = list(_FRAME.finditer(stack))
    own = [f for f in frames if not f["file"].startswith(_NOT_THE_MODEL) and _OUR_BACKENDS not in f["file"]]
    return own or frames[-1:]


def surroundings(records: Sequence[dict[str, Any]], reach: int = 4) -> dict[str, dict[int, str]]:
    """File -> line -> text, of the model's lines and ``reach`` lines before and after each; blank lines are left out.

    A file that cannot be read, because it is a notebook's or was made while the program ran, is left out.
    """
    found: dict[str, dict[int, str]] = {}
    for stack in dict.fromkeys(str(record.get("stack", "")) for record in records):
        if not (frames := _model_frames(stack)):
            continue
        frame = frames[-1]
        lines = linecache.getlines(frame["file"])
        here = found.setdefault(short_path(frame["file"]), {})
        for number in range(max(1, int(frame["line"]) - reach), int(frame["line"]) + reach + 1):
            if number <= len(lines) and lines[number - 1].strip():
                here[number] = lines[number - 1].rstrip()
    return {file: dict(sorted(lines.items())) for file, lines in found.items() if lines}


def short_path(file: str) -> str:
    """A path without the folder that ``import`` finds it in."""
    roots = [os.path.abspath(p) + os.sep for p in sys.path if p]
    found = [root for root in roots if file.startswith(root)]
    return file[len(max(found, key=len)) :] if found else file
