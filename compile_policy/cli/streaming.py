"""The answer as it is made: an object with the two methods that ``generate(streamer=...)`` calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Decode = Callable[[list[int]], str]


class AnswerStreamer:
    """Writes what each new token adds to the text. The prompt, which comes first, is left out."""

    def __init__(self, decode: Decode, write: Callable[[str], None]) -> None:
        self._decode = decode
        self._write = write
        self._ids: list[int] = []
        self._written = ""
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Take the prompt's ids (first call) or the next token's."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._ids += value.flatten().tolist()
        text = self._decode(self._ids)
        # A character may need several tokens, and until they are all there it decodes to a replacement character.
        if text.startswith(self._written) and not text.endswith("\ufffd"):
            self._write(text[len(self._written) :])
            self._written = text

    def end(self) -> None:
        """Write what was held back."""
        text = self._decode(self._ids)
        if text.startswith(self._written):
            self._write(text[len(self._written) :])
        self._written = text
