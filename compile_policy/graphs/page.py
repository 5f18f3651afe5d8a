"""One self-contained HTML page of a dump: operation, line of the model and kernel, each a click from the other."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from compile_policy.graphs.page_data import page_data, without_code
from compile_policy.graphs.reading import Dump
from compile_policy.graphs.text import clean

#: Bytes that a page may have. What would exceed them is left out, code first, and named on the page.
MAX_PAGE = 5_000_000

_WEB = Path(__file__).with_name("web")
_SCRIPTS = (
    "base.js",
    "model.js",
    "tree.js",
    "inspect.js",
    "entry.js",
    "compare.js",
    "overview.js",
    "search.js",
    "main.js",
)


def page_of(
    dump: Dump, *, events: Sequence[Mapping[str, Any]] = (), tlparse: str = "", max_bytes: int = MAX_PAGE
) -> str:
    """The page.

    It is one file that loads nothing. Names from the dump are data to it: its script builds text from them and never
    markup, the overview for readers without scripts is escaped, and a content security policy lets no other script run.

    Args:
        dump: whose entries to show.
        events: more events than the dump has, as `json_lines` writes them.
        tlparse: where a report of tlparse is, relative to the page; empty for none.
        max_bytes: how large the page may be.
    """
    data = _cleaned(page_data(dump, events, tlparse))
    while len(text := _rendered(data).encode()) > max_bytes:
        smaller = without_code(data, len(text) - max_bytes)
        if smaller is None:
            break
        data = smaller
    return text.decode()


def _rendered(data: dict[str, Any]) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((_WEB / "page.html.j2").read_text("utf-8"))
    script = '"use strict";\n' + "\n".join((_WEB / name).read_text("utf-8") for name in _SCRIPTS)
    style = (_WEB / "style.css").read_text("utf-8")
    return template.render(
        data=data,
        json=htmlsafe_json_dumps(data, dumps=json.dumps, separators=(",", ":")),
        script=Markup(script),
        style=Markup(style),
        script_hash=_hash(script),
        style_hash=_hash(style),
    )


def _hash(text: str) -> str:
    """As a content security policy names a script or style that may be used."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _cleaned(value: Any) -> Any:
    """Every string without characters that control a terminal or turn text round."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(str(key)): _cleaned(inside) for key, inside in value.items()}
    return [_cleaned(inside) for inside in value] if isinstance(value, (list, tuple)) else value
