"""What happened, told to whoever listens; a listener never disturbs the run."""

from __future__ import annotations

import io
import json
import logging

import pytest
import torch
from torch import nn

from compile_policy.events import Event, emit, json_lines, listening
from compile_policy.region import Region, RegionOptions, SignatureBinder


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
    """One JSON object a line, also for data that JSON does not know."""
    stream = io.StringIO()
    with listening(json_lines(stream)):
        emit("note", "decoder", "a\nb", dtype=torch.float32)
        emit("note", "", "c")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in lines] == ["a\nb", "c"] and lines[0]["data"] == {"dtype": "torch.float32"}


class Doubles(nn.Module):
    def forward(self, x: torch.Tensor, k: int = 2) -> torch.Tensor:
        return x * k


def test_the_life_of_a_component_in_events() -> None:
    """Attached, compiled, another graph with its reason, eager with its reason, removed: each once, in order."""
    heard: list[Event] = []
    with listening(heard.append):
        binder, options = SignatureBinder({"x": {0: None}}), RegionOptions("eager")
        region = Region(Doubles(), role="decoder", qualname="m", binder=binder, options=options)
        region.attach()
        for _ in range(3):
            region.module(torch.ones(2))
        region.module(torch.ones(2), 3)
        for _ in range(3):
            region.module(torch.ones(2), torch.ones(2).to_sparse())
        region.detach()
    assert [e.kind for e in heard] == [
        "attached",
        "compile_start",
        "compile_end",
        "compile_start",
        "new_entry",
        "compile_end",
        "fallback",
        "removed",
    ]
    assert all(e.component == "decoder m" for e in heard)
    assert heard[4].data["difference"] == "2 arguments, were 1"
    assert heard[6].data["reason"] == region.fallback and heard[2].data["seconds"] > 0
