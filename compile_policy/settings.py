"""Settings on their way into a `CompilationConfig`: values with an origin, read from files, mappings and text."""

from __future__ import annotations

import difflib
import os
import pwd
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from compile_policy.caller import warn_user
from compile_policy.errors import ConfigError

ENVIRONMENT_PREFIX = "COMPILE_POLICY_"
KILL_SWITCH = "COMPILE_POLICY_DISABLE"

_YES = ("1", "true", "yes", "on")
_NO = ("0", "false", "no", "off", "")
# YAML 1.1 reads 1e-3 as text because it has no dot.
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


class Setting(NamedTuple):
    """One value, and where it came from."""

    value: Any
    origin: str


Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class Flags:
    """What a command line said about the configuration: a file at most, and single settings."""

    file: Path | None = None
    settings: Settings = field(default_factory=dict)


def near_match(name: str, known: Iterable[str]) -> str:
    """``Did you mean 'x'?``, or the list of what is known when nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=2, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(map(repr, near))}?"
    return f"Known: {', '.join(known)}."


def expand_home(path: str, home: Path | None = None) -> Path:
    """Replace a leading ``~`` or ``~user`` by a home directory.

    Args:
        home: what ``~`` means; the home in the password database where not given. Only a command line, which may read
            the environment, has another.

    Raises:
        ValueError: there is no such user, or the process's user has no entry.
    """
    first, _, rest = path.partition("/")
    if not first.startswith("~"):
        return Path(path)
    if home is None or first != "~":
        try:
            entry = pwd.getpwuid(os.getuid()) if first == "~" else pwd.getpwnam(first[1:])
        except KeyError:
            raise ValueError(
                f"should be a path without {first!r}, which has no entry in the password database"
            ) from None
        home = Path(entry.pw_dir)
    return home / rest


def parse_text(text: str) -> Any:
    """One value from a variable or a flag: YAML, so ``true``, ``3``, ``[a, b]`` and ``{a: 1}`` mean what they say."""
    import yaml  # here: a run without such text does not need it

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(
            f"cannot read the value {text!r}.", remedy="Quote text that has ':', '[' or '{' in it."
        ) from None
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return value


def file_settings(path: str | Path | None) -> dict[str, Setting]:
    """The fields of a YAML or JSON file."""
    if path is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ConfigError(
            f"{path}{line} is neither YAML nor JSON.", remedy="Write one 'field: value' a line."
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds {type(values).__name__}, not fields.", remedy="Write one 'field: value' a line."
        )
    return {str(name): Setting(value, f"file {path}") for name, value in values.items()}


def environment_settings(environ: Mapping[str, str], known: Iterable[str]) -> dict[str, Setting]:
    """The fields among the variables ``COMPILE_POLICY_<FIELD>``; one that is no field is warned about."""
    known = set(known)
    found = {}
    for variable in sorted(v for v in environ if v.startswith(ENVIRONMENT_PREFIX) and v != KILL_SWITCH):
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if name in known:
            found[name] = Setting(parse_text(environ[variable]), f"environment {variable}")
            continue
        hint = near_match(name, known | {"disable"})
        warn_user(f"the variable {variable} is not a setting and is ignored. {hint}")
    return found


def kill_switch(environ: Mapping[str, str]) -> dict[str, Setting]:
    """``enabled: False`` when the variable `KILL_SWITCH` says so."""
    text = environ.get(KILL_SWITCH, "").strip().lower()
    if text in _NO:
        return {}
    if text not in _YES:
        raise ConfigError(f"{KILL_SWITCH}={text!r} is neither yes nor no.", remedy="Set it to 1, or unset it.")
    return {"enabled": Setting(False, f"environment {KILL_SWITCH}")}


def merge(old: Setting | None, new: Setting, depth: int = 2) -> Setting:
    """``new`` wins; mappings merge ``depth`` levels down, and then both origins are named."""
    if old is None or not isinstance(old.value, dict) or not isinstance(new.value, dict):
        return new
    origin = old.origin if new.origin == old.origin else f"{old.origin}, {new.origin}"
    return Setting(_merged(old.value, new.value, depth), origin)


def _merged(old: dict[Any, Any], new: dict[Any, Any], depth: int) -> dict[Any, Any]:
    result = dict(old)
    for key, value in new.items():
        below = result.get(key)
        if depth > 1 and isinstance(below, dict) and isinstance(value, dict):
            value = _merged(below, value, depth - 1)
        result[key] = value
    return result


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def bytes_in(text: str) -> int:
    """Bytes: ``500MB`` counts in thousands, ``500MiB`` in 1024s.

    Raises:
        ValueError: it is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError("should be a size such as 500MB or 2GiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " "))
