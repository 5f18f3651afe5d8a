"""A report of tlparse beside the page of graphs, where tlparse is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_SECONDS = 120.0


class ReportFailed(Exception):
    """There is no report; the message says why."""


def report_of(log: Path, folder: Path, seconds: float = _SECONDS) -> str:
    """Have tlparse read ``log``, a file or folder that ``TORCH_TRACE`` made, and write its report into ``folder``.

    Returns:
        The link to it from a page beside ``folder``.

    Raises:
        ReportFailed: tlparse is missing, failed, or was not done in time.
    """
    program = shutil.which("tlparse")
    if program is None:
        raise ReportFailed("tlparse is not installed (pip install tlparse)")
    try:
        done = subprocess.run(
            [program, "--overwrite", "--no-browser", "-o", str(folder), str(log)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ReportFailed(f"tlparse did not run to its end: {error}") from error
    if done.returncode != 0 or not (folder / "index.html").is_file():
        said = (done.stderr.strip().splitlines() or ["it wrote no index.html"])[-1]
        raise ReportFailed(f"tlparse failed with exit code {done.returncode}: {said[:200]}")
    return f"{folder.name}/index.html"
