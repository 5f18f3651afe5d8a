"""What `compile-policy doctor` looks at: versions, compiler, directories, backends, and a self-test.

Each check gives lines, and one that cannot be made gives a line that says so.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from compile_policy.cli.cache_tables import size_text
from compile_policy.errors import CacheError, PolicyError, first_line

if TYPE_CHECKING:
    from compile_policy.artifacts.doctor import Examination
    from compile_policy.config import CompilationConfig

State = Literal["ok", "warning", "error"]
_STATES: dict[str, State] = {"tested": "ok", "newer": "warning"}
_NO_COMPILER = "Install a C++ compiler such as g++, or name one in CXX; without one everything runs eager."
_LITTLE_ROOM = 64 << 20  # bytes: a package with what is unpacked from it


@dataclass(frozen=True)
class Line:
    """One finding.

    Attributes:
        name: what was looked at.
        state: ``error`` where compiled calls will not work, ``warning`` where they may.
        message: what was found.
        remedy: what to do about it; empty with ``ok``.
    """

    name: str
    state: State
    message: str
    remedy: str = ""


def examine_all(config: CompilationConfig) -> Iterator[Line]:
    """Every line, check by check."""
    checks: dict[str, Callable[[], Iterator[Line]]] = {
        "versions": versions,
        "compiler": lambda: compiler(config),
        "temporary directory": temporary_directory,
        "cache": lambda: cache(config),
        "backends": backends,
        "self-test": self_test,
    }
    for name, check in checks.items():
        try:
            yield from check()
        except PolicyError as error:
            yield Line(name, "error", error.message, error.remedy or "Run it again with --debug.")
        except Exception as error:
            said = f"could not be checked: {first_line(error)}"
            yield Line(name, "error", said, "Run it again with --debug.")


def versions() -> Iterator[Line]:
    """Python and the packages that the project is tested with."""
    from compile_policy.versions import compare, installed

    for finding in compare(installed()):
        remedy = finding.remedy
        if finding.state == "newer":
            remedy = f"The self-test below says whether it works; tested is: {finding.remedy}"
        yield Line(finding.package, _STATES.get(finding.state, "error"), finding.message, remedy)


def compiler(config: CompilationConfig) -> Iterator[Line]:
    """The C++ compiler, and how long a kernel of one line takes from graph to native code."""
    if config.backend != "inductor":
        yield Line("compiler", "ok", f"backend={config.backend!r} needs none")
        return
    from compile_policy.compat_compiler import compiler_version, find_compiler, limit_compilers

    limit_compilers(config.compiler_timeout)
    try:
        command = find_compiler()
    except Exception as error:
        yield Line("compiler", "error", f"none is found: {first_line(error)}", _NO_COMPILER)
        return
    yield Line("compiler", "ok", f"{command}: {compiler_version(command)}")
    from compile_policy.ahead import compile_hello
    from compile_policy.shortage import shortage

    started = time.perf_counter()
    try:
        compile_hello()
    except Exception as error:
        remedy = "Look at what the compiler says with --debug, or name another one in CXX."
        yield Line("hello kernel", "error", shortage(error) or first_line(error), remedy)
        return
    seconds = time.perf_counter() - started
    yield Line("hello kernel", "ok", f"compiled, loaded and right in {seconds:.1f} s")


def temporary_directory() -> Iterator[Line]:
    """Where packages are unpacked before they are loaded: it has to have room, and may not be mounted noexec."""
    from compile_policy import shortage

    name = "temporary directory"
    path = shortage.temporary_directory()
    status = os.statvfs(path)
    free = status.f_bavail * status.f_frsize
    if not os.access(path, os.W_OK | os.X_OK):
        yield Line(name, "error", f"{path} cannot be written", "Set TMPDIR to a directory that can.")
    elif status.f_flag & os.ST_NOEXEC:
        yield Line(name, "error", f"code may not run from {path}: it is mounted noexec", "Set TMPDIR to another one.")
    elif status.f_blocks and free < _LITTLE_ROOM:
        yield Line(name, "warning", f"{path} has {size_text(free)} left", "Make room, or set TMPDIR to another one.")
    else:
        yield Line(name, "ok", f"{path}, {size_text(free)} free" if status.f_blocks else path)


def cache(config: CompilationConfig) -> Iterator[Line]:
    """Owner, mode and size of the directory for compiled code, and each artifact in it."""
    if config.cache_dir is False:
        yield Line("cache", "ok", "turned off (cache_dir is false)")
        return
    from compile_policy.artifacts.doctor import examine
    from compile_policy.artifacts.locations import find_store

    try:
        store = find_store(config.cache_dir, key_file=config.cache_key_file, limit_bytes=config.cache_limit)
    except CacheError as error:
        yield Line("cache", "error", error.message, error.remedy)
        return
    found = examine(store, os.getuid(), shared=config.cache_key_file is not None)
    yield _directory(store.root, found, store.limit_bytes)
    for finding in found.findings:
        state: State = "error" if finding.kind == "problem" else "warning"
        yield Line("cache", state, finding.what, finding.remedy)


def _directory(root: Path, found: Examination, limit: int) -> Line:
    status = root.stat()
    owner = str(status.st_uid)
    with contextlib.suppress(KeyError):  # a container that runs under a number without a name
        owner = pwd.getpwuid(status.st_uid).pw_name
    size = f"{size_text(found.size)} of {size_text(limit)}"
    contents = f"{found.good} good and {found.damaged} damaged artifacts, {size}"
    said = f"{root}, owner {owner}, mode {stat.S_IMODE(status.st_mode):04o}, {contents}"
    if not os.access(root, os.W_OK):
        return Line("cache", "warning", f"{said}; read-only", "Nothing new is kept; name another with cache_dir.")
    return Line("cache", "ok", said)


def backends() -> Iterator[Line]:
    """What loads models."""
    from compile_policy.backend import backend_names, find_backend

    for name, module in backend_names().items():
        try:
            find_backend(name)
        except PolicyError as error:
            yield Line(f"backend {name}", "error", error.message, error.remedy)
        except Exception as error:
            remedy = f"python -c 'import {module}' shows where it fails."
            yield Line(f"backend {name}", "error", f"cannot be imported: {first_line(error)}", remedy)
        else:
            yield Line(f"backend {name}", "ok", module)


def self_test() -> Iterator[Line]:
    """What every compiled component relies on, tried on a small module."""
    from compile_policy.self_test import self_test as run

    for name, passed, said in run():
        remedy = "" if passed else "Install a tested version, see above; this one compiles nothing."
        yield Line(f"self-test: {name}", "ok" if passed else "error", said, remedy)
