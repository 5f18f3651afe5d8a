"""What a class is called, where it comes from, and a digest of its code that is equal in every process."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import sys
import types
from pathlib import Path
from typing import Any

_FOREIGN = ("torch", "builtins", "typing", "abc")


def qualified(cls: type) -> str:
    """``module:Class``, the spelling of entry points."""
    return f"{cls.__module__}:{cls.__qualname__}"


@functools.cache
def _distributions() -> dict[str, list[str]]:
    return {name: list(found) for name, found in importlib.metadata.packages_distributions().items()}


def origin_of(cls: type) -> str:
    """``distribution version`` of the package that defines ``cls``, or its module when none does."""
    package = cls.__module__.split(".")[0]
    if package == "compile_policy":
        return "compile-policy"  # the usual case, without a look at everything that is installed
    found = _distributions().get(package)
    return f"{found[0]} {importlib.metadata.version(found[0])}" if found else cls.__module__


@functools.cache
def code_digest(cls: type) -> str:
    """Digest of what ``cls`` computes, as far as its own classes and their source files say.

    Two edits of one class differ, as do two classes that a notebook defined under one name. Covered: the bytecode of
    every method along the MRO outside torch, and the files of the modules that define them. Not covered: what these
    modules import.
    """
    digest = hashlib.sha256()
    for base in cls.__mro__:
        if base.__module__.split(".")[0] in _FOREIGN:
            continue
        digest.update(qualified(base).encode())
        for name, value in sorted(vars(base).items()):
            for code in _codes(value):
                digest.update(name.encode() + stable_code(code))
        digest.update(_file_of(base.__module__))
    return digest.hexdigest()[:16]


def _codes(value: Any) -> list[types.CodeType]:
    if isinstance(value, (classmethod, staticmethod)):
        value = value.__func__
    functions = [value.fget, value.fset] if isinstance(value, property) else [value]
    return [inspect.unwrap(f).__code__ for f in functions if isinstance(f, types.FunctionType)]


def stable_code(code: types.CodeType) -> bytes:
    """Bytecode and names, without line numbers, file names and addresses."""
    consts = [stable_code(c) if isinstance(c, types.CodeType) else _repr(c).encode() for c in code.co_consts]
    return b"\0".join([code.co_code, repr((code.co_names, code.co_varnames)).encode(), *consts])


def _repr(const: Any) -> str:
    # the order of a set of strings differs from process to process
    return repr(sorted(map(repr, const))) if isinstance(const, frozenset) else repr(const)


def _file_of(module: str) -> bytes:
    path = getattr(sys.modules.get(module), "__file__", None)
    try:
        return hashlib.sha256(Path(path).read_bytes()).digest() if path else b""
    except OSError:
        return b""
