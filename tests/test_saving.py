"""An entry as files and back: bound by place, refused where it does not fit, compiled again where it is of no use."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from falling import falls_back
from torch import nn

from compile_policy import compat
from compile_policy.artifacts import ArtifactKey, Miss, Store, open_store
from compile_policy.binder import SignatureBinder
from compile_policy.events import Event, listening
from compile_policy.region import Region, RegionOptions
from compile_policy.saving import sources
from compile_policy.saving.conditions import check_conditions
from compile_policy.saving.factors import entry_factors
from compile_policy.saving.form import ENTRY, READABLE, Unsaveable, from_files, to_files

FACTOR = 1.0


class Scales(nn.Module):
    """A parameter, a buffer and a tensor in a list, each in the graph."""

    offset: torch.Tensor

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))
        self.register_buffer("offset", torch.rand(width))
        self.tables = [torch.rand(width)]

    def forward(self, x: torch.Tensor, twice: bool = False) -> dict[str, Any]:
        y = x * self.weight * FACTOR + self.offset + self.tables[0]
        return {"y": y + y if twice else y, "n": None}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    found = open_store(tmp_path_factory.mktemp("store") / "cache", {})
    assert found is not None
    return found


def region_for(module: nn.Module, store: Store | None) -> Region:
    return Region(module, role="t", binder=SignatureBinder({"x": {0: None}}), options=RegionOptions(store=store))


@pytest.fixture(scope="module")
def saved(store: Store) -> Iterator[tuple[Region, list[Event]]]:
    """A region that has compiled and saved one entry, and what was heard."""
    heard: list[Event] = []
    with pytest.MonkeyPatch.context() as patch, listening(heard.append), torch.no_grad():
        patch.setattr(sources, "_STARTED", sources._STARTED + 1e9)  # this file may be newer than the process
        region = region_for(Scales(), store)
        region(torch.rand(3, 4))
        yield region, heard


def entry_of(region: Region) -> Any:
    [[entry]] = region.entries.values()
    return entry


@torch.no_grad()
def test_another_checkpoint_hits(store: Store, saved: tuple[Region, list[Event]]) -> None:
    """Other weights, other sizes; nothing is captured, and the result is that module's own."""
    assert [event.kind for event in saved[1]] == ["miss", "compile_start", "compile_end", "saved"]
    region, heard = region_for(Scales(), store), list[Event]()
    with listening(heard.append):
        for size in (3, 1, 0, 17):
            x = torch.rand(size, 4)
            result = region(x)
            torch.testing.assert_close(result, region.module.forward(x))
    assert [event.kind for event in heard] == ["loaded"]
    assert (region.graphs, region.loaded, region.eager_calls) == (0, 1, 0)
    assert region.report().loaded == 1 and region.report().compile_seconds == 0
    first, second = entry_of(saved[0]).graph, entry_of(region).graph
    assert second.readable == first.readable and second.sources == first.sources and second.guards == first.guards
    assert [a.kind for a in second.arguments] == [a.kind for a in first.arguments]
    assert {w.name for w in second.watched}


@torch.no_grad()
def test_weights_are_not_in_the_files(saved: tuple[Region, list[Event]]) -> None:
    """Neither as bytes nor as numbers; every bound tensor is a place."""
    module: Any = saved[0].module
    entry = entry_of(saved[0])
    files = to_files(entry, module)
    for tensor in (module.weight, module.offset, module.tables[0]):
        assert not any(tensor.numpy().tobytes() in data for data in files.values())
    document = json.loads(files[ENTRY])
    assert sorted(record["place"] for record in document["bound"]) == ["offset", "tables[0]", "weight"]
    assert all(not name.endswith((".pkl", ".pickle")) and not data.startswith(b"\x80") for name, data in files.items())


@torch.no_grad()
def test_a_component_that_does_not_fit_is_refused(saved: tuple[Region, list[Event]]) -> None:
    """A missing tensor, another shape, dtype or stride: named, and no native code is loaded for it."""
    region = saved[0]
    files = to_files(entry_of(region), region.module)
    call = region.bind((torch.rand(3, 4),), {})
    assert from_files(files, region.module, call) is not None
    other = Scales()
    del other.offset
    with pytest.raises(Unsaveable, match="offset is missing"):
        from_files(files, other, call)
    for change in (Scales(5), Scales().double()):
        with pytest.raises(Unsaveable, match="was"):
            from_files(files, change, call)
    document = json.loads(files[ENTRY])
    for conditions in (["s[0][0] == 99"], ["__import__('os').system('true')"]):
        bad = {**files, ENTRY: json.dumps({**document, "conditions": conditions}).encode()}
        if "99" in conditions[0]:
            assert from_files(bad, region.module, call) is None, "it holds for other sizes"
        else:
            with pytest.raises(ValueError, match="condition"):
                from_files(bad, region.module, call)
    for relation in ("(s[0][0] != 1)", "__import__('os').system('true')"):
        other_sizes = {**files, ENTRY: json.dumps({**document, "passed_over": [relation]}).encode()}
        if "!=" in relation:  # it serves one row after a look at what it does there
            again = from_files(other_sizes, region.module, call)
            assert again is not None and again.graph.accepts.unlike([torch.empty(1, 4)]) == (relation,)
        else:
            with pytest.raises(ValueError, match="condition"):
                from_files(other_sizes, region.module, call)


@torch.no_grad()
@pytest.mark.parametrize("name", [ENTRY, READABLE, "package-0.pt2"])
def test_what_cannot_be_used_is_compiled_again(store: Store, saved: tuple[Region, list[Event]], name: str) -> None:
    """A verified artifact that is nonsense all the same: a miss with the reason, and the next one takes its place."""
    region = saved[0]
    call = region.bind((torch.rand(3, 4),), {})
    shelf = region_for(Scales(), store).shelf
    assert shelf is not None
    place = shelf.place(call)
    assert place is not None and place.load() is not None
    [(_, factors)] = place.variants
    index = shelf.index(factors)
    assert index is not None
    key = index.key(factors)
    good = store.load(key)
    assert not isinstance(good, Miss)
    store.remove(key.digest)
    nonsense = zlib.compress(b"{}") if name == READABLE else b"{}"
    store.save(key, {**good.files, name: nonsense}, {})
    heard: list[Event] = []
    with listening(heard.append):
        assert place.load() is None
    assert heard[-1].kind == "miss" and heard[-1].data["reason"]
    assert not isinstance(store.load(key), Miss), "what a start cannot use may be good for another"
    store.remove(key.digest)
    store.save(key, good.files, good.meta)
    assert place.load() is not None


@torch.no_grad()
def test_what_is_not_saved_is_said_once(store: Store, saved: tuple[Region, list[Event]]) -> None:
    """A graph of the run-time compiler; a tensor that has no place in the component."""
    region, entry = saved[0], entry_of(saved[0])
    call = region.bind((torch.rand(3, 4),), {})
    shelf = region.shelf
    assert shelf is not None
    place = shelf.place(call)
    assert place is not None
    heard: list[Event] = []
    with listening(heard.append):
        for _ in range(2):
            place.save(
                replace(entry, graph=replace(entry.graph, program=None, why_jit="it has gradients")), call.labels
            )
            place.save(replace(entry, graph=replace(entry.graph, bound=[torch.rand(2)])), call.labels)
    assert [event.kind for event in heard] == ["unsaved", "unsaved"]
    assert "run time, it has gradients" in heard[0].message
    assert "torch.float32 tensor (2)" in heard[1].message


@torch.no_grad()
def test_load_only_compiles_nothing(store: Store, saved: tuple[Region, list[Event]]) -> None:
    """What is stored is used, anything else runs eager; nothing is concluded for later."""
    region = region_for(Scales(), store)
    region.options = replace(region.options, load_only=True)
    x = torch.rand(3, 4)
    region(x)
    with falls_back("the store has no entry for this call"):
        torch.testing.assert_close(region(x, twice=True), region.module.forward(x, twice=True))
    assert (region.graphs, region.loaded, region.eager_calls) == (0, 1, 1)
    assert not region.refused


@torch.no_grad()
def test_a_global_that_changes_after_loading_is_noticed(
    store: Store, saved: tuple[Region, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loaded entry watches the globals that its code names, as a traced one does."""
    region = region_for(Scales(), store)
    region(torch.rand(3, 4))
    before = region.fingerprint.current(look_again=True)
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    assert region.fingerprint.current(look_again=True) != before
    monkeypatch.undo()
    assert region.fingerprint.current(look_again=True) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_unpacked_package_stays_behind(saved: tuple[Region, list[Event]]) -> None:
    """Torch unpacks a package into a temporary folder; once its library is mapped, nothing of it is left on disk."""
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/aotinductor_" in line]
    assert mapped and all(line.endswith("(deleted)") for line in mapped)


def test_conditions_are_read_before_they_run() -> None:
    """Sizes, numbers, arithmetic and comparisons pass; anything that reaches further does not."""
    check_conditions(["s[0][0] == 3", "(2*s[1][0] + max(1, s[0][1]) // 2 >= s[2][0] % 8)", "True"])
    check_conditions(["(math.ceil(s[0][1] / 12) != 1)", "(s[0][0] == math.sqrt(float(s[0][1])))"])
    for bad in (
        *("__import__('os')", "s.__class__", "s[0].__class__", "s[i][0] == 1", "open('x')", "[1 for _ in s]", "s"),
        *("math.factorial(s[0][0])", "math.ceil.__self__", "s.ceil(1)"),
        *("(lambda: 1)()", "s[0][0] == 'a'", "max(s)", "max(1, key=2)", "x := 1", "s[0][0] and", "f'{s}'", "s[0][0:1]"),
    ):
        with pytest.raises(ValueError, match="condition"):
            check_conditions([bad])


def test_settings_of_inductor_have_no_place_in_them() -> None:
    """No path, no name of a compiler, nothing that a compile leaves behind; a pass of the user's is found."""
    settings = compat.inductor_settings()
    assert not any("/" in repr(value) for value in settings.values())
    assert not {"cpp.cxx", "aot_inductor.metadata"} & settings.keys()
    assert compat.inductor_passes() == [] and compat.cpu_capability()
    with torch._inductor.config.patch(post_grad_custom_pre_pass=lambda graph: None):
        assert compat.inductor_passes() == ["post_grad_custom_pre_pass"]


def test_keys_of_the_store_take_the_factors() -> None:
    """Factors are JSON, nested by what they are about."""
    region = region_for(Scales(), None)
    call = region.bind((torch.rand(3, 4),), {})
    factors = entry_factors(region.module, call, {"backend": "inductor"}, region.binder)
    assert ArtifactKey(factors) == ArtifactKey(json.loads(json.dumps(factors)))
