"""Transformed bytecode as Python, through depyf, which may be missing, may fail and may take its time."""

from __future__ import annotations

import ctypes
import dis
import io
import threading
from types import CodeType


def decompile(code: CodeType, seconds: float) -> str:
    """Python source of ``code``.

    Raises:
        RuntimeError: depyf is missing, failed, or was not done in time; the message says which.
    """
    done: list[str] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            from depyf import decompile as depyf_decompile

            done.append(str(depyf_decompile(code)))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="compile_policy-depyf", daemon=True)
    thread.start()
    thread.join(seconds)
    if done:
        return done[0]
    if thread.is_alive():
        _interrupt(thread)
        raise RuntimeError(f"depyf was not done after {seconds:g} s")
    if isinstance(errors[0], ImportError):
        raise RuntimeError("depyf is not installed (pip install 'compile-policy[inspect]')") from errors[0]
    raise RuntimeError(f"depyf failed with {type(errors[0]).__name__}: {errors[0]}") from errors[0]


def disassemble(code: CodeType) -> str:
    """The instructions, for when there is no Python of them."""
    out = io.StringIO()
    dis.dis(code, file=out)
    return out.getvalue()


def _interrupt(thread: threading.Thread) -> None:
    """Raise in the thread, so that it doesn't go on beside the run; Python has no public call for this."""
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
