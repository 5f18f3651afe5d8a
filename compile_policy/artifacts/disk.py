"""Every write that the store makes to a disk, in one place.

`Disk.step` is called before each of them with its name: a subclass that raises or ends the process there is a disk
that is full, or a machine that loses power. Modes don't depend on the umask.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
from pathlib import Path
from typing import Any

PRIVATE_FOLDER = 0o700
PRIVATE_FILE = 0o600

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe in place of a file must not block


class Disk:
    """Folders and files that only their owner can read or write."""

    def step(self, name: str, path: Path) -> None:
        """About to do ``name`` (make, create, write, sync, rename, remove, touch) to ``path``."""

    def make_folder(self, path: Path) -> None:
        """Make one folder; one that is there already is left as it is."""
        self.step("make", path)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, PRIVATE_FOLDER)
            os.chmod(path, PRIVATE_FOLDER)

    def write(self, path: Path, data: bytes) -> None:
        """Write a new file, down to the disk.

        Raises:
            OSError: it could not be written whole, or there is something at ``path``.
        """
        self.step("create", path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, PRIVATE_FILE)
        try:
            os.fchmod(descriptor, PRIVATE_FILE)
            rest = memoryview(data)
            while rest:  # a disk that runs full writes a part first
                self.step("write", path)
                rest = rest[os.write(descriptor, rest) :]
            self.step("sync", path)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync_folder(self, path: Path) -> None:
        """Make names in a folder last beyond a loss of power, where the file system can."""
        self.step("sync", path)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self.step("rename", target)
        os.rename(source, target)

    def exchange(self, source: Path, target: Path) -> bool:
        """Swap two names in one step, so that ``target`` is there all the time; False where the system cannot.

        Raises:
            OSError: one of them is not there, or may not be renamed.
        """
        self.step("rename", target)
        return _exchange(os.fsencode(source), os.fsencode(target))

    def remove(self, path: Path) -> None:
        """Remove a folder with all that is in it, or a file; links are not followed."""
        self.step("remove", path)
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, onerror=_unless_gone)

    def touch(self, path: Path) -> None:
        """Note that something was used now."""
        self.step("touch", path)
        os.utime(path)


_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def _exchange(source: bytes, target: bytes) -> bool:
    """``renameat2`` with RENAME_EXCHANGE, which Python does not offer."""
    rename: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, source, _AT_FDCWD, target, _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:  # the kernel, or the file system
        return False
    raise OSError(number, os.strerror(number), os.fsdecode(target))


def _unless_gone(function: object, path: str, caught: Any) -> None:
    """Two processes may remove the same folder."""
    if not isinstance(caught[1], FileNotFoundError):
        raise caught[1]


def open_folder(path: Path) -> int:
    """A descriptor of a folder that isn't a link; what is read through it stays the same folder when names change."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def read_at_most(name: str, limit: int, folder: int | None = None) -> tuple[bytes, int]:
    """(content, size) of a regular file that is no link; the content is empty when it is larger than ``limit``.

    Raises:
        OSError: there is no such file, or it isn't a regular one.
    """
    descriptor = os.open(name, _READ, dir_fd=folder)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{name} is not a regular file")
        if status.st_size > limit:
            return b"", status.st_size
        with os.fdopen(os.dup(descriptor), "rb") as file:
            data = file.read(status.st_size + 1)  # it may have grown since
        return data, len(data)
    finally:
        os.close(descriptor)
