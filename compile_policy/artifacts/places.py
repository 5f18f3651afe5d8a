"""Whether a folder is ours alone: otherwise whoever else can write it could run code as us."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple


class Unsafe(NamedTuple):
    """What is wrong with a folder, and what to do about it."""

    problem: str
    remedy: str


def resolve(path: Path) -> Path:
    """Absolute, with links above the last name followed: from here on nobody can turn them elsewhere."""
    path = Path(os.path.abspath(path))
    return Path(os.path.realpath(path.parent)) / path.name


def check_folder(path: Path, uid: int) -> Unsafe | None:
    """What keeps a resolved, existing folder from being private to ``uid``, or ``None``.

    Private means: a real directory, owned by us or by root, writable by nobody else, and no directory above it can be
    changed by others (a sticky one such as ``/tmp`` is safe: names in it belong to their owners).

    Raises:
        OSError: the folder cannot be looked at.
    """
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        return Unsafe(f"{path} is a symbolic link", "Name the directory that it leads to.")
    if not stat.S_ISDIR(status.st_mode):
        return Unsafe(f"{path} is not a directory", "Name a directory.")
    if status.st_uid not in (uid, 0):
        return Unsafe(f"{path} belongs to {_user(status.st_uid)}", "Choose another directory with cache_dir.")
    if status.st_mode & 0o022:
        return Unsafe(f"{path} can be written by others (mode {_octal(status)})", f"chmod 700 {path}")
    for parent in path.parents:
        unsafe = _check_parent(parent, os.lstat(parent), uid)
        if unsafe is not None:
            return Unsafe(f"{path} is not private: {unsafe.problem}", unsafe.remedy)
    return None


def _check_parent(parent: Path, status: os.stat_result, uid: int) -> Unsafe | None:
    if status.st_uid not in (uid, 0):
        problem = f"{parent} above it belongs to {_user(status.st_uid)}"
        return Unsafe(problem, "Choose another directory with cache_dir.")
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        remedy = f"chmod go-w {parent}, or choose another directory with cache_dir."
        return Unsafe(f"{parent} above it can be written by others (mode {_octal(status)})", remedy)
    return None


def check_private_file(status: os.stat_result, path: Path, uid: int) -> Unsafe | None:
    """What keeps a file from being readable and writable by ``uid`` (or root) alone, or ``None``."""
    if not stat.S_ISREG(status.st_mode):
        return Unsafe(f"{path} is not a regular file", "Name a file.")
    if status.st_uid not in (uid, 0):
        return Unsafe(f"{path} belongs to {_user(status.st_uid)}", "Make a key file of your own.")
    if status.st_mode & 0o077:
        return Unsafe(f"{path} is open to others (mode {_octal(status)})", f"chmod 600 {path}")
    return None


def _user(uid: int) -> str:
    return "another user" if uid != 0 else "root"


def _octal(status: os.stat_result) -> str:
    return f"{stat.S_IMODE(status.st_mode):04o}"
