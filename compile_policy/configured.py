"""From the configuration to the options of a region."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

from compile_policy.artifacts import Store, open_store, user_directories
from compile_policy.config import CompilationConfig
from compile_policy.environment import obstacle
from compile_policy.errors import ConfigError
from compile_policy.options import RegionOptions

#: Bytes that a try at ``debug_dump_path`` writes: a disk without room takes the name of a file and no content.
_TRIED = b"\0" * 65536


def check_dump_path(config: CompilationConfig) -> None:
    """Make the folder ``debug_dump_path``, where one is given, and try to write a file into it.

    Raises:
        ConfigError: it cannot be made, or nothing can be written there.
    """
    path = config.debug_dump_path
    if path is None:
        return
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(_TRIED)
            file.flush()
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileExistsError):
            cause = "it is there and is no folder"
        raise ConfigError(
            f"debug_dump_path ({config.origin('debug_dump_path')}): graphs cannot be written to {path}: {cause}.",
            remedy="Name a folder that you may write and that has room, or leave it out.",
        ) from error


def region_options(config: CompilationConfig) -> RegionOptions:
    """Options of every region under ``config``; its dump writes to ``debug_dump_path``.

    Raises:
        ConfigError: nothing can be written to ``debug_dump_path``.
        EnvironmentNotSupported: the installed Python or torch is older than the oldest tested one.
    """
    check_dump_path(config)
    unsupported = obstacle()
    store = store_of(config)
    if config.debug_dump_path is None:
        return replace(RegionOptions.from_config(config, store=store), unsupported=unsupported)
    from compile_policy.graphs.dump import GraphDump  # depyf and its kin are loaded for those who dump

    options = RegionOptions.from_config(config, GraphDump(config.debug_dump_path), store)
    return replace(options, unsupported=unsupported)


def store_of(config: CompilationConfig) -> Store | None:
    """Where entries are kept on disk; ``None`` where nothing is, with a warning if that is not what was asked for."""
    if config.cache_dir is False or config.backend != "inductor" or not config.enabled or config.mode == 0:
        return None
    places = tuple(user_directories().items())
    return _opened(config.cache_dir, config.cache_key_file, config.cache_limit, places)


@functools.lru_cache(maxsize=16)
def _opened(
    cache_dir: Path | None, key_file: Path | None, limit: int, places: tuple[tuple[str, str], ...]
) -> Store | None:
    return open_store(cache_dir, dict(places), key_file=key_file, limit_bytes=limit)
