"""Components and entries on a time line, and nothing of it when nobody looks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from falling import falls_back
from torch import nn

from compile_policy import compat
from compile_policy.cli import main
from compile_policy.compiled import CompiledGraph
from compile_policy.region import Region, RegionOptions, SignatureBinder
from compile_policy.trace import Span, Trace, tracing

ROOT = Path(__file__).resolve().parents[1]


class Doubles(nn.Module):
    def forward(self, x: torch.Tensor, k: int = 2) -> torch.Tensor:
        if k == 5:
            x = x if x.sum() > 1 else -x
        return x * k


def _region() -> Region:
    binder, options = SignatureBinder({"x": {0: None}}), RegionOptions("eager")
    region = Region(Doubles(), role="decoder", qualname="m", binder=binder, options=options)
    region.attach()
    return region


def _inside(inner: Span, outer: Span) -> bool:
    return outer.start <= inner.start and inner.start + inner.duration <= outer.start + outer.duration


def test_calls_compiles_and_eager_runs_are_spans() -> None:
    """One span a call, with what it did inside it; a compile says entry, road and captures; eager says why."""
    region = _region()
    with tracing(region.module) as trace, trace.span("all"):
        for k in (2, 2, 3):
            region.module(torch.ones(3), k)
        with falls_back("only the values of a tensor tell"):
            region.module(torch.ones(3), 5)
    kinds = [s.kind for s in sorted(trace.spans, key=lambda s: s.start)]
    assert kinds == [
        *("run", "component", "compile", "entry"),
        *("component", "entry"),
        *("component", "compile", "entry"),
        *("component", "compile", "eager"),
    ]
    [whole] = [s for s in trace.spans if s.kind == "run"]
    calls = [s for s in trace.spans if s.kind == "component"]
    assert [s.args["call"] for s in calls] == [0, 1, 2, 3] and {s.name for s in calls} == {"decoder m"}
    for span in trace.spans:
        if span.kind not in ("run", "component"):
            assert sum(_inside(span, call) for call in calls) == 1
        assert _inside(span, whole) and span.duration > 0
    compiles = [s.args for s in trace.spans if s.kind == "compile"]
    assert [(a.get("entry"), a.get("road"), a["captures"]) for a in compiles] == [
        (0, "jit", 1),
        (1, "jit", 1),
        (None, None, 0),  # found out before the capture
    ]
    assert "only the values of a tensor tell" in compiles[2]["failed"] and all(a["seconds"] > 0 for a in compiles)
    entries = [s for s in trace.spans if s.kind == "entry"]
    assert [s.name for s in entries] == ["entry 0 (jit)", "entry 0 (jit)", "entry 1 (jit)"]
    assert region.graphs == 2 and region.calls == 4


def test_everything_is_as_it_was_afterwards() -> None:
    """Traces may overlap and end in any order; the last one gives the region and its graphs their classes back."""
    region = _region()
    region.module(torch.ones(3))
    one, two = tracing(region.module), tracing(region.module)
    first, second = one.__enter__(), two.__enter__()
    region.module(torch.ones(3))
    with pytest.raises(KeyError), tracing(region.module):
        raise KeyError
    one.__exit__(None, None, None)
    region.module(torch.ones(3))
    two.__exit__(None, None, None)
    region.module(torch.ones(3))
    assert [len(t.spans) for t in (first, second)] == [2, 4]
    [[entry]] = region.entries.values()
    assert type(region) is Region and type(entry.graph) is CompiledGraph and "region" not in vars(entry.graph)
    assert region.graphs == 1 and region.calls == 4


def test_chrome_trace(tmp_path: Path) -> None:
    """The file has what perfetto asks of complete, instant and metadata events, and names stay text."""
    region = _region()
    region.qualname = "<script>\x1b[31m"
    with tracing(region.module) as trace:
        for k in (2, 3):
            region.module(torch.ones(3), k)
    trace.write(tmp_path / "t.json")
    found = json.loads((tmp_path / "t.json").read_text(), parse_constant=pytest.fail)
    assert found["displayTimeUnit"] == "ms"
    rows = found["traceEvents"]
    assert {row["ph"] for row in rows} == {"M", "X", "i"}
    for row in rows:
        assert isinstance(row["name"], str) and isinstance(row["pid"], int) and isinstance(row["tid"], int)
        assert isinstance(row["args"], dict)
        if row["ph"] != "M":
            assert row["ts"] >= 0 and isinstance(row["cat"], str)
        if row["ph"] == "X":
            assert row["dur"] > 0
        if row["ph"] == "i":
            assert row["s"] in ("g", "p", "t")
    assert [row["ts"] for row in rows if row["ph"] == "X"] == sorted(row["ts"] for row in rows if row["ph"] == "X")
    told = [row["name"].split()[0] for row in rows if row["ph"] == "i"]
    assert told == ["compile_start", "compile_end", "compile_start", "new_entry", "compile_end"]
    assert {row["args"]["name"] for row in rows if row["ph"] == "M"} == {"compile-policy", "thread 0"}


def test_a_profiler_sees_components_and_entries() -> None:
    """While a profiler of torch is on its ranges carry our names; after it the region is as it was, with no spans."""
    region = _region()
    x = torch.ones(3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        region.module(x)
        region.module(x)
        with falls_back("only the values of a tensor tell"):
            region.module(x, 5)
    counts = {row.key: row.count for row in profile.key_averages()}
    assert counts["decoder m"] == 3 and counts["entry 0 (jit)"] == 2 and counts["compile decoder m"] == 2
    assert counts["eager"] == 1
    region.module(x)
    assert type(region) is Region and [type(e.graph) for found in region.entries.values() for e in found] == [
        CompiledGraph
    ]
    assert (region.graphs, region.calls) == (1, 4)


def test_the_front_door_is_enough() -> None:
    """Whoever applies the policy gets names in a profiler, without a word about tracing."""
    code = (
        "import torch, compile_policy as cp\n"
        "from torch.profiler import ProfilerActivity, profile\n"
        "from compile_policy_transformers.tiny import tiny_model\n"
        "model = tiny_model('llama')\n"
        "cp.apply(model, cp.CompilationConfig(backend='eager', cache_dir=False))\n"
        "with profile(activities=[ProfilerActivity.CPU]) as seen:\n"
        "    model(torch.tensor([[5, 6, 7]]))\n"
        "print('decoder model' in {row.key for row in seen.key_averages()})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_profiling_is_torchs_own_flag() -> None:
    """The private symbol says what it is taken for, for both interfaces of the profiler."""
    assert compat.profiling() is False
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert compat.profiling() is True
    with torch.autograd.profiler.profile():
        assert compat.profiling() is True
    assert compat.profiling() is False


def test_a_call_pays_one_question_when_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without trace and profiler a call asks once whether a profiler is on, and makes no span and no range."""
    region = _region()
    region.module(torch.ones(3))
    asked: list[int] = []
    monkeypatch.setattr(compat, "profiling", lambda: asked.append(1))
    monkeypatch.setattr(torch.profiler, "record_function", pytest.fail)
    monkeypatch.setattr(Trace, "span", pytest.fail)
    for _ in range(5):
        region.module(torch.ones(3))
    assert len(asked) == 5 and region.graphs == 1


def test_the_flags_write_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``generate --trace --events`` writes both, with the decoder's calls in the time line; the answer is the same."""
    trace, events = tmp_path / "t.json", tmp_path / "e.jsonl"
    words = ["generate", "tiny:llama", "--json", "--max-new-tokens", "3", "-cc.backend=eager"]
    assert main([*words, "--trace", str(trace), "--events", str(events)]) == 0
    out: Any = json.loads(capsys.readouterr().out)
    rows = json.loads(trace.read_text())["traceEvents"]
    spans = [row for row in rows if row["ph"] == "X"]
    assert [row["name"] for row in spans if row["cat"] == "run"] == ["generate"]
    assert len([row for row in spans if row["cat"] == "component"]) == out["components"][0]["calls"] == 3
    assert [row["args"]["captures"] for row in spans if row["cat"] == "compile"] == [1]
    for call in (row for row in spans if row["cat"] == "component"):  # also a step that takes a shorter road
        ends = call["ts"] + call["dur"]
        assert any(row["cat"] == "entry" and call["ts"] <= row["ts"] < ends for row in spans)
    kinds = [json.loads(line)["kind"] for line in events.read_text().splitlines()]
    assert kinds == ["attached", "compile_start", "compile_end"]
    assert main([*words, "--trace", str(tmp_path / "no" / "t.json")]) == 2
    assert "cannot write" in capsys.readouterr().err
