"""Where text goes: answers and tables to standard output, everything else to standard error."""

from __future__ import annotations

import os
import sys
import unicodedata
from typing import TextIO

from rich.console import Console
from rich.text import Text

# A file or a pipe has no width; wide enough for a table with its reasons.
_WIDTH_OF_NO_TERMINAL = 200


def clean(text: str) -> str:
    """Without control characters, so that a name or an answer cannot move the cursor or colour the screen."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


class Terminal:
    """Both consoles, and whether a streamed line is still open."""

    def __init__(self) -> None:
        self.out = _console(sys.stdout)
        self.err = _console(sys.stderr)
        self._line_open = False

    @property
    def animated(self) -> bool:
        """Whether a spinner can turn; otherwise there is one plain line for each thing that happens."""
        return self.err.is_terminal and not self.err.is_dumb_terminal

    def stream(self, text: str) -> None:
        """Add to the line that is being written on standard output."""
        if text:
            self.out.out(clean(text), end="", highlight=False)
            self._line_open = not text.endswith("\n")

    def close_line(self) -> None:
        """End the streamed line, if one is open, before something else is written."""
        if self._line_open:
            self.out.out("")
            self._line_open = False

    def note(self, text: str, style: str = "") -> None:
        """One line for people, on standard error."""
        self.close_line()
        self.err.print(Text(clean(text), style=style), soft_wrap=not self.err.is_terminal)

    def labelled(self, label: str, text: str, style: str) -> None:
        """``label: text`` on standard error, the label in colour."""
        self.close_line()
        line = Text.assemble((f"{label}: ", style), clean(text))
        self.err.print(line, soft_wrap=not self.err.is_terminal)

    def warn(self, text: str) -> None:
        self.labelled("warning", " ".join(text.split()), "bold yellow")

    def error(self, text: str) -> None:
        self.labelled("error", " ".join(text.split()), "bold red")


def _console(stream: TextIO) -> Console:
    if hasattr(stream, "reconfigure"):  # an answer that the terminal's encoding lacks must not end the run
        stream.reconfigure(errors="replace")
    console = Console(file=stream, highlight=False, emoji=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_NO_TERMINAL
    return console
