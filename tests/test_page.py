"""The page of graphs: one file, all of it data, each part a click from the next, in a browser too."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from chromium import Page, chromium, find

from compile_policy.cli import main
from compile_policy.events import emit
from compile_policy.graphs import Dump, GraphDump
from compile_policy.graphs.page import MAX_PAGE, page_of
from compile_policy.graphs.report import ReportFailed, report_of
from compile_policy.region import Region, RegionOptions, SignatureBinder

VICTIM = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202e{{ 7*7 }}"
WEB = Path(__file__).resolve().parents[1] / "compile_policy" / "graphs" / "web"


class Block(torch.nn.Module):
    """One block of a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.nn.functional.silu(self.linear(x))
        return x + gate * x


class Stack(torch.nn.Module):
    """Blocks, all the same."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Block() for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sum(-1)


def _dump(root: Path, module: torch.nn.Module, qualname: str, backend: str) -> GraphDump:
    dump = GraphDump(root)
    binder = SignatureBinder({"x": {0: "rows"}})
    options = RegionOptions(backend=backend, on_fault="error", dump=dump)
    region = Region(module.eval(), role="component", qualname=qualname, binder=binder, options=options)
    with torch.no_grad():
        region(x=torch.ones(3, 8))
    return dump


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump of a stack lowered by Inductor, and of a deep one with a hostile name."""
    root = tmp_path_factory.mktemp("page") / "dump"
    _dump(root, Stack(3), "stack", "inductor")
    hostile = type(VICTIM, (Stack,), {})(64)
    kept = _dump(root, hostile, VICTIM, "eager")
    emit("fallback", f"component {VICTIM}", f"runs eager: {VICTIM}", reason=VICTIM, remedy="")
    del kept
    return root


@pytest.fixture(scope="module")
def text(root: Path) -> str:
    return page_of(Dump.open(root))


class _Parsed(HTMLParser):
    """Elements with their attributes, and what scripts and styles hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self._now = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._now = tag if tag in self.inside else ""
        if self._now:
            self.inside[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._now = ""

    def handle_data(self, data: str) -> None:
        if self._now:
            self.inside[self._now][-1] += data

    @property
    def data(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self.inside["script"][0])
        return data


# -- without a browser ------------------------------------------------------------------------------------------------


def test_one_file_that_loads_nothing(text: str) -> None:
    """Nothing refers to a file or an address, and the policy allows exactly the page's own script and style."""
    page = _Parsed(text)
    for tag, attributes in page.elements:
        assert not {"src", "srcset", "data", "action", "style"} & attributes.keys(), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#")
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
    policy = next(a["content"] or "" for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    for tag, code in (("script", page.inside["script"][1]), ("style", page.inside["style"][0])):
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_names_are_data(text: str) -> None:
    """Markup, escapes and templates in names and reasons come out as text, and open no element."""
    page = _Parsed(text)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert "&lt;img src=x onerror=alert(2)&gt;" in text  # for readers without scripts
    assert "{{ 7*7 }}" in text
    assert any("<img src=x onerror=alert(2)>" in entry["component"] for entry in page.data["entries"])


def test_script_makes_no_markup() -> None:
    """The page's script builds elements and text, and parses nothing that a dump says."""
    for path in WEB.glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", path.read_text()
        )


def test_operations_lines_and_kernels_refer_to_each_other(text: str) -> None:
    """From every generated kernel to a line of the model, and from an operation of each block to its kernel."""
    entry = next(e for e in _Parsed(text).data["entries"] if e["component"] == "component stack")
    own = Path(__file__).read_text().splitlines()
    for name, _, _, lowered, members, code, *_ in entry["kernels"]:
        assert all(0 <= n < len(entry["lowered"]) for n in lowered)
        for member in members:
            file, line, _, said, _ = entry["sources"][entry["ops"][member][4]]
            assert file.endswith(Path(__file__).name)
            assert own[line - 1].strip() == said == entry["context"][file][str(line)].strip()
        if name.startswith("cpp_"):
            assert members
            assert name in entry["codes"][code]
    silus = [op for op in entry["ops"] if entry["strings"][op[1]] == "silu"]
    assert [entry["strings"][op[3]] for op in silus] == ["layers.0", "layers.1", "layers.2"]
    for op in silus:
        assert op[6], "in no kernel"
        assert op[7], "not in the lowered graph"
        assert entry["strings"][op[2]] == "f32[rows, 8]"
    assert all(-len(entry["inputs"]) <= n < len(entry["ops"]) for op in entry["ops"] for n in op[5])


def test_run_is_on_the_page(text: str) -> None:
    """Events with their reasons, and the calls of the entries."""
    (run,) = _Parsed(text).data["runs"]
    assert {"compile_end", "fallback"} <= {event["kind"] for event in run["events"]}
    assert {entry for _, entry, _, _ in run["calls"]} == {e["id"] for e in _Parsed(text).data["entries"]}
    assert run["timed"]["component stack"][0] >= 1


def test_size(root: Path, text: str) -> None:
    """64 blocks fit well; what would exceed a limit is left out and named, code first."""
    assert len(text.encode()) < MAX_PAGE / 4
    small = page_of(Dump.open(root), max_bytes=len(text.encode()) - 1000)
    page = _Parsed(small).data
    assert len(small.encode()) < len(text.encode()) - 1000
    assert any("the code of its kernels is left out" in note for note in page["notes"])
    assert [len(e["ops"]) for e in page["entries"]] == [len(e["ops"]) for e in _Parsed(text).data["entries"]]


def test_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``graphs html`` writes the page, with events of a file where they are given."""
    line = {"kind": "note", "component": "", "message": "from elsewhere", "data": {}, "time": 1.0}
    (tmp_path / "events.jsonl").write_text(json.dumps(line) + '\n{"kind": "half')
    page = tmp_path / "page.html"
    assert main(["graphs", "html", str(root), str(page), "--events", str(tmp_path / "events.jsonl"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] == page.stat().st_size
    assert [e["message"] for run in _Parsed(page.read_text()).data["runs"] for e in run["events"]][
        -1
    ] == "from elsewhere"


def _tlparse(folder: Path, script: str) -> str:
    program = folder / "tlparse"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    return str(folder)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (None, "not installed"),
        ("echo broken >&2; exit 3", "exit code 3: broken"),
        ("exit 0", "no index.html"),
        ("exec sleep 60", "did not run to its end"),
    ],
)
def test_tlparse_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, says: str) -> None:
    """Missing, failing, silent or hanging: there is a reason, and no report."""
    monkeypatch.setenv("PATH", _tlparse(tmp_path, script) + ":/bin:/usr/bin" if script else str(tmp_path))
    with pytest.raises(ReportFailed, match=says):
        report_of(tmp_path / "log", tmp_path / "report", seconds=0.5)


def test_tlparse_is_linked(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its report stands beside the page; without it the page is written all the same, with a warning."""
    script = 'while [ "$1" != -o ]; do shift; done; mkdir -p "$2"; echo report > "$2/index.html"'
    argv = ["graphs", "html", str(root), str(tmp_path / "page.html"), "--tlparse", str(tmp_path / "log"), "--json"]
    monkeypatch.setenv("PATH", _tlparse(tmp_path, script) + ":/bin:/usr/bin")
    assert main(argv) == 0
    link = json.loads(capsys.readouterr().out)["tlparse"]
    assert (tmp_path / link).read_text() == "report\n"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert main(argv) == 0
    assert "tlparse is not installed" in capsys.readouterr().err


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    program = find()
    if program is None:
        pytest.skip("no Chromium on the PATH, nor in the variable CHROMIUM")
    with chromium(program, tmp_path_factory.mktemp("profile")) as page:
        page.size(1440, 900)
        yield page


@pytest.fixture
def opened(browser: Page, text: str, tmp_path: Path) -> Iterator[Page]:
    """The page, opened; afterwards it has asked the network for nothing and has raised nothing."""
    (tmp_path / "page.html").write_text(text)
    browser.open(tmp_path / "page.html")
    yield browser
    assert browser.problems == []
    assert browser.js("document.querySelectorAll('img').length") == 0


def _shows(page: Page, text: str) -> None:
    """Wait until the inspector has ``text``: it is drawn after the address has changed."""
    page.wait(f"document.querySelector('.inspector')?.textContent.includes({json.dumps(text)})")


@pytest.mark.slow
def test_from_an_operation_to_its_kernel_and_back(opened: Page) -> None:
    """An operation shows line, lowered form and kernel; from a kernel, two clicks lead to its line of the model."""
    opened.click('a[href="#e0/graph"]')
    opened.wait("document.querySelector('.fold')?.textContent === '\\u00d7 3'")
    if not opened.js("[...document.querySelectorAll('.title')].some((t) => t.textContent.startsWith('silu'))"):
        opened.click(".row.module")
    opened.js("[...document.querySelectorAll('.row.op')].find((r) => r.title.includes('silu')).click()")
    _shows(opened, "gate = torch.nn.functional.silu(self.linear(x))")
    _shows(opened, "aten.")
    opened.click(".inspector .kernel")
    opened.wait("location.hash.includes('/kernels/')")
    _shows(opened, "extern")
    opened.click(".tabs a[href$='/kernels']")  # from the list of kernels:
    opened.wait("document.querySelector('.kernels .row') !== null")
    opened.js("[...document.querySelectorAll('.kernels .row')].find((r) => r.title.includes('silu')).click()")  # one
    opened.wait("document.querySelector('.inspector .line') !== null")
    opened.click(".inspector .line")  # and two
    opened.wait("document.querySelector('.source .l.hit') !== null")
    shown = opened.js("document.querySelector('.source .l.hit').textContent")
    assert shown.lstrip("0123456789 ") in Path(__file__).read_text()


@pytest.mark.slow
def test_search_with_the_keyboard(opened: Page) -> None:
    """``/``, words, arrow and Enter lead to an operation; what blocks repeat is one hit."""
    opened.key("/")
    assert opened.js("document.activeElement.id") == "search"
    opened.type("silu layers")
    opened.wait("document.querySelectorAll('#hits li').length > 0")
    assert "\u00d7 64" in opened.js("document.getElementById('hits').textContent")
    opened.key("ArrowDown")
    opened.key("Enter")
    opened.wait("location.hash.includes('/graph/')")
    _shows(opened, "silu")
    opened.key("ArrowDown")
    assert opened.js("document.querySelectorAll('.row[aria-selected=true]').length") == 1


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1440])
def test_every_view_has_room(opened: Page, tmp_path: Path, dark: bool, width: int) -> None:
    """Dark and light, narrow and wide: text can be told from the page, and nothing stands outside of it."""
    opened.dark(dark)
    opened.size(width, 900)
    for view in ("overview", "events", "compare", "e0/graph", "e0/kernels/0", "e0/inputs", "e0/guards", "e0/code"):
        opened.js(f"location.hash = '#{view}'")
        opened.wait("document.getElementById('main').childElementCount > 0")
        assert opened.js("document.documentElement.scrollWidth") <= width, view
        assert len(opened.picture(tmp_path / "view.png")) > 4000
    colours = opened.js("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    text, page = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert (text > page) == dark
    assert abs(text - page) > 400
    opened.size(1440, 900)


@pytest.mark.slow
def test_hostile_names_stay_text(opened: Page) -> None:
    """Shown wherever names are, and still no element and no script of theirs."""
    for view in ("overview", "events", "compare", "e1/graph", "e1/inputs"):
        opened.js(f"location.hash = '#{view}'")
        opened.wait("document.getElementById('main').textContent.includes('onerror=alert(2)')")
        assert opened.js("document.querySelectorAll('script').length") == 2
