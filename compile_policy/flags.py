"""The configuration's spelling on a command line, after vLLM's.

    --compilation-config FILE                            a YAML or JSON file
    --compilation-config '{"FIELD": VALUE}'              several values
    --compile-mm-encoder, --no-compile-mm-encoder        encoders too, or not
    -O0 ... -O3, -O 2                                    the level, ``mode``
    -cc.FIELD=VALUE, -cc.FIELD.KEY VALUE                 one value; VALUE is YAML
    -cc.FIELD+=VALUE, -cc.FIELD+ VALUE                   one more element of a list
    -cc '{"FIELD": VALUE}', -cc={...}                    several values

``-cc`` and ``--compilation-config`` mean the same, and ``_`` in a flag the same as ``-``. Later wins. Everything after
``--`` is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compile_policy.errors import ConfigError
from compile_policy.settings import Flags, Setting, merge, parse_text

_ENCODER = "--compile-mm-encoder"
_NO_ENCODER = "--no-compile-mm-encoder"
_WHOLE = "--compilation-config"
_SHORT = "-cc"
#: A flag of ours, which is therefore no value of the flag before it.
_OWN_FLAG = re.compile(r"--|-cc(?![\w-])|-O=?[0-3]?$")
_SPELLINGS = "Write it as -cc.FIELD=VALUE or -cc '{\"FIELD\": VALUE}'."


def parse_flags(argv: Sequence[str]) -> tuple[Flags, list[str]]:
    """Take the configuration's flags out of ``argv``; returns them and the rest, in order.

    Raises:
        ConfigError: a flag of ours has no value, or one that cannot be read.
    """
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
        flag, given, value = word.partition("=")
        name = flag.replace("_", "-") if flag.startswith("--") else flag
        text = value if given else None
        if name in (_ENCODER, _NO_ENCODER) and text is None:
            self._set("compile_mm_encoder", name == _ENCODER, name)
        elif name.startswith("-O"):
            self._level(word[2:].removeprefix("="))
        elif name in (_WHOLE, _SHORT):
            self._mapping_or_file(name, text)
        elif name.startswith((f"{_SHORT}.", f"{_WHOLE}.")):
            self._dotted(flag, text)
        elif name.startswith(_SHORT):
            raise ConfigError(f"cannot read {word!r}.", remedy=_SPELLINGS)
        else:
            return False
        return True

    def _level(self, text: str) -> None:
        level = text or self._next("-O", "a level from 0 to 3")
        if level not in ("0", "1", "2", "3"):
            raise ConfigError(f"there is no optimisation level {level!r}.", remedy="Use -O0, -O1, -O2 or -O3.")
        self._set("mode", int(level), f"-O{level}")

    def _dotted(self, flag: str, text: str | None) -> None:
        """``-cc.FIELD``, ``-cc.FIELD.KEY`` and both with a ``+`` at the end, which adds to a list."""
        path = flag.partition(".")[2]
        adds = path.endswith("+")
        keys = path.removesuffix("+").split(".")
        if not all(keys):
            raise ConfigError(f"cannot read {flag!r}.", remedy="Write it as -cc.FIELD=VALUE.")
        value = parse_text(self._next(flag, f"a value: {flag}=VALUE") if text is None else text)
        name = keys[0].replace("-", "_")
        if adds:
            value = [*self._list_at([name, *keys[1:]]), *(value if isinstance(value, list) else [value])]
        for key in reversed(keys[1:]):
            value = {key: value}
        self._set(name, value, flag)

    def _list_at(self, keys: Sequence[str]) -> list[Any]:
        """The elements that earlier flags gave for a field."""
        found: Any = {name: setting.value for name, setting in self.settings.items()}
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, list) else []

    def _mapping_or_file(self, name: str, text: str | None) -> None:
        what = "a mapping such as '{\"mode\": 1}'" + (" or a YAML or JSON file" if name == _WHOLE else "")
        text = text or self._next(name, what)
        if name == _WHOLE and not text.lstrip().startswith("{"):
            self.file = Path(text)
            return
        try:
            values = parse_text(text)
        except ConfigError:
            values = None
        if not isinstance(values, dict):
            raise ConfigError(f"{name} {text} is not a mapping.", remedy="Write it as -cc '{\"FIELD\": VALUE}'.")
        for field, value in values.items():
            self._set(str(field).replace("-", "_"), value, name)

    def _next(self, flag: str, what: str) -> str:
        if not self.pending or _OWN_FLAG.match(self.pending[0]):
            raise ConfigError(f"{flag} needs a value.", remedy=f"Give it {what}.")
        return self.pending.pop(0)

    def _set(self, name: str, value: Any, flag: str) -> None:
        self.settings[name] = merge(self.settings.get(name), Setting(value, f"flag {flag}"))
