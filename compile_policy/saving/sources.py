"""The model's code as an artifact knows it: text of every file that was traced, and the globals that code names.

A process that loads an artifact does not trace, so it cannot say which code the component would run; the process that
saved it noted that. Text is compared as text: an edited comment is a change.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import time
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from compile_policy.saving.stable import Stable, digest

#: Covered by their version; the policy's own sources by a digest of their own.
_COVERED = frozenset({"torch", "compile_policy"} | (sys.stdlib_module_names - {"__main__"}))
_TORCH = str(Path(torch.__file__).parent)
_STARTED = time.time()


class SourceChanged(Exception):
    """Code is another than when an artifact was made, or cannot be told; the message says which."""


def text_digest(module: str) -> str | None:
    """Digest of the file of a module; ``None`` when there is no file to read."""
    path = file_of(module)
    try:
        return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:24]
    except OSError:
        return None


def file_of(module: str) -> Path | None:
    """The file of a module, which need not have been imported."""
    found = sys.modules.get(module)
    try:
        file = getattr(found, "__file__", None) if found else getattr(importlib.util.find_spec(module), "origin", None)
    except (ImportError, ValueError):
        return None
    return None if file is None else Path(file)


def package_digest(package: str, leave_out: Iterable[str] = ()) -> str:
    """Digest of all Python files of a package, but for some of its sub-packages."""
    root = file_of(package)
    assert root is not None, package
    found = hashlib.sha256()
    for path in sorted(root.parent.rglob("*.py")):
        relative = path.relative_to(root.parent)
        if relative.parts[0] not in leave_out:
            found.update(f"{relative.as_posix()}\0".encode() + path.read_bytes())
    return found.hexdigest()[:24]


class TracedCode:
    """Code objects that a capture ran through, told apart by the modules that they are from.

    Raises:
        SourceChanged: code without a file, such as typed into a notebook, or in a file that was edited since this
            process began, so that its text may not be what ran.
    """

    def __init__(self, codes: Iterable[types.CodeType]) -> None:
        by_file = {m.__file__: name for name, m in list(sys.modules.items()) if getattr(m, "__file__", None)}
        by_file[getattr(sys.modules.get("__main__"), "__file__", None)] = "__main__"
        self.by_module: dict[str, set[types.CodeType]] = {}
        for code in set(codes):
            module = by_file.get(code.co_filename)
            if module is None:
                if code.co_filename.startswith((_TORCH, "<frozen ")) or _generated(code):
                    continue
                raise SourceChanged(f"{code.co_qualname} comes from {code.co_filename}, which is no file of a module")
            if module.split(".")[0] not in _COVERED:
                self.by_module.setdefault(module, set()).add(code)
        for module in self.by_module:
            path = file_of(module)
            if path is None or path.stat().st_mtime > _STARTED:
                raise SourceChanged(f"{path or module} was edited after this process began")

    def texts(self) -> dict[str, str]:
        """module -> digest of its file."""
        return {module: text_digest(module) or "" for module in sorted(self.by_module)}

    def names(self) -> set[str]:
        """Every name of a global or attribute in the code."""
        return {name for codes in self.by_module.values() for code in codes for name in _names(code)}

    def globals(self) -> dict[str, str]:
        """``module:name`` -> digest, for every global that the code names: a helper or a constant may be replaced."""
        places = {place for module, codes in self.by_module.items() for c in codes for place in _globals(module, c)}
        return digests_of(places)


def digests_of(places: Iterable[str]) -> dict[str, str]:
    """Digest of what stands at each ``module:name`` or ``module:name.attribute`` just now."""
    stable = Stable(lenient=True)
    return {place: digest(stable(_value_at(place))) for place in sorted(places)}


def check(texts: Mapping[str, str], values: Mapping[str, str]) -> None:
    """Compare what an artifact was made from with what is there now.

    Raises:
        SourceChanged: naming the first difference.
    """
    for module, was in texts.items():
        if text_digest(module) != was:
            raise SourceChanged(f"the source of {module} changed")
    for place, now in digests_of(values).items():
        if values[place] != now:
            raise SourceChanged(f"{place.replace(':', '.')} is another")


def _generated(code: types.CodeType) -> bool:
    """A method that `dataclasses` wrote: it follows from the class, which is among the globals of whoever names it."""
    return code.co_filename == "<string>" and code.co_qualname.startswith("__create_fn__.")


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _names(const)


def _globals(module: str, code: types.CodeType) -> Iterator[str]:
    known = vars(sys.modules[module])
    names = set(_names(code))
    for name in names & known.keys():
        yield f"{module}:{name}"
        if isinstance(known[name], types.ModuleType):
            inside = vars(known[name])
            yield from (f"{module}:{name}.{n}" for n in names & inside.keys() if callable(inside[n]))


def _value_at(place: str) -> Any:
    module, _, path = place.partition(":")
    value: Any = sys.modules.get(module) or importlib.import_module(module)
    for name in path.split("."):
        value = getattr(value, name, "(missing)")
    return value
