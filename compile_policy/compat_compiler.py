"""Inductor's calls of a compiler: which one it finds, and a limit to how long one may run.

Inductor starts compilers with ``subprocess`` and waits for them without a limit. The name ``subprocess`` in its module
that does so is replaced by an object that waits with one, and ends the compiler with everything that it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from contextlib import AbstractContextManager
from typing import Any

COMPILER_SECONDS = 300.0

_lock = threading.Lock()


class CompilerTimeout(subprocess.TimeoutExpired):
    """A compiler was ended because it took longer than the configuration allows."""

    def __str__(self) -> str:
        words = self.cmd if isinstance(self.cmd, str) else " ".join(map(str, self.cmd[:1]))
        return f"the compiler {words.split()[0]} did not end within {self.timeout:g} s (compiler_timeout)"


class _Limited:
    """The module ``subprocess`` with a limit to the functions that wait."""

    def __init__(self) -> None:
        self.seconds = COMPILER_SECONDS

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    def run(self, *args: Any, check: bool = False, timeout: float | None = None, **kwargs: Any) -> Any:
        limit = self.seconds if timeout is None else timeout
        text = kwargs.pop("input", None)
        if kwargs.pop("capture_output", False):
            kwargs |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # A separate process group, so that what a compiler's driver has started ends with it.
        with subprocess.Popen(*args, start_new_session=True, **kwargs) as process:
            try:
                out, err = process.communicate(text, timeout=limit)
            except BaseException as error:
                _end_group(process)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise CompilerTimeout(process.args, limit) from None
                raise
        done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
        if check:
            done.check_returncode()
        return done

    def check_output(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, stdout=subprocess.PIPE, check=True, **kwargs).stdout

    def check_call(self, *args: Any, **kwargs: Any) -> int:
        self.run(*args, check=True, **kwargs)
        return 0


def _end_group(process: subprocess.Popen[Any]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


_limited = _Limited()


def limit_compilers(seconds: float) -> None:
    """End compilers that Inductor starts from now on, in any thread, after so many seconds."""
    from torch._inductor import cpp_builder

    with _lock:
        _limited.seconds = seconds
        vars(cpp_builder)["subprocess"] = _limited


def compiler_version(command: str) -> str:
    """The first line of what a compiler says about itself.

    Raises:
        CompilerTimeout: it says nothing within the limit.
    """
    said = _limited.run([command, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return str(said.stdout).strip().partition("\n")[0]


def own_cache() -> AbstractContextManager[Any]:
    """Inside the block, Inductor keeps its files in a new directory, which is removed afterwards."""
    from torch._inductor import utils

    make: Any = getattr(utils, "fresh_cache", None) or utils.fresh_inductor_cache
    found: AbstractContextManager[Any] = make()
    return found


def find_compiler() -> str:
    """The C++ compiler that Inductor takes.

    Raises:
        Exception: there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    return str(get_cpp_compiler())
