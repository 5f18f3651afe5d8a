"""What every command starts from: the configuration, the terminal, and the backend."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compile_policy.cli.terminal import Terminal
from compile_policy.errors import InputError, PolicyError
from compile_policy.settings import Flags
from compile_policy.versions import compare, installed, refuse_unsupported

if TYPE_CHECKING:
    from compile_policy.config import CompilationConfig

#: How the name of a model with random weights begins.
TINY = "tiny:"


@dataclass(frozen=True)
class Session:
    """One run of a command."""

    terminal: Terminal
    flags: Flags
    debug: bool = False

    def config(self) -> CompilationConfig:
        """The effective configuration: file, environment and flags, later wins."""
        from compile_policy.config import CompilationConfig  # imports pydantic

        return CompilationConfig.from_sources(environ=os.environ, flags=self.flags, home=_home())

    def backend(self) -> Any:
        """The modelling backend, once the installed versions are known to be supported."""
        check_installed()
        if not self.terminal.animated:  # before Transformers is imported, which asks once; a log needs no moving bars
            from huggingface_hub.utils.tqdm import disable_progress_bars

            disable_progress_bars()
        from compile_policy.backend import find_backend  # after the check: an old Transformers fails obscurely

        return find_backend()


def _home() -> Path | None:
    """What ``~`` means to the user's shell."""
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and no entry in the password database
        return None


def check_installed() -> None:
    """Refuse versions of Python, torch and Transformers that are too old, or missing."""
    refuse_unsupported(compare(installed()))


@contextmanager
def loading(name: str | None) -> Iterator[None]:
    """Turn what a loader raises for a model that isn't there, or isn't whole, into one sentence."""
    try:
        yield
    except PolicyError:
        raise
    except (OSError, ValueError) as error:
        first = next((line for line in str(error).strip().splitlines() if line), type(error).__name__)
        remedy = "Check the name; a hub id needs the network or an earlier download."
        if (name or "").startswith(TINY):
            remedy = "Name an architecture of Transformers, such as tiny:qwen2_5_vl."
        raise InputError(f"the model {name or 'of the package'} cannot be loaded: {first}", remedy=remedy) from error
