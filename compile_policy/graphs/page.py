"""One self-contained HTML page of a dump: operation, line of the model and kernel, each a click from the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from compile_policy.graphs.kernels import kernel_codes, kernels_of
from compile_policy.graphs.reading import Dump, DumpedEntry
from compile_policy.graphs.stats import code_of, line_of
from compile_policy.graphs.text import clean

#: Code of kernels beyond this many characters is left out of a page.
MAX_CODE = 2_000_000


def page_of(dump: Dump) -> str:
    """The page; every name in it is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html.j2").read_text("utf-8"))
    entries, room, notes = [], MAX_CODE, list(dump.notes)
    for entry in dump.entries:
        described = _entry(entry)
        size = sum(len(kernel["code"]) for kernel in described["kernels"])
        if size > room:
            notes.append(f"{entry.id}: the code of its kernels is left out, see its folder lowered/")
            described["kernels"] = [{**kernel, "code": ""} for kernel in described["kernels"]]
        else:
            room -= size
        entries.append(described)
    return clean(template.render(entries=entries, notes=notes))


def _entry(entry: DumpedEntry) -> dict[str, Any]:
    record = entry.record
    kernels, codes = kernels_of(entry), kernel_codes(entry)
    uses: dict[str, list[int]] = {}
    for number, kernel in enumerate(kernels):
        for name in kernel.captured:
            uses.setdefault(name, []).append(number)
    return {
        "id": entry.id,
        "component": entry.component,
        "cls": record.get("component", {}).get("cls", ""),
        "seconds": record.get("seconds", ""),
        "labels": ", ".join(record.get("labels", {})),
        "backend": record.get("backend", ""),
        "road": record.get("road", ""),
        "arguments": [{name: _said(row.get(name)) for name in _COLUMNS} for row in record.get("arguments", [])],
        "conditions": entry.read("conditions") if "conditions" in entry.files else "",
        "ops": [_op(op, uses) for op in entry.ops()] if "ops" in entry.files else [],
        "kernels": [{"name": k.name, "captured": k.captured, "code": codes.pop(k.name, "")} for k in kernels],
    }


_COLUMNS = ("path", "dtype", "dims", "example")


def _op(op: dict[str, Any], uses: dict[str, list[int]]) -> dict[str, Any]:
    name = re.sub(r"\W", "_", str(op.get("name")))
    return {
        "name": name,
        "op": op.get("op"),
        "shape": _said(op.get("shape")),
        "module": op.get("module") or "",
        "place": line_of(op),
        "code": code_of(op),
        "kernels": uses.get(name, []),
    }


def _said(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return "" if value is None else str(value)
