"""Code of kernels as a native package carries it: for entries that were lowered elsewhere, and come ready."""

from __future__ import annotations

import io
import zipfile

from compile_policy.program import Program

_NAMES = {".wrapper.cpp": "inductor_aot_wrapper_code", ".kernel.cpp": "inductor_aot_kernel_code"}
_COMMAND = "\n// Compile cmd\n"  # what follows tells of folders of the machine that made the package


def texts_of(program: Program | None, max_bytes: int) -> list[list[tuple[str, str]]]:
    """Per package, (name as the structured trace has it, text); nothing of a package that cannot be read."""
    return [_texts(package.data, max_bytes) for package in program.packages] if program is not None else []


def _texts(data: bytes, max_bytes: int) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for item in archive.infolist():
                name = next((name for suffix, name in _NAMES.items() if item.filename.endswith(suffix)), "")
                if name and item.file_size <= max_bytes:
                    text = archive.read(item).decode("utf-8", "replace")
                    found.append((name, text.partition(_COMMAND)[0]))
    except (zipfile.BadZipFile, OSError, ValueError):
        return []
    return found
