"""The user's line: where a warning points, past the frames of this package and of the libraries around it.

`warnings.warn` counts frames, which is wrong as soon as a library calls another one. `warn_user` looks for
the innermost frame that belongs to none of them, so that filters by module and ``-W error`` do what the user expects.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from types import FrameType

from compile_policy.errors import PolicyWarning

#: Top-level packages whose frames are not the user's: ours, libraries that call models, ways to call a function.
_LIBRARIES = {
    *("compile_policy", "pytest_compile_policy", "torch", "torchvision", "torchaudio", "functorch", "torchao"),
    *("transformers", "transformers_modules", "accelerate", "peft", "trl", "datasets", "diffusers", "optimum"),
    *("bitsandbytes", "deepspeed", "lightning", "pytorch_lightning", "ignite", "sentence_transformers"),
    *("huggingface_hub", "safetensors", "pydantic", "typer", "click", "rich", "contextlib", "functools", "threading"),
    *("concurrent", "asyncio", "multiprocessing", "importlib", "runpy", "dataclasses", "tqdm", "uvloop", "anyio"),
}
_OWN = ("compile_policy_",)  # backends


@dataclass(frozen=True)
class Place:
    """A line of Python: file, number (from 1), and the module that it belongs to."""

    file: str
    line: int
    module: str


def library_frames(package: str) -> None:
    """Declare that frames of a Python package are no user's: a warning points at whoever calls it."""
    _LIBRARIES.add(package)


def users_place() -> Place | None:
    """The innermost line of the stack that is the user's; ``None`` where there is none, as in a thread's first call."""
    frame = _users_frame()
    return None if frame is None else _place(frame)


def warn_user(message: str, category: type[Warning] = PolicyWarning, *, otherwise: Place | None = None) -> None:
    """Warn at the user's line.

    Args:
        otherwise: the line to point at where no frame is the user's; without it, the outermost frame.

    Raises:
        Warning: ``category``, where the user's filters make it an error.
    """
    frame = _users_frame()
    if frame is None and otherwise is not None:
        warnings.warn_explicit(message, category, otherwise.file, otherwise.line, otherwise.module)
        return
    if frame is None:
        frame = sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
    place, registry = _place(frame), frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, category, place.file, place.line, place.module, registry)


def _users_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_library(frame):
        frame = frame.f_back
    return frame


def _is_library(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name.partition(".")[0] in _LIBRARIES or name.startswith(_OWN)


def _place(frame: FrameType) -> Place:
    return Place(frame.f_code.co_filename, frame.f_lineno, str(frame.f_globals.get("__name__", "<unknown>")))
