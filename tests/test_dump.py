"""Dumps: everything that there is to see about an entry, and a run that is the same with and without."""

from __future__ import annotations

import ast
import json
import random
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from compile_policy.events import Event, listening
from compile_policy.graphs import Dump, GraphDump
from compile_policy.region import Region, RegionOptions, SignatureBinder

VICTIM = "<img src=x onerror=alert(1)>\x1b[31m../../evil\nraise SystemExit  # "


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


def _run(region: Region, rows: int = 5) -> torch.Tensor:
    with torch.no_grad(), region.options.dump.recording():
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
    assert set(record["files"]) == {"captured", "conditions", "guards", "ops", "aot_inference_graph", "bytecode"}
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
    assert record["key"]["modes"] == {"grad": False, "inference": False, "training": False, "autocast": False}
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


def test_kernels_are_written_also_from_the_cache(tmp_path: Path) -> None:
    """Lowered graph and generated code are in the dump, when they are made and when a cache has them."""
    net = Net(scale=random.SystemRandom().random()).eval()  # a constant that no cache has seen
    counters = torch._dynamo.utils.counters
    texts = []
    for name in ("first", "second"):
        before = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
        dump = GraphDump(tmp_path / name)
        _run(_region(dump, backend="inductor", module=net))
        (entry,) = Dump.open(tmp_path / name).entries
        texts.append((entry.read("output_code"), entry.read("post_grad_graph"), entry.read("aot_inference_graph")))
        hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
        assert (hits > before) == (name == "second")
    assert texts[0] == texts[1]
    assert "def call(" in texts[0][0]
    assert "torch.ops.aten." in texts[0][1]
    assert "async_compile." in texts[0][0]
