"""What happened, told to whoever listens; a listener never disturbs the run."""

from __future__ import annotations

import ast
import io
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from falling import falls_back
from torch import nn

from compile_policy import events
from compile_policy.events import KINDS, Event, emit, json_lines, json_schema, listening
from compile_policy.region import Region, RegionOptions, SignatureBinder

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "compile_policy").rglob("*.py"), *(ROOT / "backends").rglob("*.py")])
TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "array": list,
    "boolean": bool,
    "object": dict,
}


def test_every_sink_hears_inside_its_block_only() -> None:
    """Sinks hear in order while their block lasts, also when it ends with an exception."""
    one: list[Event] = []
    two: list[Event] = []
    with pytest.raises(KeyError), listening(one.append):
        emit("note", "decoder", "first", n=1)
        with listening(two.append):
            emit("note", "", "second")
        raise KeyError
    emit("note", "", "third")
    assert [e.message for e in one] == ["first", "second"] and [e.message for e in two] == ["second"]
    assert one[0].kind == "note" and one[0].component == "decoder" and one[0].data == {"n": 1} and one[0].time > 0


def test_a_sink_that_raises_is_logged_and_the_others_hear(caplog: pytest.LogCaptureFixture) -> None:
    """A broken listener costs a log line, not the run."""

    def broken(event: Event) -> None:
        raise ZeroDivisionError

    heard: list[Event] = []
    with listening(broken), listening(heard.append):
        emit("note", "", "told")
    assert len(heard) == 1 and "event sink" in caplog.text and "ZeroDivisionError" in caplog.text


def test_what_runs_eager_is_a_warning_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Fallbacks and budgets are warnings, the rest is information, with the component's name before the message."""
    with caplog.at_level(logging.INFO, logger="compile_policy"):
        emit("fallback", "decoder", "runs eager: because")
        emit("budget", "decoder", "too many")
        emit("compile_end", "", "compiled")
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", "decoder: runs eager: because"),
        ("WARNING", "decoder: too many"),
        ("INFO", "model: compiled"),
    ]


def test_json_lines() -> None:
    """One strict JSON object a line, also for data that JSON does not know."""
    stream = io.StringIO()
    odd = {"dtype": torch.float32, "sizes": (1, torch.Size([2])), 3: {"a"}, "much": float("inf"), "ever": 10**400}
    with listening(json_lines(stream)):
        emit("note", "decoder", "a\nb", odd=odd, of=nn.ReLU)
        emit("note", "", "c")
    lines = [json.loads(line, parse_constant=pytest.fail) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in lines] == ["a\nb", "c"] and lines[0]["schema"] == 1
    plain = {"dtype": "torch.float32", "sizes": [1, [2]], "3": ["a"], "much": "inf", "ever": 10**400}
    assert lines[0]["data"] == {"odd": plain, "of": str(nn.ReLU)}


class Doubles(nn.Module):
    def forward(self, x: torch.Tensor, k: int = 2) -> torch.Tensor:
        if isinstance(k, int) and k == 5:
            x = x if x.sum() > 1 else -x
        return x * k


def _live() -> list[Event]:
    """Events of a component that is attached, compiled, compiled again, not compiled, and detached."""
    heard: list[Event] = []
    with listening(heard.append):
        binder, options = SignatureBinder({"x": {0: None}}), RegionOptions("eager")
        region = Region(Doubles(), role="decoder", qualname="m", binder=binder, options=options)
        region.attach()
        for _ in range(3):
            region.module(torch.ones(2))
        region.module(torch.ones(2), 3)
        with falls_back("sparse", "the values of a tensor"):
            for _ in range(3):
                region.module(torch.ones(2), torch.ones(2).to_sparse())
            for _ in range(2):
                region.module(torch.ones(2), 5)
        region.detach()
    return heard


def test_the_life_of_a_component_in_events() -> None:
    """Attached, compiled, another graph with its reason, eager with its reason, removed: each once, in order."""
    heard = _live()
    start, failed = ["compile_start", "new_entry"], ["compile_failed", "fallback"]
    kinds = ["attached", "compile_start", "compile_end", *start, "compile_end", "fallback", *start, *failed, "removed"]
    assert [e.kind for e in heard] == kinds
    assert all(e.component == "decoder m" for e in heard)
    ends = [e.data for e in heard if e.kind == "compile_end"]
    assert [(d["entry"], d["road"]) for d in ends] == [(0, "jit"), (1, "jit")] and all(d["seconds"] > 0 for d in ends)
    assert heard[4].data["difference"].startswith("argument k is 3, was")
    assert "torch.sparse" in heard[6].data["reason"] or "Sparse" in heard[6].data["reason"]
    last = heard[-2].data
    assert last["error"] and last["file"] == __file__ and last["code"] == "x = x if x.sum() > 1 else -x"
    assert last["remedy"].startswith("Write it with torch.where")


# -- the schema -------------------------------------------------------------------------------------------------------


def _emits() -> Iterator[tuple[str, ast.Call]]:
    """Every call of ``emit`` in the code, with where it stands."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "emit":
                if isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") != "events":
                    continue  # a logging handler's own
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_every_emitted_kind_is_in_the_schema() -> None:
    """Each ``emit`` in the code names a kind of `KINDS` and only data that it has; no kind is there for nothing."""
    seen = {"note"}
    for where, call in _emits():
        kind = call.args[0]
        assert isinstance(kind, ast.Constant) and kind.value in KINDS, f"{where}: add the kind to events.KINDS"
        named = {word.arg for word in call.keywords if word.arg is not None}
        assert named <= KINDS[kind.value].fields.keys(), f"{where}: add the data to events.KINDS[{kind.value!r}]"
        if all(word.arg is not None for word in call.keywords):
            needed = {name for name, field in KINDS[kind.value].fields.items() if field.always}
            assert needed <= named, f"{where}: {needed - named} is said to be always there"
        seen.add(kind.value)
    assert seen == set(KINDS)


def _conforms(event: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    """What `json_schema` uses of JSON Schema, checked by hand."""
    assert set(event) == set(schema["required"]) == set(schema["properties"])
    assert event["schema"] == schema["properties"]["schema"]["const"]
    assert event["kind"] in schema["properties"]["kind"]["enum"]
    [rule] = [r["then"] for r in schema["allOf"] if r["if"]["properties"]["kind"]["const"] == event["kind"]]
    data = rule["properties"]["data"]
    assert set(data["required"]) <= set(event["data"]) <= set(data["properties"])
    for name, value in event["data"].items():
        assert isinstance(value, TYPES[data["properties"][name]["type"]]), (event["kind"], name, value)


def test_what_is_written_follows_the_schema() -> None:
    """Every line of a real life of a component has the fields and types that `json_schema` says."""
    stream = io.StringIO()
    with listening(json_lines(stream)):
        _live()
    schema = json.loads(json.dumps(json_schema()))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(lines) == 12
    for line in lines:
        _conforms(line, schema)


def test_the_document_is_the_schema() -> None:
    """``docs/events.md`` has one row a kind with its data, word for word."""
    text = (ROOT / "docs" / "events.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    wanted = []
    for name, kind in KINDS.items():
        level = logging.getLevelName(kind.level).lower()
        wanted.append(f"| `{name}` | {kind.when} | {level} |")
        for data, field in kind.fields.items():
            wanted.append(
                f"| `{name}.{data}` | {field.type}{'' if field.always else ', where known'} | {field.meaning} |"
            )
    assert sorted(rows) == sorted(wanted), "\n".join(sorted(set(wanted) ^ set(rows)))


def test_nothing_is_built_when_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a sink and below the log's level no `Event` is made; a call that hits an entry does not even ask."""
    made: list[str] = []
    asked: list[str] = []

    def counted(kind: str, *args: Any, **kwargs: Any) -> Event:
        made.append(kind)
        return Event(kind, *args, **kwargs)

    monkeypatch.setattr(events, "Event", counted)
    monkeypatch.setattr(events, "_sinks", [])  # a dump's sink stays, silent, until the next dump
    for room in ("region", "entries"):
        monkeypatch.setattr(
            f"compile_policy.{room}.emit", lambda kind, *a, **k: (asked.append(kind), emit(kind, *a, **k))
        )
    logging.getLogger("compile_policy").setLevel(logging.WARNING)
    region = Region(Doubles(), role="decoder", binder=SignatureBinder({"x": {0: None}}), options=RegionOptions("eager"))
    region.attach()
    region.module(torch.ones(2))
    assert made == [] and asked == ["attached", "compile_start", "compile_end"]
    del asked[:]
    for n in range(2, 6):
        region.module(torch.ones(n))
    assert made == [] and asked == [] and region.calls == 5 and region.graphs == 1
    with listening(lambda event: None):
        region.detach()
    assert made == ["removed"]
