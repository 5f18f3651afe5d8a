"""Dumps: everything that there is to see about an entry, and a run that is the same with and without."""

from __future__ import annotations

import ast
import errno
import gc
import json
import multiprocessing
import random
import re
import runpy
import shutil
import stat
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from filelock import FileLock

import compile_policy
from compile_policy.applied import regions
from compile_policy.config import CompilationConfig
from compile_policy.configured import region_options
from compile_policy.errors import InputError
from compile_policy.events import Event, emit, listening
from compile_policy.graphs import Dump, DumpedEntry, GraphDump, calls, folder, runs
from compile_policy.graphs.compat import structured_trace
from compile_policy.graphs.kernels import kernel_codes, kernels_of, lowered_of
from compile_policy.graphs.page import page_of
from compile_policy.graphs.sizes import evaluated, labelled
from compile_policy.graphs.stats import stats_of
from compile_policy.graphs.text import file_name
from compile_policy.graphs.trail import kernel_trail, op_trail
from compile_policy.graphs.values import values_of
from compile_policy.region import Region, RegionOptions, SignatureBinder
from compile_policy_transformers.tiny import tiny_inputs, tiny_model

VICTIM = "<img src=x onerror=alert(1)>\x1b[31m../../evil\nraise SystemExit  # \u202e\x9b1m"


class Block(torch.nn.Module):
    """A linear layer and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(x)
        return torch.nn.functional.silu(hidden) * x


class Net(torch.nn.Module):
    """Two blocks."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.scale = scale
        self.layers = torch.nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sum(-1) * self.scale


def _region(dump: Any, *, backend: str = "aot_eager", qualname: str = "net", module: Any = None) -> Region:
    torch.manual_seed(0)
    module = module or Net().eval()
    options = RegionOptions(backend=backend, on_fault="error", dump=dump)
    return Region(
        module, role="component", qualname=qualname, binder=SignatureBinder({"x": {0: "rows"}}), options=options
    )


def _run(region: Region, rows: int = 5, *, grad: bool = False) -> torch.Tensor:
    with torch.set_grad_enabled(grad):
        return region(x=torch.arange(rows * 8.0).reshape(rows, 8) / 40)


@contextmanager
def _events() -> Iterator[list[Event]]:
    seen: list[Event] = []
    with listening(seen.append):
        yield seen


def _dumped(tmp_path: Path, **options: Any) -> tuple[Region, Path, dict[str, Any]]:
    region = _region(GraphDump(tmp_path / "dump", **options))
    _run(region)
    (record,) = json.loads((tmp_path / "dump" / "index.json").read_text())["entries"]
    return region, tmp_path / "dump" / record["id"], record


# -- what is written --------------------------------------------------------------------------------------------------


def test_files_of_an_entry(tmp_path: Path) -> None:
    """Every file that the index names exists, is the owner's alone, and the Python ones are Python."""
    _, folder, record = _dumped(tmp_path)
    written = {"captured", "conditions", "guards", "inputs", "ops", "sources", "aot_inference_graph", "bytecode"}
    assert set(record["files"]) == written
    for name in record["files"].values():
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    for path in (tmp_path / "dump").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    for name in ("captured", "bytecode"):
        ast.parse((folder / record["files"][name]).read_text())
    assert record["notes"] == []


def test_captured_graph_names_the_models_lines(tmp_path: Path) -> None:
    """Each operation stands beside the model's own line, each input under its name in the model."""
    _, folder, record = _dumped(tmp_path)
    text = (folder / "captured.py").read_text()
    lines = [line for line in text.splitlines() if " = " in line and not line.startswith("#")]
    assert len(lines) == record["ops"] == 8
    here = Path(__file__)
    own = {f"{here.name}:{n}": line.strip() for n, line in enumerate(here.read_text().splitlines(), 1)}
    for line in lines:
        place, code = line.rpartition("  # ")[2].split(": ", 1)
        assert own[place] == code
    silu = next(line for line in lines if "silu" in line)
    assert "return torch.nn.functional.silu(hidden) * x" in silu
    assert 'layers_1_linear_weight: "f32[8, 8]",  # layers.1.linear.weight' in text
    assert text.count("layers_1_linear_weight") == 2  # the input, and the one operation that uses it


def test_index_describes_the_entry(tmp_path: Path) -> None:
    """Component, key, dynamic dims with labels and example sizes, times and counts are in the index."""
    region, _, record = _dumped(tmp_path)
    (entry,) = [e for found in region.entries.values() for e in found]
    assert record["component"] == {"role": "component", "qualname": "net", "cls": "Net", "module": __name__}
    assert record["key"]["arguments"] == {"x": "tensor"}
    modes = record["key"]["modes"]
    assert (modes["grad mode"], modes["training flag"], modes["autocast"]) == (False, False, False)
    (argument,) = record["arguments"]
    assert argument["dims"] == ["rows", 8]
    assert argument["dynamic"] == {"0": "rows"}
    assert argument["example"] == [2, 8]
    assert record["labels"] == {"rows": 2}
    assert record["seconds"] == pytest.approx(entry.seconds, abs=1e-3)
    assert record["guards"] == len(entry.graph.guards)
    assert record["inputs"] == {"leaf": 1, "size": 1, "tensor": 4}


def test_guards_and_conditions(tmp_path: Path) -> None:
    """What Dynamo would have guarded, and the sizes for which the graph holds, in words."""
    region, folder, _ = _dumped(tmp_path)
    (entry,) = [e for found in region.entries.values() for e in found]
    guards = json.loads((folder / "guards.json").read_text())
    assert len(guards["guards"]) == len(entry.graph.guards) == sum(guards["counts"].values())
    assert "x.shape[1] == 8" in (folder / "conditions.txt").read_text().splitlines()


def test_data_flow_is_written(tmp_path: Path) -> None:
    """What each operation reads, its dtype, what each input and symbol is, and the model's lines round its own."""
    _dumped(tmp_path)
    (entry,) = Dump.open(tmp_path / "dump").entries
    ops = {op["name"]: op for op in entry.ops()}
    inputs = {row["name"]: row for row in entry.inputs()}
    assert [op["dtype"] for op in ops.values()] == ["f32"] * 8
    for op in ops.values():
        assert op["inputs"]
        assert all(name in ops or name in inputs for name in op["inputs"])
    (weight,) = [row for row in inputs.values() if row["is"] == "layers.1.linear.weight"]
    assert (weight["kind"], weight["shape"]) == ("tensor", ["8", "8"])
    assert weight["name"] in ops["hidden_1"]["inputs"]
    ((symbol, known),) = entry.symbols().items()
    assert known == {"label": "rows", "size": 2}
    assert ops["silu"]["shape"] == [symbol, "8"]
    assert "f32[rows, 8]" in entry.read("captured")
    source = ops["silu_1"]["source"]
    assert entry.sources()[source["file"]][source["line"]].strip() == source["code"]
    assert source["caller"].endswith("x = layer(x)")


def test_costs(tmp_path: Path) -> None:
    """Counted by hand: two products of rows x 8 x 8, two silus, two products, a sum and a scale."""
    _dumped(tmp_path)
    (entry,) = Dump.open(tmp_path / "dump").entries
    for rows in (2, 100):
        numbers = stats_of(entry, {"rows": rows})
        assert numbers.kind_costs["linear"].flops == 2 * (2 * rows * 8 * 8)
        assert numbers.kind_costs["silu"].flops == 2 * rows * 8
        assert numbers.cost.flops == 2 * (2 * rows * 64 + 2 * rows * 8) + rows * 8 + rows
        assert numbers.kind_costs["silu"].bytes == 2 * 2 * rows * 8 * 4
        assert numbers.cost.unknown == 0
    assert stats_of(entry).cost == stats_of(entry, {"rows": 2}).cost


@pytest.mark.parametrize(
    ("size", "value"),
    [("8", 8), ("s1 + s20", 11), ("((4*s20)//s1)", 10), ("Max(s1, s20)", 8), ("u0", None), ("s1 ** s20", None),
     ("__import__('os')", None), ("s1.real", None), ("9" * 300 + "*s1", None), ("1/0", None), ("(" * 300, None)],
)  # fmt: skip
def test_sizes_are_arithmetic(size: str, value: int | None) -> None:
    """A size from a dump is worked out, never run."""
    assert evaluated([size], {"s1": 3, "s20": 8}) == (None if value is None else (value,))
    assert labelled("s1 + s20", {"s1": {"label": "past"}, "s20": {"label": None}}) == "past + s20"


def test_values_of_a_printed_graph() -> None:
    """Inputs under their nodes' names, operations with what they read, whatever else a line has in it."""
    values = values_of(
        "class GraphModule(torch.nn.Module):\n"
        '    def forward(self, s0: "Sym(s0)", L_x_: "f32[s0, 8]"):\n'
        "        l_x_ = L_x_\n"
        '        dim: "f32[s0, 8][8, 1]cpu" = l_x_.dim(l_x_, dim = -1);  l_x_ = None\n'
        "        pair = torch.split(dim, 'dim')\n"
        "        return (pair,)\n"
    )
    assert values["l_x_"].shape == values["dim"].shape == ("s0", "8")
    assert (values["dim"].dtype, values["dim"].inputs) == ("f32", ("l_x_",))
    assert (values["pair"].shape, values["pair"].inputs) == (None, ("dim",))
    assert values["return"].inputs == ("pair",)


@pytest.mark.parametrize("grad", [False, True])
def test_kernels(tmp_path: Path, grad: bool) -> None:
    """Lowered graph, generated code and the operations in each kernel, with whatever lowers the graph."""
    region = _region(GraphDump(tmp_path), backend="inductor")
    _run(region, grad=grad)
    (entry,) = Dump.open(tmp_path).entries
    assert "torch.ops.aten." in entry.read("lowered")
    assert "cpp_fused" in entry.read("kernels")
    kernels = kernels_of(entry)
    assert any(len(k.lowered) > 2 and "silu" in k.captured for k in kernels if k.generated)
    assert "hidden" in {op for k in kernels if not k.generated for op in k.captured}
    if grad:
        assert {"aot_joint_graph", "aot_forward_graph", "aot_backward_graph"} <= set(entry.files)
    else:
        _of_packages(entry)


def _of_packages(entry: DumpedEntry) -> None:
    """Two blocks that share a package: each kernel of it has the operations of both, and those their lowered ones."""
    assert entry.record["road"] == "ahead"
    assert sorted(entry.record["segments"]) != sorted(set(entry.record["segments"]))
    assert len(entry.packages) == len({*entry.record["segments"], *entry.record["special"]})
    (shared,) = [k for k in kernels_of(entry) if k.times == 2 and "silu" in k.captured and not k.special]
    assert {"silu", "silu_1"} <= set(shared.captured)
    lowered = lowered_of(entry)
    assert lowered["silu"] == lowered["silu_1"]
    trail = op_trail(entry, "silu_1")
    assert trail.op["source"]["code"] == "return torch.nn.functional.silu(hidden) * x"
    assert trail.around[trail.op["source"]["line"]].strip() == trail.op["source"]["code"]
    assert shared in trail.kernels.values()
    back = kernel_trail(entry, shared.name)
    assert "silu_1" in [op["name"] for op in back.ops]
    assert shared.name in back.code
    numbers = stats_of(entry)
    general = [k for k in numbers.kernels if not k.special]
    assert numbers.kernel_calls == sum(k.times for k in general) > len(general)
    assert numbers.moved is not None
    assert 0 < numbers.moved < numbers.cost.bytes


def test_kernels_that_a_cache_has(tmp_path: Path) -> None:
    """When Inductor finds a graph in its cache, the dump is the same as when it was made."""
    net = Net(scale=random.SystemRandom().random()).eval()  # a constant that no cache has seen
    counters = torch._dynamo.utils.counters
    texts = []
    for name in ("first", "second"):
        before = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
        _run(_region(GraphDump(tmp_path / name), backend="inductor", module=net), grad=True)
        (entry,) = Dump.open(tmp_path / name).entries
        texts.append({kind: entry.read(kind) for kind in ("kernels", "lowered", "aot_forward_graph", "provenance")})
        hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
        assert (hits > before) == (name == "second")
    assert texts[0] == texts[1]


def test_entry_that_comes_ready(tmp_path: Path) -> None:
    """An entry that was not compiled here is dumped too: its graph, and the code that its packages carry."""
    region = _region(GraphDump(tmp_path / "made"), backend="inductor")
    _run(region)
    (entry,) = [e for found in region.entries.values() for e in found]
    GraphDump(tmp_path / "ready")(region, entry)
    (made,), (ready,) = Dump.open(tmp_path / "made").entries, Dump.open(tmp_path / "ready").entries
    assert ready.ops() == made.ops()
    for number in range(len(made.packages)):
        assert kernel_codes(ready, number) == kernel_codes(made, number) != {}
    assert {k.name for k in kernels_of(ready)} == {k.name for k in kernels_of(made) if k.generated}
    assert "came ready" in ready.record["notes"][0]
    assert stats_of(ready).moved is None
    assert page_of(Dump.open(tmp_path / "ready"))


def test_origins_can_be_left_out(tmp_path: Path) -> None:
    """Without origins Inductor's cache keys are those of a run without a dump; kernels still have names."""
    net = Net(scale=random.SystemRandom().random()).eval()
    _run(_region(None, backend="inductor", module=net), grad=True)
    counters = torch._dynamo.utils.counters["inductor"]
    before = counters["fxgraph_cache_hit"]
    _run(_region(GraphDump(tmp_path, origins=False), backend="inductor", module=net), grad=True)
    assert counters["fxgraph_cache_hit"] > before
    (entry,) = Dump.open(tmp_path).entries
    assert "provenance" not in entry.files
    assert any(kernel.name.startswith("cpp_fused") for kernel in kernels_of(entry))


# -- a dump never changes the run -------------------------------------------------------------------------------------


def _unharmed(region: Region) -> None:
    """The region compiles once and is right."""
    with torch.no_grad():
        x = torch.arange(40.0).reshape(5, 8) / 40
        torch.testing.assert_close(_run(region), region.module.forward(x))
    assert (region.graphs, region.entry_count(), region.fallback, region.eager_calls) == (1, 1, None, 0)


def test_generation_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder gives the same tokens with a dump as eager, from one graph; plan, events and runs are told."""
    monkeypatch.setattr(calls, "_EVERY", 0.0)
    model = tiny_model("llama")
    inputs = tiny_inputs(model, text_len=5)
    eager = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    compile_policy.apply(model, CompilationConfig(debug_dump_path=tmp_path, backend="aot_eager", on_fault="error"))
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), eager)
    (region,) = regions(model)
    assert (region.graphs, region.eager_calls) == (1, 0)
    (entry,) = Dump.open(tmp_path).entries
    (run,) = Dump.open(tmp_path).runs()
    (plan,) = run.plans()
    assert [c["role"] for c in plan["components"] if c["decision"] == "compile"] == ["decoder"]
    assert "compile_end" in {event["kind"] for event in run.events()}
    assert run.name == entry.record["run"]
    assert len(run.calls()) >= 4
    assert {call["entry"] for call in run.calls()} == {entry.id}
    text = entry.read("captured")
    ast.parse(text)
    assert "  # layers.1.self_attn.q_proj.weight" in text
    assert re.search(r"modeling_llama\.py:\d+: query_states = self.q_proj", text)
    assert {"batch", "sequence", "past"} <= set(entry.record["labels"])


def _broken(how: Callable[..., str]) -> types.ModuleType:
    module = types.ModuleType("depyf")
    module.decompile = how  # type: ignore[attr-defined]
    return module


def _fail(code: types.CodeType) -> str:
    raise KeyError("opcode")


def _exit(code: types.CodeType) -> str:
    raise SystemExit(3)


def _endless(code: types.CodeType) -> str:
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("depyf", "says"),
    [
        (None, "depyf is not installed"),
        (_broken(_fail), "depyf failed with KeyError"),
        (_broken(_exit), "depyf failed with SystemExit"),
        (_broken(_endless), "depyf was not done after 0.3 s"),
    ],
)
def test_depyf_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depyf: Any, says: str) -> None:
    """Without depyf the instructions are written, the index says why, and nothing runs on in the background."""
    monkeypatch.setitem(sys.modules, "depyf", depyf)
    region = _region(GraphDump(tmp_path, depyf_seconds=0.3))
    with _events() as events:
        _unharmed(region)
    assert "skipped" not in {event.kind for event in events}
    (entry,) = Dump.open(tmp_path).entries
    assert says in entry.record["notes"][0]
    assert entry.files["bytecode"] == "bytecode.txt"
    assert "RETURN_VALUE" in entry.read("bytecode")
    deadline = time.monotonic() + 10
    while any(thread.name == "compile_policy-depyf" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """One event however many entries, and the run goes on."""
    (tmp_path / "file").write_text("")
    dump = GraphDump(tmp_path / "file" / "dump")
    with _events() as events:
        _unharmed(_region(dump))
        _unharmed(_region(dump))
    (event,) = [event for event in events if event.kind == "skipped"]
    assert str(tmp_path / "file" / "dump") in event.message


def test_calls_are_timed_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many runs are noted and no more; then the graph is as it was, and was what a trace makes of it all along."""
    monkeypatch.setattr(calls, "MOST_CALLS", 3)
    monkeypatch.setattr(calls, "_EVERY", 0.0)
    region = _region(GraphDump(tmp_path))
    first = _run(region)
    (entry,) = [e for found in region.entries.values() for e in found]
    seen = []
    cls = type(entry.graph)
    entry.graph.__class__ = type(
        "Traced", (cls,), {"run": lambda self, leaves: seen.append(1) or cls.run(self, leaves)}
    )
    for _ in range(4):
        assert torch.equal(_run(region), first)
    assert len(seen) == 4
    assert "run" not in vars(entry.graph)
    assert len(Dump.open(tmp_path).runs()[0].calls()) == 3


def test_runs_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events and calls stop at their limit, and a folder that goes away stops nothing."""
    monkeypatch.setattr(runs, "MAX_BYTES", 1500)
    dump = GraphDump(tmp_path / "dump")
    for _ in range(50):
        emit("note", "component net", "said again and again")
    (path,) = (tmp_path / "dump" / "runs").glob("*/events.jsonl")
    assert 1000 < path.stat().st_size <= 1500
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    shutil.rmtree(tmp_path / "dump")
    (tmp_path / "dump").write_text("in the way")
    with _events() as events:
        emit("note", "component net", "said once more")
    assert len(events) == 1
    del dump


def test_events_end_with_the_dump(tmp_path: Path) -> None:
    """Nothing is written for a dump that nobody has any more."""
    dump = GraphDump(tmp_path)
    emit("note", "", "while it lives")
    del dump
    gc.collect()
    emit("note", "", "afterwards")
    assert [event["message"] for event in Dump.runs(Dump(tmp_path, ()))[0].events()] == ["while it lives"]


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full in the middle of an entry leaves no half entry behind."""
    write, written = folder._write_private, []

    def fills_up(path: Path, data: bytes) -> None:
        written.append(path)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(folder, "_write_private", fills_up)
    with _events() as events:
        _unharmed(_region(GraphDump(tmp_path)))
    assert len(written) == 3
    assert [event.kind for event in events].count("skipped") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "runs" not in path.parts]


def test_listening_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the compile cannot be watched, the rest is written and the index says what is missing."""

    def refuse(hook: Any) -> None:
        raise AttributeError("register_bytecode_hook")

    monkeypatch.setattr("compile_policy.graphs.recording.on_bytecode", refuse)
    with _events() as events:
        _unharmed(_region(GraphDump(tmp_path)))
    assert [event.kind for event in events].count("skipped") == 1
    (entry,) = Dump.open(tmp_path).entries
    assert "not recorded" in entry.record["notes"][0]
    assert "captured" in entry.files


def test_recording_leaves_nothing_behind(tmp_path: Path) -> None:
    """Hooks, handlers and configuration are as before, also when the compile raises."""
    hooks = torch._dynamo.convert_frame._bytecode_hooks
    before = (list(structured_trace().handlers), dict(hooks), inductor.trace.provenance_tracking_level)
    dump = GraphDump(tmp_path)
    with pytest.raises(ZeroDivisionError), dump.recording():
        assert len(structured_trace().handlers) == len(before[0]) + 1
        raise ZeroDivisionError
    assert (structured_trace().handlers, dict(hooks), inductor.trace.provenance_tracking_level) == before
    assert not list(tmp_path.iterdir())


def test_configuration(tmp_path: Path) -> None:
    """``debug_dump_path`` is what asks for a dump."""
    assert region_options(CompilationConfig()).dump is None
    options = region_options(CompilationConfig(debug_dump_path=tmp_path, backend="aot_eager"))
    region = _region(None)
    region.options = options
    _unharmed(region)
    assert [entry.component for entry in Dump.open(tmp_path).entries] == ["component net"]


# -- names, limits, company -------------------------------------------------------------------------------------------


def test_names_stay_inside(tmp_path: Path) -> None:
    """Separators, escapes and markup in names reach no path and no terminal, and no Python that is written."""
    victim = type(VICTIM, (Net,), {})().eval()
    root = tmp_path / "a" / "b" / "dump"
    _unharmed(_region(GraphDump(root), qualname=VICTIM, module=victim))
    assert {path.name for path in tmp_path.rglob("*") if not path.is_relative_to(root)} == {"a", "b"}
    assert [path.name for path in root.parent.iterdir()] == ["dump"]
    for path in root.rglob("*"):
        assert re.fullmatch(r"[A-Za-z0-9._-]+", path.name), path
        if path.is_file():
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", path.read_text("utf-8")), path
    (entry,) = Dump.open(root).entries
    assert entry.record["component"]["qualname"] == VICTIM  # as JSON spells it, for whoever escapes it
    body = ast.parse(entry.read("captured")).body
    assert [type(node) for node in body] == [ast.ClassDef]


@pytest.mark.parametrize("name", ["..", "/etc/passwd", "a/../../b", "", "\x1b[2J", "x" * 500, "CON:<>|", "\ud800"])
def test_file_names(name: str) -> None:
    """Any name becomes one path segment, and different names different ones."""
    safe = file_name(name)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", safe)
    assert file_name(name + "!") != safe


def test_ordinary_names_are_kept() -> None:
    """A component's folder says which one it is."""
    assert file_name("decoder model.language_model") == "decoder-model.language_model"
    assert file_name("encoder[image] model.visual") == "encoder-image-model.visual"


def test_size_limit(tmp_path: Path) -> None:
    """What exceeds the limit is left out and noted in the index; the entry and the run are whole."""
    _unharmed(_region(GraphDump(tmp_path, max_bytes=3000)))
    index = json.loads((tmp_path / "index.json").read_text())
    (record,) = index["entries"]
    assert record["bytes"] <= 3000
    assert "ops.json is left out" in " ".join(index["notes"])
    for name in record["files"].values():
        assert (tmp_path / record["id"] / name).is_file()
    assert "ops" not in record["files"]


def _write_entries(root: Path, run: str) -> None:
    dump = folder.DumpFolder(root, 10**6)
    for i in range(15):
        entry = dump.new_entry("decoder model")
        entry.write("text", "text.txt", run)
        dump.publish(entry, {"id": entry.id, "run": run, "written": str(i), "notes": []})


def test_several_processes(tmp_path: Path) -> None:
    """Processes that write into one folder lose none of each other's entries."""
    context = multiprocessing.get_context("fork")  # a fresh one would spend seconds on importing torch
    processes = [context.Process(target=_write_entries, args=(tmp_path, run)) for run in ("a", "b", "c")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    entries = Dump.open(tmp_path).entries
    assert len({entry.id for entry in entries}) == 45
    assert {entry.record["run"] for entry in entries} == {"a", "b", "c"}


def test_one_index_at_a_time(tmp_path: Path) -> None:
    """Who writes the index waits for whoever is at it, else the later one would undo the earlier."""
    writer = threading.Thread(target=_write_entries, args=(tmp_path, "a"))
    with FileLock(tmp_path / ".index.lock"):
        writer.start()
        deadline = time.monotonic() + 10
        while not list(tmp_path.glob("*/*/entry.json")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
        assert not (tmp_path / "index.json").exists()
    writer.join(30)
    assert len(Dump.open(tmp_path).entries) == 15


def test_entries_of_one_folder(tmp_path: Path) -> None:
    """Components, and runs after one another, share a folder; what is no entry is not listed."""
    for qualname in ("first", "second", "first"):
        _run(_region(GraphDump(tmp_path), qualname=qualname))
    (tmp_path / "component-first" / "entry-7").mkdir()
    (tmp_path / "component-first" / "entry-7" / "entry.json").write_text('{"id": ')
    _run(_region(GraphDump(tmp_path), qualname="second"))
    ids = [entry.id for entry in Dump.open(tmp_path).entries]
    assert ids == [
        f"component-{name}" for name in ("first/entry-0", "second/entry-0", "first/entry-1", "second/entry-1")
    ]


# -- reading ----------------------------------------------------------------------------------------------------------


def test_reading_stays_inside(tmp_path: Path) -> None:
    """A dump from elsewhere cannot make us open a file outside of it."""
    (tmp_path / "secret").write_text("secret")
    root = tmp_path / "dump"
    _run(_region(GraphDump(root)))
    index = json.loads((root / "index.json").read_text())
    for name in ("../../../secret", str(tmp_path / "secret")):
        index["entries"][0]["files"]["captured"] = name
        (root / "index.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match="outside of the dump"):
            Dump.open(root).entries[0].read("captured")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99, "entries": []}', '{"schema": 1}'])
def test_damaged_index(tmp_path: Path, text: str) -> None:
    """An index that isn't one is refused in a sentence."""
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(InputError, match=r"index\.json is no"):
        Dump.open(tmp_path)


# -- example ----------------------------------------------------------------------------------------------------------


def test_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example runs, and says what is in its dump."""
    path = Path(__file__).resolve().parents[1] / "examples" / "dump_graphs.py"
    runpy.run_path(str(path))["main"](str(tmp_path))
    (entry,) = Dump.open(tmp_path).entries
    out = capsys.readouterr().out
    assert f"{entry.id}: Qwen2_5_VLTextModel, {entry.record['ops']} operations" in out
    assert "batch" in out
    assert "torch.nn.functional.silu" in out
