"""The secret that artifacts are signed with, kept outside the cache: who can write the cache still cannot forge one."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from compile_policy.artifacts.disk import Disk
from compile_policy.artifacts.places import check_private_file
from compile_policy.errors import CacheError

_FEWEST = 32
_MOST = 4096


def read_secret(path: Path, uid: int) -> bytes:
    """The content of a key file, without white space around it: at least 32 bytes.

    Raises:
        CacheError: it is missing, open to others, or too short to be a secret.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        remedy = f"Make one: (umask 077; head -c 32 /dev/urandom | base64 > {path})"
        raise CacheError(f"the key file {path} cannot be read: {error.strerror}.", remedy=remedy) from None
    with os.fdopen(descriptor, "rb") as file:
        unsafe = check_private_file(os.fstat(file.fileno()), path, uid)
        if unsafe is not None:
            raise CacheError(f"the key file {unsafe.problem}.", remedy=unsafe.remedy)
        secret = file.read(_MOST).strip()
    if len(secret) < _FEWEST:
        raise CacheError(f"the key file {path} is too short.", remedy=f"Put at least {_FEWEST} random bytes in it.")
    return secret


def own_secret(path: Path, uid: int, disk: Disk) -> bytes:
    """The user's own secret, made on first use.

    Raises:
        CacheError: the file is there and cannot be used.
        OSError: it isn't there and cannot be made.
    """
    if not path.exists():
        _make(path, disk)
    return read_secret(path, uid)


def _make(path: Path, disk: Disk) -> None:
    """Written aside and linked into place: two processes that start together have one secret, never half of one."""
    for folder in (*reversed(path.parents),):
        if not folder.exists():
            disk.make_folder(folder)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        disk.write(aside, secrets.token_hex(32).encode() + b"\n")
        try:
            os.link(aside, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                disk.rename(aside, path)
    finally:
        disk.remove(aside)
