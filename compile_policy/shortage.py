"""What a process lacks when something fails in it that is right in itself: room, memory, descriptors, permission.

An artifact that cannot be loaded for such a reason is good, and a compile that fails for one would succeed elsewhere.
"""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator

_WORDS = {
    errno.ENOSPC: "no space is left in {temporary}",
    errno.EDQUOT: "the quota of {temporary} is used up",
    errno.EFBIG: "a file would be larger than this process may write",
    errno.EROFS: "{temporary} is read-only",
    errno.EMFILE: "this process has too many open files",
    errno.ENFILE: "this machine has too many open files",
    errno.ENOMEM: "there is not enough memory",
    errno.EAGAIN: "no more processes or threads can be started",
}
#: What native code and compilers say, in lower case, for the same.
_SAID = {
    "no space left on device": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "file too large": errno.EFBIG,
    "file size limit exceeded": errno.EFBIG,
    "read-only file system": errno.EROFS,
    "too many open files": errno.EMFILE,
    "cannot allocate memory": errno.ENOMEM,
    "out of memory": errno.ENOMEM,
    "bad_alloc": errno.ENOMEM,
    "resource temporarily unavailable": errno.EAGAIN,
}
#: Only a folder without permission to execute makes the loader say this.
_NOT_MAPPED = ("failed to map segment", "operation not permitted", "permission denied")
_LEAST_BYTES = 1 << 20


def shortage(error: BaseException) -> str:
    """What this process lacks, in words; empty when ``error`` and its causes are about something else."""
    for cause in _causes(error):
        if isinstance(cause, MemoryError):
            return _words(errno.ENOMEM)
        if isinstance(cause, subprocess.TimeoutExpired):
            return str(cause)
        if isinstance(cause, OSError) and cause.errno in _WORDS:
            return _words(cause.errno)
        said = str(cause).lower()
        for phrase, number in _SAID.items():
            if phrase in said:
                return _words(number)
        if any(phrase in said for phrase in _NOT_MAPPED) and _has_flag(os.ST_NOEXEC):
            return f"code may not run from {temporary_directory()}, which is mounted noexec (TMPDIR names another)"
    return _temporary_is_full() if _may_be_about_files(error) else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        inner = getattr(error, "inner_exception", None)  # Dynamo's wrappers
        error = inner if isinstance(inner, BaseException) else error.__cause__ or error.__context__


def _words(number: int) -> str:
    return _WORDS[number].format(temporary=temporary_directory())


def temporary_directory() -> str:
    """The directory that native code takes for temporary files.

    Python's own function leaves out a directory that cannot be written, which is the one to be named here.
    """
    candidates: list[str] = getattr(tempfile, "_candidate_tempdir_list", lambda: ["/tmp"])()
    return next((path for path in candidates if os.path.isdir(path)), "/tmp")


def _has_flag(flag: int) -> bool:
    try:
        return bool(os.statvfs(temporary_directory()).f_flag & flag)
    except OSError:
        return False


def _may_be_about_files(error: BaseException) -> bool:
    """Native code names no reason for a file that it could not write."""
    return isinstance(error, (OSError, RuntimeError))


def _temporary_is_full() -> str:
    try:
        status = os.statvfs(temporary_directory())
    except OSError as error:
        return f"there is no temporary directory that can be used: {error.strerror or error}"
    free = status.f_bavail * status.f_frsize
    return _words(errno.ENOSPC) if status.f_blocks and free < _LEAST_BYTES else ""
