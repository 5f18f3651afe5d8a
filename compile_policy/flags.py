"""The configuration's spelling on a command line, after vLLM's.

    --compilation-config FILE                            a YAML or JSON file
    --compile-mm-encoder, --no-compile-mm-encoder        encoders too, or not
    -O0 ... -O3, -O 2                                    the level, ``mode``
    -cc.FIELD=VALUE, -cc.FIELD.KEY=VALUE                 one value; VALUE is YAML
    -cc '{"FIELD": VALUE}', -cc={...}                    several values

Later wins. Everything after ``--`` is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from compile_policy.errors import ConfigError
from compile_policy.settings import Flags, Setting, merge, parse_text


def parse_flags(argv: Sequence[str]) -> tuple[Flags, list[str]]:
    """Take the configuration's flags out of ``argv``; returns them and the rest, in order."""
    reader = _Reader(list(argv))
    rest: list[str] = []
    while reader.pending:
        word = reader.pending.pop(0)
        if word == "--":
            rest += [word, *reader.pending]
            break
        if not reader.take(word):
            rest.append(word)
    return Flags(reader.file, reader.settings), rest


class _Reader:
    """Walks the words of a command line and collects what belongs to the configuration."""

    def __init__(self, pending: list[str]) -> None:
        self.pending = pending
        self.file: Path | None = None
        self.settings: dict[str, Setting] = {}

    def take(self, word: str) -> bool:
        """Handle one word, and its value where that is the next one; False when it belongs to somebody else."""
        if word in ("--compile-mm-encoder", "--no-compile-mm-encoder"):
            self._set("compile_mm_encoder", not word.startswith("--no-"), word)
            return True
        for prefix, handle in _HANDLERS.items():
            if word.startswith(prefix):
                return handle(self, word)
        return False

    def config_file(self, word: str) -> bool:
        name, given, value = word.partition("=")
        if name != "--compilation-config":
            return False
        self.file = Path(value if given else self._next(word, "a YAML or JSON file"))
        return True

    def level(self, word: str) -> bool:
        text = word[2:].removeprefix("=") or self._next(word, "a level from 0 to 3")
        if text not in ("0", "1", "2", "3"):
            raise ConfigError(f"there is no optimisation level {text!r}.", remedy="Use -O0, -O1, -O2 or -O3.")
        self._set("mode", int(text), f"-O{text}")
        return True

    def dotted(self, word: str) -> bool:
        path, given, text = word.partition("=")
        keys = path.removeprefix("-cc.").split(".")
        if not given or not all(keys):
            raise ConfigError(f"cannot read {word!r}.", remedy="Write it as -cc.FIELD=VALUE.")
        value = parse_text(text)
        for key in reversed(keys[1:]):
            value = {key: value}
        self._set(keys[0].replace("-", "_"), value, path)
        return True

    def mapping(self, word: str) -> bool:
        text = word[len("-cc") :]
        if text and not text.startswith("="):
            raise ConfigError(
                f"cannot read {word!r}.", remedy="Write it as -cc.FIELD=VALUE or -cc '{\"FIELD\": VALUE}'."
            )
        text = text[1:] or self._next("-cc", "a mapping such as '{\"mode\": 1}'")
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError:
            values = None
        if not isinstance(values, dict):
            raise ConfigError(f"-cc {text} is not a mapping.", remedy="Write it as -cc '{\"FIELD\": VALUE}'.")
        for name, value in values.items():
            self._set(str(name), value, "-cc")
        return True

    def _next(self, flag: str, what: str) -> str:
        if not self.pending:
            raise ConfigError(f"{flag} needs a value.", remedy=f"Give it {what}.")
        return self.pending.pop(0)

    def _set(self, name: str, value: Any, flag: str) -> None:
        self.settings[name] = merge(self.settings.get(name), Setting(value, f"flag {flag}"))


_HANDLERS: dict[str, Callable[[_Reader, str], bool]] = {
    "--compilation-config": _Reader.config_file,
    "-cc.": _Reader.dotted,
    "-cc": _Reader.mapping,
    "-O": _Reader.level,
}
