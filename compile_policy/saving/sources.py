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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from compile_policy.artifacts.key import JSON
from compile_policy.saving.stable import Stable, digest
from compile_policy.watched import Watched

#: Covered by their version; the policy's own sources by a digest of their own.
_COVERED = frozenset({"torch", "compile_policy"} | (sys.stdlib_module_names - {"__main__"}))
#: So many modules deep an attribute of an attribute is followed.
_WAY = 3
_TORCH = str(Path(torch.__file__).parent)
_STARTED = time.time()


class SourceChanged(Exception):
    """Code that cannot be told by the text of a file; the message says which."""


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
            if _top(module) not in _COVERED:
                self.by_module.setdefault(module, set()).add(code)
        for module in self.by_module:
            path = file_of(module)
            if path is None or path.stat().st_mtime > _STARTED:
                raise SourceChanged(f"{path or module} was edited after this process began")

    def modules(self) -> set[str]:
        """The modules whose text was traced."""
        return set(self.by_module)

    def names(self) -> set[str]:
        """Every name of a global or attribute in the code."""
        return {name for codes in self.by_module.values() for code in codes for name in _names(code)}

    def places(self) -> set[str]:
        """``module:name`` of every global that the code names: a helper or a constant may be replaced."""
        return {place for module, codes in self.by_module.items() for c in codes for place in _globals(module, c)}


def state_of(modules: Iterable[str], places: Iterable[str]) -> dict[str, JSON]:
    """What files and globals hold just now, as digests.

    A set has another order in every process, so the names are looked at in the order of the alphabet.
    """
    stable = Stable(lenient=True)
    return {
        "text": {module: text_digest(module) or "(none)" for module in sorted(modules)},
        "global": {place: digest(stable(_value_at(place))) for place in sorted(places)},
    }


def watched_at(places: Iterable[str]) -> tuple[Watched, ...]:
    """The globals as values to be watched from now on, as a capture would have them watched."""
    found = [Watched.now("settings of torch's kernels", "settings", torch)]
    for place in sorted(places):
        owner, name = _owner_of(place)
        found.append(Watched.now(place.replace(":", "."), "attribute", owner, name))
        if isinstance(value := found[-1].value, types.FunctionType):
            found += [Watched.now(f"{place}.{part}", "attribute", value, part) for part in ("__code__", "__defaults__")]
    return tuple(found)


def _generated(code: types.CodeType) -> bool:
    """A method that `dataclasses` wrote: it follows from the class, which is among the globals of whoever names it."""
    return code.co_filename == "<string>" and code.co_qualname.startswith("__create_fn__.")


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _names(const)


def watched_places(watched: Iterable[Watched], classes: Iterable[type]) -> set[str]:
    """``module:name`` of those values which a capture has watched that belong to a module or a class.

    Args:
        classes: of the component's modules; their namespaces may be watched as mappings.
    """
    found: set[str] = set()
    bases = {base for cls in classes for base in cls.__mro__}
    for w in watched:
        owner, key = w.owner, w.key
        if isinstance(owner, types.MappingProxyType) and isinstance(key, str):
            owner = next((cls for cls in bases if _is_namespace(cls, owner, key)), None)
        if isinstance(owner, type) and isinstance(key, str) and "<locals>" not in owner.__qualname__:
            if _top(owner.__module__) not in _COVERED:
                found.add(f"{owner.__module__}:{owner.__qualname__}.{key}")
        elif isinstance(owner, dict) and isinstance(key, str):
            name = owner.get("__name__")
            if isinstance(name, str) and _top(name) not in _COVERED and _is_globals(name, owner):
                found.add(f"{name}:{key}")
    return found


def _is_globals(module: str, of: dict[str, Any]) -> bool:
    return module in sys.modules and vars(sys.modules[module]) is of


def _is_namespace(cls: type, of: types.MappingProxyType[str, Any], name: str) -> bool:
    """Whether a view of a class's attributes is that of ``cls``; each look makes another view."""
    own = vars(cls)
    return name in own and name in of and own[name] is of[name] and own.keys() == of.keys()


def _globals(module: str, code: types.CodeType) -> Iterator[str]:
    names = set(_names(code))
    for name in names & vars(sys.modules[module]).keys():
        yield from _named(f"{module}:{name}", vars(sys.modules[module])[name], names, _WAY)


def _named(place: str, value: Any, names: set[str], way: int) -> Iterator[str]:
    """A place, and where a module stands there, what of it the code may name further on."""
    yield place
    if not isinstance(value, types.ModuleType) or not way:
        return
    covered = _top(value.__name__) in _COVERED  # another version of it is another key; one of its functions replaced?
    for name in names & vars(value).keys():
        inside = vars(value)[name]
        if callable(inside) or isinstance(inside, types.ModuleType) or not covered:
            yield from _named(f"{place}.{name}", inside, names, way - 1)


def _top(module: str) -> str:
    return module.split(".")[0]


def _owner_of(place: str) -> tuple[Any, str]:
    """The module that holds what stands at ``module:name`` or ``module:name.attribute``, and its name there."""
    module, _, path = place.partition(":")
    owner: Any = sys.modules.get(module) or importlib.import_module(module)
    *way, name = path.split(".")
    for step in way:
        owner = getattr(owner, step)
    return owner, name


def _value_at(place: str) -> Any:
    try:
        owner, name = _owner_of(place)
    except (ImportError, AttributeError):
        return "(none)"
    return getattr(owner, name, "(none)")
