"""What stood in the way of a compile: the model's own line, the cause in plain words, and what would change it.

Exceptions of Dynamo are read here and nowhere else. Only text is kept: an exception holds on to frames, and frames
to tensors.
"""

from __future__ import annotations

import inspect
import linecache
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_REPLACE = "replace {where} by a subclass that does without (compile_policy.layers.override, replace_layers_)"
_BRANCHLESS = f"Write it with torch.where or masks over all elements, or {_REPLACE}."
_UNTRACEABLE = "Keep {name} out of forward, or behind `if not torch.compiler.is_compiling()`, or " + _REPLACE + "."
_FAKE = "Register a fake for it: torch.library.register_fake('{name}')."
_CLASS = re.compile(r"(\s*)class (\w+)")
_KEYWORD = re.compile(r"((?:for|if|elif|while|assert)(?= )|)")
_CALLED = re.compile(r"Explanation: Dynamo does not know how to trace [^`]*`([\w.]+)(?:` of class `(\w+))?")
_NO_FAKE = re.compile(r"unsupported operator: ([\w.]+)")
_NODE = re.compile(
    r"call_\w+ (?:<[^>]*?([\w.]+)(?: of type object at 0x\w+| at 0x\w+)?>|([\w.]+))\(.*got \w+\(['\"](.*)['\"]"
)
_HINT = re.compile(r"^\s*Hint: (.*)$", re.M)
_helpers: set[str] = set()  # names of Python packages
_known: dict[str, tuple[str, str]] = {}  # operation -> (cause, remedy)
_readers: list[Callable[[BaseException, Any], tuple[str, str] | None]] = []


def helpers_of_models(package: str) -> None:
    """Declare that the lines of a Python package are no model's own: who calls it is named instead, where known."""
    _helpers.add(package)


def known_cause(op: str, cause: str, remedy: str) -> None:
    """Declare what it means that ``op`` cannot be traced, where a library has a reason of its own."""
    _known[op] = cause, remedy


def explained_by(reader: Callable[[BaseException, Any], tuple[str, str] | None]) -> None:
    """Declare what reads an exception of a compile, given the component too: (cause, remedy), or ``None``."""
    _readers.append(reader)


def explanation_of(error: BaseException, module: Any) -> tuple[str, str] | None:
    """(cause, remedy) where a library knows what in ``module`` an exception comes from."""
    for reader in _readers:
        found = reader(error, module)
        if found is not None:
            return found
    return None


@dataclass(frozen=True)
class Failure:
    """Why something runs eager.

    Attributes:
        error: class of the exception; empty when there was none.
        file, line, function, code: the innermost line of the model, where it is known.
        cls: the class that the line stands in.
        op: the operation or function that it was about, where it is known.
        cause: what is the matter, in a sentence.
        remedy: what would change it.
        data_dependent: whether Python control flow depends on the values of a tensor.
    """

    error: str = ""
    file: str = ""
    line: int = 0
    function: str = ""
    code: str = ""
    cls: str = ""
    op: str = ""
    cause: str = ""
    remedy: str = ""
    data_dependent: bool = False

    @property
    def place(self) -> str:
        """File without its folders, and line; empty when unknown."""
        return f"{os.path.basename(self.file)}:{self.line}" if self.file else ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def data(self) -> dict[str, Any]:
        """What an event carries of it."""
        known = {"error": self.error, "file": self.file, "line": self.line, "code": self.code}
        return {name: value for name, value in known.items() if value}


def failure_of(error: BaseException) -> Failure:
    """Read an exception, or the one that it was raised from."""
    cause = error.__cause__ or error
    frame = _model_frame(cause)
    cls = "" if frame is None else _class_at(frame.filename, frame.lineno or 0)
    place: dict[str, Any] = {}
    if frame is not None:
        place = {"file": frame.filename, "line": frame.lineno or 0, "function": frame.name, "cls": cls}
        place["code"] = (frame.line or "").strip()
    text = str(cause)
    told, remedy, op = _read(cause, text, place.get("code", ""), cls)
    remedy = str(getattr(error, "remedy", "")) or remedy
    name = type(cause).__name__ if cause is not error else ""
    return Failure(name, op=op, cause=told, remedy=remedy, data_dependent=_data_dependent(cause, text), **place)


def _read(cause: BaseException, text: str, code: str, cls: str) -> tuple[str, str, str]:
    """(cause, remedy, operation) of an exception."""
    where = cls or "the module"
    if _data_dependent(cause, text):
        return _decision(code), _BRANCHLESS.format(where=where), _KEYWORD.match(code + " ")[1]  # type: ignore[index]
    called = _CALLED.search(text)
    if called is not None:
        name = ".".join(part for part in (called[2], called[1].rstrip(".")) if part)
        if name in _known:
            return *_known[name], name
        return f"{name} cannot be traced", _UNTRACEABLE.format(name=name, where=where), name
    operator = _NO_FAKE.search(text)
    if operator is not None:
        name = operator[1].removesuffix(".default")
        return f"the operator {name} does not say what its result looks like", _FAKE.format(name=name), name
    node = _NODE.search(text)
    if node is not None:
        return f"{node[1] or node[2]} fails on the traced sizes: {node[3]}"[:300], "", node[1] or node[2]
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(cause).__name__)
    hints = [hint for hint in _HINT.findall(text) if "issue" not in hint]
    return first[:300], hints[0] if hints else "", ""


def _decision(code: str) -> str:
    if code.startswith("for "):
        return "a loop runs as often as the values of a tensor say"
    if code.startswith(("if ", "elif ", "while ", "assert ")):
        return f"the {code.split()[0]} depends on the values of a tensor"
    return "Python needs a number that only the values of a tensor tell"


def _data_dependent(cause: BaseException, text: str) -> bool:
    kind = str(getattr(cause, "gb_type", "") or "")
    return "ata-dependent" in kind or "data-dependent" in text.partition("\n")[0]


def _model_frame(cause: BaseException) -> traceback.FrameSummary | None:
    """The innermost frame that belongs neither to torch nor to this package, nor, if possible, to a helper."""
    stack: Sequence[traceback.FrameSummary] = getattr(cause, "real_stack", None) or traceback.extract_tb(
        cause.__traceback__
    )
    ours, helpers = tuple(_own_folders()), tuple(_folders(_helpers))
    there = [f for f in reversed(stack) if f.line and not os.path.abspath(f.filename).startswith(ours)]
    return next((f for f in there if not os.path.abspath(f.filename).startswith(helpers)), there[0] if there else None)


def of_this_package(error: BaseException) -> bool:
    """Whether an exception is a mistake of this package or its backends: raised by their own code, and not by torch,
    the model or the system.
    """
    place = error.__traceback__
    if place is None or isinstance(error, (OSError, MemoryError)) or type(error).__module__.startswith("torch"):
        return False
    while place.tb_next is not None:
        place = place.tb_next
    file = os.path.abspath(place.tb_frame.f_code.co_filename)
    return file.startswith(tuple(_policy_folders()))


def _policy_folders() -> Iterator[str]:
    """Folders of this package and of its backends."""
    return _folders([n for n in list(sys.modules) if n.partition(".")[0] == n and n.startswith("compile_policy")])


def _own_folders() -> Iterator[str]:
    """Folders of torch, of this package and of its backends."""
    yield from _folders(("torch",))
    yield from _policy_folders()


def _folders(packages: Iterable[str]) -> Iterator[str]:
    for name in packages:
        for folder in getattr(sys.modules.get(name), "__path__", ()):
            yield os.path.abspath(folder) + os.sep


def place_in(function: Callable[..., Any], text: str, *, last: bool = False) -> str:
    """Place (file without its folders, and line) of the first or last line of ``function`` that contains ``text``.

    Returns:
        Where the function begins, if none does; an empty string, if its source is not there.
    """
    try:
        function = inspect.unwrap(function)
        lines, first = inspect.getsourcelines(function)
        file = os.path.basename(inspect.getsourcefile(function) or "")
    except (OSError, TypeError):
        return ""
    found = [i for i, line in enumerate(lines) if text in line]
    begins = next((i for i, line in enumerate(lines) if line.lstrip().startswith("def ")), 0)
    return f"{file}:{first + (found[-1 if last else 0] if found else begins)}"


def _class_at(file: str, line: int) -> str:
    """The class that a line stands in, from the text of its file."""
    lines = linecache.getlines(file)[:line]
    if not lines:
        return ""
    indent = len(lines[-1]) - len(lines[-1].lstrip())
    for text in reversed(lines):
        found = _CLASS.match(text)
        if found is not None and len(found[1]) < indent:
            return found[2]
    return ""
