"""Sections of benchmarks/RESULTS.md, each written by the benchmark that measured it."""

from __future__ import annotations

import re
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"


def write_section(name: str, title: str, text: str) -> None:
    """Replace the section ``name``, or add it at the end."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    section = f"{begin}\n## {title}\n\n{text.strip()}\n{end}"
    old = RESULTS.read_text() if RESULTS.exists() else "# Results\n"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    new = pattern.sub(lambda _: section, old) if begin in old else f"{old.rstrip()}\n\n{section}\n"
    RESULTS.write_text(new)
