"""JSON from a source that isn't trusted."""

from __future__ import annotations

import json
import re
from typing import Any

DEPTH = 32

# A string (an unfinished one runs to the end, so that reading stays linear) or one bracket.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


def load_json(text: bytes) -> dict[str, Any]:
    """One JSON object from a source that isn't trusted.

    Raises:
        ValueError: no JSON object, nested deeper than `DEPTH`, names given twice, or not-a-number values.
    """
    depth = 0
    for token in _TOKEN.finditer(text):
        if token[0] in b"[{":
            depth += 1
            if depth > DEPTH:
                raise ValueError("it is nested too deeply")
        elif token[0] in b"]}":
            depth -= 1
    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse)
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError("it is not JSON") from None
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name is given twice")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
