"""Where a user's cache is, and whether it may be used."""

from __future__ import annotations

import os
import pwd
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from compile_policy import events
from compile_policy.artifacts.disk import Disk
from compile_policy.artifacts.places import check_folder, resolve
from compile_policy.artifacts.secret import own_secret, read_secret
from compile_policy.artifacts.store import LIMIT_BYTES, Store
from compile_policy.caller import warn_user
from compile_policy.errors import CacheError
from compile_policy.settings import expand_home

NAME = "compile_policy"
KEY_FILE_VARIABLE = "COMPILE_POLICY_CACHE_KEY_FILE"


def open_store(
    cache_dir: Path | None,
    environ: Mapping[str, str] | None = None,
    *,
    key_file: Path | None = None,
    limit_bytes: int = LIMIT_BYTES,
    disk: Disk | None = None,
) -> Store | None:
    """The user's store, or ``None`` with a `PolicyWarning` where there is no safe place for one.

    A private directory is signed with the user's own key, made on first use. With a key file the directory may be
    shared with others: what is not signed with that key isn't loaded.

    Args:
        cache_dir: its directory; ``None`` for the user's cache directory.
        environ: ``HOME``, ``XDG_CACHE_HOME``, ``XDG_CONFIG_HOME`` and ``COMPILE_POLICY_CACHE_KEY_FILE``; those of
            `user_directories` where not given.
    """
    try:
        return find_store(cache_dir, environ, key_file=key_file, limit_bytes=limit_bytes, disk=disk)
    except CacheError as error:
        message = f"compiled code is not kept on disk: {error}"
        events.emit("skipped", "", message)
        warn_user(message)
        return None


def find_store(
    cache_dir: Path | None,
    environ: Mapping[str, str] | None = None,
    *,
    key_file: Path | None = None,
    limit_bytes: int = LIMIT_BYTES,
    disk: Disk | None = None,
) -> Store:
    """As `open_store`, for whoever asked for the cache itself.

    Raises:
        CacheError: there is no safe place for it.
    """
    disk = disk or Disk()
    uid = os.getuid()
    environ = user_directories() if environ is None else environ
    if key_file is None and environ.get(KEY_FILE_VARIABLE):
        key_file = expand_home(environ[KEY_FILE_VARIABLE])
    root = resolve(cache_dir or default_cache_dir(environ, uid))
    _make_folders(root, disk)
    if key_file is not None:
        secret: bytes | None = read_secret(key_file, uid)
    else:
        _require_private(root, uid)
        secret = _own_secret(environ, uid, disk)
    return Store(root, secret=secret, limit_bytes=limit_bytes, disk=disk)


def user_directories() -> dict[str, str]:
    """Where this user's directories are: ``HOME``, ``XDG_CACHE_HOME`` and ``XDG_CONFIG_HOME`` as platformdirs has them.

    They belong to the machine, as the temporary directory does, and are no setting of the policy.
    """
    import platformdirs  # here: a cache in a directory that was named does not need it

    found: dict[str, str] = {}
    try:
        bases = {"XDG_CACHE_HOME": platformdirs.user_cache_path(), "XDG_CONFIG_HOME": platformdirs.user_config_path()}
    except RuntimeError:  # no home at all
        return found
    for variable, base in bases.items():
        if base.name in (".cache", ".config"):  # the default below a home, which may not be there
            found["HOME"] = str(base.parent)
        else:
            found[variable] = str(base)
    return found


def default_cache_dir(environ: Mapping[str, str], uid: int) -> Path:
    """Below the user's cache directory; without a home, a directory of their own in the system's temporary one."""
    base = _base(environ, uid, "XDG_CACHE_HOME", ".cache", "Library/Caches")
    if base is not None:
        return base / NAME
    return Path(environ.get("TMPDIR") or tempfile.gettempdir()) / f"{NAME}-{uid}"


def default_key_file(environ: Mapping[str, str], uid: int) -> Path | None:
    """Below the user's configuration directory; ``None`` without a home."""
    base = _base(environ, uid, "XDG_CONFIG_HOME", ".config", "Library/Application Support")
    return None if base is None else base / NAME / "cache.key"


def _base(environ: Mapping[str, str], uid: int, variable: str, below_home: str, on_mac: str) -> Path | None:
    chosen = Path(environ.get(variable, ""))
    if chosen.is_absolute():  # the XDG base directory specification has relative ones ignored
        return chosen
    home = Path(environ.get("HOME", ""))
    if not home.is_absolute():
        try:
            home = Path(pwd.getpwuid(uid).pw_dir)
        except KeyError:  # a container that runs under a number without a name
            return None
    if not home.is_dir() or home == Path("/"):
        return None
    return home / (on_mac if sys.platform == "darwin" else below_home)


def _make_folders(root: Path, disk: Disk) -> None:
    try:
        for folder in (*reversed(root.parents), root):
            if not os.path.lexists(folder):
                disk.make_folder(folder)
    except OSError as error:
        raise CacheError(
            f"{root} cannot be made: {error.strerror or error}.", remedy="Choose another directory with cache_dir."
        ) from error


def _require_private(root: Path, uid: int) -> None:
    try:
        unsafe = check_folder(root, uid)
    except OSError as error:
        raise CacheError(
            f"{root} cannot be read: {error.strerror or error}.", remedy="Choose another directory with cache_dir."
        ) from error
    if unsafe is not None:
        shared = f"For a volume that is shared on purpose, give cache_key_file ({KEY_FILE_VARIABLE} for commands)."
        raise CacheError(f"{unsafe.problem}.", remedy=f"{unsafe.remedy.rstrip('.')}. {shared}")


def _own_secret(environ: Mapping[str, str], uid: int, disk: Disk) -> bytes | None:
    """Without a place for a key, what protects a private directory is that it is private."""
    path = default_key_file(environ, uid)
    if path is None:
        return None
    try:
        return own_secret(path, uid, disk)
    except OSError:
        return None
