"""``compile-policy graphs``: what it prints is what the dump holds, and a name cannot move the cursor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compile_policy.cli import main
from compile_policy.graphs import GraphDump
from compile_policy.region import Region, RegionOptions, SignatureBinder

Run = Callable[..., str]


class Gated(torch.nn.Module):
    """Two lines of model."""

    def __init__(self, act: Any = torch.nn.functional.silu) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.act(self.linear(x))
        return (gate * x).softmax(-1)


class Deep(torch.nn.Module):
    """The same block over and over."""

    def __init__(self, depth: int, last: Any = torch.nn.functional.silu) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Gated(last if i == depth - 1 else torch.tanh) for i in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _dump(root: Path, module: torch.nn.Module, qualname: str = "net", *, backend: str = "aot_eager") -> None:
    options = RegionOptions(backend=backend, on_fault="error", dump=GraphDump(root))
    binder = SignatureBinder({"x": {0: "rows"}})
    region = Region(module.eval(), role="component", qualname=qualname, binder=binder, options=options)
    with torch.no_grad():
        region(x=torch.ones(3, 8))


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump of two components, one lowered by Inductor; a dump of an equal module, and one of a slightly other one."""
    root = tmp_path_factory.mktemp("dumps")
    _dump(root / "one", Gated(), backend="inductor")
    _dump(root / "one", Gated(torch.tanh), "\x1b[31mother<b>")
    _dump(root / "two", Gated(torch.nn.functional.gelu))
    _dump(root / "same", Gated(torch.nn.functional.gelu))
    _dump(root / "deep", Deep(6, torch.tanh), backend="eager")
    _dump(root / "other", Deep(6), backend="eager")
    return root


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command of the group; returns standard output."""

    def command(*argv: object, code: int = 0) -> str:
        assert main(["graphs", *map(str, argv)]) == code
        return capsys.readouterr().out

    return command


def test_ls(dumps: Path, run: Run) -> None:
    """Entries with class, operations, inputs and dynamic dims; ``--json`` is the index."""
    out = run("ls", dumps / "one")
    line = next(line for line in out.splitlines() if "component-net/entry-0" in line)
    assert line.split()[1:4] == ["Gated", "4", "4"]
    assert "rows" in line
    assert "\x1b" not in out
    entries = json.loads(run("ls", dumps / "one", "--json"))["entries"]
    assert [entry["component"]["cls"] for entry in entries] == ["Gated", "Gated"]


def test_narrow_screens(dumps: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room for a table, no name is broken."""
    monkeypatch.setenv("COLUMNS", "60")
    assert "component-net/entry-0" in run("ls", dumps / "one").splitlines()
    assert "component-net/entry-0: result = softmax f32[rows, 8]" in run("find", dumps / "one", "softmax")
    assert "gate = self.act(self.linear(x))" in run("show", dumps / "one", "component-net")


def test_show(dumps: Path, run: Run) -> None:
    """The captured graph has the model's line beside each operation; an entry may be named in three ways."""
    out = run("show", dumps / "one", "component-net/entry-0")
    silu = next(line for line in out.splitlines() if "silu" in line)
    assert silu.endswith("gate = self.act(self.linear(x))")
    assert f"{Path(__file__).name}:" in silu
    assert run("show", dumps / "one" / "component-net" / "entry-0") == out
    assert run("show", dumps / "one", "component net") == out
    assert run("show", dumps / "one", "component-net") == out


def test_show_other_files(dumps: Path, run: Run) -> None:
    """Generated code and bytecode are one option away."""
    entry = dumps / "one" / "component-net"
    assert "cpp_fused" in run("show", entry, "--file", "kernels")
    assert "torch.ops.aten." in run("show", entry, "--file", "lowered")
    assert "__compiled_fn" in run("show", entry, "--file", "bytecode")
    shown = json.loads(run("show", entry, "--file", "conditions", "--json"))
    assert "x.shape[1] == 8" in shown["text"]
    assert [op["op"] for op in json.loads(run("show", entry, "--json"))["ops"]] == ["linear", "silu", "mul", "softmax"]


def test_show_an_operation_and_its_kernel(dumps: Path, run: Run) -> None:
    """Forward from an operation to its line and kernel, and back from the kernel to the operation and the line."""
    entry = dumps / "one" / "component-net"
    out = run("show", entry, "--op", "gate")
    assert "gate = self.act(self.linear(x))" in out
    assert "aten." in out
    shown = json.loads(run("show", entry, "--json", "--op", "gate"))
    (kernel,) = shown["kernels"]
    assert kernel["name"].startswith("cpp_fused")
    assert "> " in out
    out = run("show", entry, "--kernel", kernel["name"])
    assert "gate = self.act(self.linear(x))" in out
    assert "extern" in out
    back = json.loads(run("show", entry, "--json", "--kernel", kernel["number"]))
    assert "gate" in [op["name"] for op in back["ops"]]
    assert back["kernel"]["name"] == kernel["name"]
    library = next(k for k in json.loads(run("stats", entry, "--json"))["entries"][0]["kernels"] if not k["generated"])
    assert "a library's" in run("show", entry, "--kernel", library["name"])


@pytest.mark.parametrize("columns", ["80", "200"])
def test_repeated_blocks_are_shown_once(dumps: Path, run: Run, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    """Six equal blocks are one and a remark; ``--all`` shows each, and what differs is never left out."""
    monkeypatch.setenv("COLUMNS", columns)
    out = run("show", dumps / "deep")
    assert out.count("torch.tanh(") == 1
    assert "layers.1 ... layers.5: the same operations as layers.0 (--all)" in out
    assert "and 10 like these in the other blocks" in out
    assert run("show", dumps / "deep", "--all").count("torch.tanh(") == 6
    other = run("show", dumps / "other")
    assert other.count("silu(") == 1
    assert "layers.1 ... layers.4: the same" in other
    assert run("find", dumps / "deep", "tanh").count("(x6)") == 1
    assert run("find", dumps / "deep", "tanh", "--all").count("gate = self.act(self.linear(x))") == 6
    assert len(json.loads(run("find", dumps / "deep", "tanh", "--json"))["hits"]) == 6


def test_costs_are_told(dumps: Path, run: Run) -> None:
    """Six products of rows x 8 x 8, at the sizes that are asked for."""
    (entry,) = json.loads(run("stats", dumps / "deep", "--at", "rows=50", "--json"))["entries"]
    assert entry["kind_costs"]["linear"]["flops"] == 6 * 2 * 50 * 8 * 8
    out = run("stats", dumps / "deep", "--at", "rows=50")
    assert "38.4 k" in out
    assert "layers.*.linear" in out
    assert "rows=50" in out


def test_what_differs_first(dumps: Path, run: Run) -> None:
    """One sentence says it; what many blocks repeat is told once."""
    out = run("diff", dumps / "deep", dumps / "other", code=1)
    assert "first: operation 21 is silu f32[rows, 8], was torch.tanh f32[rows, 8]" in out
    assert "2 operations differ in 1 places" in out
    out = run("diff", dumps / "deep", dumps / "one" / "component-net", code=1)
    assert json.loads(run("diff", dumps / "deep", dumps / "other", "--json", code=1))["first"].startswith(
        "operation 21"
    )


def test_stats(dumps: Path, run: Run) -> None:
    """Operations by kind and line, and how many went into each kernel."""
    (entry,) = json.loads(run("stats", dumps / "one", "component-net", "--json"))["entries"]
    assert entry["kinds"] == {"linear": 1, "silu": 1, "mul": 1, "softmax": 1}
    assert sorted(entry["lines"].values()) == [2, 2]
    assert any(len(k["lowered"]) > 2 and "silu" in " ".join(k["captured"] + [k["name"]]) for k in entry["kernels"])
    out = run("stats", dumps / "one")
    assert "lowered operations fused" in out
    assert "no kernels" in out  # the other component's backend makes none


def test_find(dumps: Path, run: Run) -> None:
    """An operation by kind, in every entry; none is exit code 1."""
    assert run("find", dumps / "one", "softmax").count("return (gate * x).softmax(-1)") == 2
    (hit,) = json.loads(run("find", dumps / "one", "silu", "--json"))["hits"]
    assert hit["source"]["code"] == "gate = self.act(self.linear(x))"
    assert run("find", dumps / "one", "conv3d", code=1) == ""


def test_diff(dumps: Path, run: Run) -> None:
    """The operation that differs, and only that; equal graphs are said to be equal."""
    out = run("diff", dumps / "one" / "component-net", dumps / "two", code=1)
    signs = [line[0] for line in out.splitlines() if line.startswith(("- ", "+ ")) and " = " in line]
    assert signs == ["-", "+"]
    assert "= silu" in out
    assert "gelu" in out
    found = json.loads(run("diff", dumps / "one" / "component-net", dumps / "two", "--json", code=1))
    assert [change["position"] for change in found["changes"]] == [1]
    assert {"what": "backend", "first": "inductor", "second": "aot_eager"} in found["facts"]
    assert json.loads(run("diff", dumps / "two", dumps / "same", "--json"))["equal"] is True
    assert "the same" in run("diff", dumps / "two", dumps / "same")


def test_names_cannot_move_the_cursor(dumps: Path, run: Run) -> None:
    """Escapes and markup in a component's name come out as text."""
    for out in (run("ls", dumps / "one"), run("stats", dumps / "one"), run("find", dumps / "one", "tanh")):
        assert "\x1b" not in out
    other = json.loads(run("ls", dumps / "one", "--json"))["entries"][1]["id"]
    assert "\x1b" not in run("show", dumps / "one", other)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["ls", "absent"], "no folder absent"),
        (["ls", "."], "is no dump"),
        (["show", "one", "component-nett"], "There are: component-net/entry-0, "),
        (["show", "one"], "fits several"),
        (["show", "one", "component-net", "--file", "kernles"], "it has captured, ops"),
        (["show", "one/component-net", "entry-0"], "names an entry already"),
        (["diff", "one", "two"], "fits several"),
        (["stats", "one", "--top", "0"], "--top"),
        (["stats", "one", "--at", "rows"], "is no list of sizes"),
        (["stats", "one", "--at", "rows=-1"], "is no list of sizes"),
        (["stats", "one", "--at", "=1"], "is no list of sizes"),
        (["stats", "one", "--at", "foo=1"], "no dim is called that"),
        (["stats", "one", "--at", "rows=1,foo=1"], "--at foo: no dim"),
        (["show", "two", "--op", "nothing"], "has no operation 'nothing'"),
        (["show", "two", "--kernel", "nothing"], "has no kernel 'nothing'"),
        (["show", "two", "--kernel", "0", "--op", "gate"], "ask for different things"),
        (["html", "two", "absent/page.html"], "cannot write absent/page.html"),
    ],
)
def test_mistakes(
    dumps: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: list[str], says: str
) -> None:
    """Each is one line with exit code 2."""
    monkeypatch.chdir(dumps)
    assert main(["graphs", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
