"""The table of workloads: what it measures is what happened, and a page that is no longer true is noticed."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from compile_policy.cli import main
from compile_policy.cli.matrix import versions
from compile_policy.cli.matrix_sheet import WORKLOADS as SHEET
from compile_policy.cli.workloads_page import BITES, cells, lines_about, page, row_lines, table, totals
from compile_policy_transformers.workloads import measure as measuring
from compile_policy_transformers.workloads.batches import evaluate, llama, text, train
from compile_policy_transformers.workloads.measure import OTHER, error, measure, names
from compile_policy_transformers.workloads.registry import SECTIONS, WORKLOADS
from compile_policy_transformers.workloads.workload import FLOAT32, Trial, Workload

VERSIONS = {"torch": "2.13.0", "transformers": "5.24.0"}


def test_there_are_enough() -> None:
    """Thirty at least, each once, with words that a table can hold."""
    assert len(names()) == sum(map(len, SECTIONS.values())) >= 30
    for workload in WORKLOADS.values():
        assert workload.mistake and workload.what.endswith(".")
        assert not set("|*`<\n") & set(workload.name + workload.mistake)


@pytest.mark.parametrize(
    ("got", "want", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 2.5], 0.2),
        ([1, 2], [1, 3], OTHER),
        ([1.0], [1.0, 2.0], OTHER),
        ([float("nan"), 2.0], [float("nan"), 2.0], 0.0),
        ([float("nan"), 2.0], [float("inf"), 2.0], OTHER),
        ([float("-inf"), 2.0], [float("inf"), 2.0], OTHER),
        ([1.0, 2.0], [float("inf"), 2.0], OTHER),
        ([float("inf"), 2.0], [float("inf"), 4.0], 0.5),
    ],
)
def test_error_of_a_tensor(got: list[Any], want: list[Any], expected: float) -> None:
    """Relative to the largest finite number; whole numbers, shapes, NaN and infinity must be the same."""
    assert error({"x": [torch.tensor(got)]}, {"x": [torch.tensor(want)]}) == pytest.approx(expected)


def test_error_of_small_tensors() -> None:
    """A gradient of rounding errors is measured by its neighbours, one that is small by itself is not."""
    noise, large = torch.full((2,), 1e-12), torch.ones(2)
    assert error({"g": [noise * 3, large]}, {"g": [noise, large]}) < FLOAT32
    assert error({"g": [noise * 3]}, {"g": [noise]}) == pytest.approx(2.0)
    assert error({"g": [large]}, {"g": [large, large]}) == error({"g": [large]}, {"h": [large]}) == OTHER


@pytest.mark.parametrize("mistaken", [False, True])
def test_runs_are_reproducible_and_the_mistake_is_seen(tmp_path: Path, mistaken: bool) -> None:
    """Two eager runs of training are the same to the bit; a doubled gradient is not missed."""
    trials = [Trial("eager", tmp_path, tmp_path), Trial("eager", tmp_path, tmp_path, mistaken)]
    for trial in trials:
        WORKLOADS["training"].run(trial)
    assert (error(trials[1].results, trials[0].results) > BITES * FLOAT32) == mistaken


def _measured(monkeypatch: pytest.MonkeyPatch, run: Any, **more: Any) -> measuring.Row:
    made = Workload("made up", "Something is done.", "nothing", run, **more)
    monkeypatch.setitem(WORKLOADS, "made up", made)
    monkeypatch.setitem(SECTIONS, "Made up", (made,))
    return measure("made up", stock=False)


def test_what_goes_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong result, an exception, eager's own exception, and a package that is missing."""

    def wrong(trial: Trial) -> None:
        trial.keep("x", torch.tensor([1.0 if trial.way == "eager" else 1.1]))

    def raises(trial: Trial) -> None:
        if trial.way == "policy":
            raise ValueError("no such thing")

    def slow(trial: Trial) -> None:
        raise TimeoutError("the machine is busy")

    def never(trial: Trial) -> None:
        raise ValueError("never")

    found = _measured(monkeypatch, wrong)
    assert (found.policy.state, found.control) == ("wrong", 0.0)
    assert cells(found.to_dict())[0] == "**no**" and cells(found.to_dict())[-1] == "weak: nothing"
    found = _measured(monkeypatch, raises)
    assert found.policy.state == "raises" and found.policy.reason == "ValueError: no such thing"
    assert _measured(monkeypatch, never).policy.state == "eager raises"
    with pytest.raises(TimeoutError):
        _measured(monkeypatch, slow)
    found = _measured(monkeypatch, wrong, needs=("no_such_package",))
    assert found.policy.state == "missing" and cells(found.to_dict())[0] == "-"


def test_eager_calls_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A component that runs eager is equal, and is told with its calls and its reason."""

    def hooked(trial: Trial) -> None:
        model = trial.compiled(llama())
        model.model.layers[0].register_forward_hook(lambda *args: None)
        evaluate(trial, model, [{"input_ids": text(2, 7), "labels": text(2, 7)}])

    found = _measured(monkeypatch, hooked)
    assert (found.policy.state, found.policy.graphs) == ("equal", 0)
    assert found.policy.eager_calls == found.policy.calls == 1 and "hook" in found.policy.reason


def test_training_leaves_something_to_compare(tmp_path: Path) -> None:
    """Losses, a gradient for each weight and step, and the weights at the end."""
    trial = Trial("eager", tmp_path, tmp_path)
    model = llama()
    ids = text(2, 7)
    train(trial, model, [{"input_ids": ids, "labels": ids}] * 2)
    weights = len(list(model.parameters()))
    assert {name: len(found) for name, found in trial.results.items()} == {
        "losses": 2,
        "gradients": 2 * weights,
        "weights": weights,
    }


def _row(name: str, policy: dict[str, Any], stock: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    plain = {"graphs": 1, "calls": 4, "eager_calls": 0, "error": 0.0, "reason": ""}
    return {
        "workload": name,
        "section": "Training",
        "what": "Batches | of <three> sizes.",
        "mistake": "a batch is left out",
        "tolerance": FLOAT32,
        "control": 1.0,
        "policy": {**plain, **policy},
        "stock": {**plain, **(stock or {"state": "equal"})},
        **more,
    }


ROWS = [
    _row("alpha", {"state": "equal", "graphs": 2, "reason": "grad mode: True, was False"}, {"state": "raises"}),
    _row("beta", {"state": "equal", "graphs": 0, "eager_calls": 4, "reason": "a hook"}, {"state": "wrong"}),
    _row("gamma", {"state": "wrong"}, control=0.0, section="Caches"),
    {"workload": "delta", "obstacle": "took longer than 300 s"},
]


def test_lines_and_totals_of_the_page() -> None:
    """Totals count what was measured and name the exceptions; every line says what happened."""
    assert row_lines(ROWS[0]) == [
        "| **alpha**: Batches \\| of &lt;three> sizes. | yes | 2 | 0 | raises | - | a batch is left out |",
        "- **alpha**: grad mode: True, was False",
    ]
    assert row_lines(ROWS[3]) == ["| **delta** | | | | | | |", "- **delta**: took longer than 300 s"]
    assert totals(ROWS) == [
        ("equal to eager", 2, 3, ["gamma"]),
        ("equal, without an eager call", 1, 3, ["beta", "gamma"]),
        ("stock: equal to eager", 1, 3, ["alpha", "beta"]),
    ]
    text = page(ROWS, VERSIONS)
    for row in ROWS:
        assert lines_about(row["workload"], text) == row_lines(row)
    assert "## Training" in text and "## Caches" in text and "weak: a batch is left out" in text
    console = Console(file=io.StringIO(), width=100)
    console.print(table(ROWS))
    assert "equal to eager: 2 of 3" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_page_and_its_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the command: rows in the order of the table; a line that is no longer true fails the check."""
    rows = {name: {**ROWS[0], "workload": name} for name in names()}
    monkeypatch.setattr("compile_policy.cli.matrix._measure_apart", lambda sheet, name, timeout, store: rows[name])
    file = tmp_path / "workloads.md"
    first, second = names()[:2]
    assert main(["matrix", "--workloads", second, first, "--out", str(file)]) == 0
    text = file.read_text()
    assert text.index(f"**{first}**") < text.index(f"**{second}**")
    assert main(["matrix", "--workloads", first, "--check", str(file)]) == 0
    file.write_text(text.replace("| yes | 2 | 0 |", "| yes | 1 | 0 |"))
    assert main(["matrix", "--workloads", first, "--check", str(file)]) == 1


def test_an_unknown_workload(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, before anything is measured, with what may have been meant."""
    assert main(["matrix", "--workloads", "dynamic cach"]) == 2
    assert "Did you mean dynamic cache" in capsys.readouterr().err


def test_one_workload_through_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row in this process, as JSON; a second one is served from the same store."""
    monkeypatch.setattr(measuring, "measure", lambda name, store: measure(name, stock=False, store=store))
    command = ["matrix", "--workloads", "--here", "--json", "--store", str(tmp_path), "scoring"]
    for _ in range(2):
        assert main(command) == 0
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        assert (row["policy"]["state"], row["policy"]["graphs"], row["policy"]["eager_calls"]) == ("equal", 1, 0)
        assert row["control"] > BITES * row["tolerance"]
    assert SHEET.row_lines(row)[0].startswith("| **scoring**: ")


#: Cheap ones of each kind, with the graphs that the decoder needs; no call of any runs eager.
CAPTURED = {
    "training": 1,
    "rollouts": 2,
    "Trainer": 2,
    "SFTTrainer": 1,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled code that the tests of a module share, as most workloads ask the same model."""
    return tmp_path_factory.mktemp("store")


@pytest.mark.parametrize("name", CAPTURED)
def test_captured(name: str, store: Path) -> None:
    """Equal to eager, with so many graphs and no eager call; the graphs run operator by operator, which is cheap."""
    found = measure(name, stock=False, store=store, backend="eager")
    if found.policy.state == "missing":
        pytest.skip(found.policy.reason)
    assert (found.policy.state, found.policy.graphs, found.policy.eager_calls) == ("equal", CAPTURED[name], 0), found
    assert found.control > BITES * found.tolerance and found.policy.calls


#: In the default configuration, through Inductor; all others are slow.
FAST = ("scoring", "beam search", "sampling", "prompt lookup", "conversation", "deepcopy", "load_state_dict")
PAGE = Path(__file__).parent.parent / "docs" / "workloads.md"


def _needs_the_page() -> str:
    """The text of the page, where it was measured with the versions that are installed."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if page([], versions()).splitlines()[4] not in text:
        pytest.skip("docs/workloads.md was measured with other versions, or not at all")
    return text


def test_every_workload_is_on_the_page() -> None:
    """One that was added, renamed or taken out is noticed."""
    text = _needs_the_page()
    assert re.findall(r"^\| \*\*(.+?)\*\*", text, re.MULTILINE) == names()


@pytest.mark.parametrize("name", FAST)
def test_the_page_is_true(name: str, store: Path) -> None:
    """What the policy does now is what docs/workloads.md says; what stock does is left to the slow test."""
    text = _needs_the_page()
    row = measure(name, stock=False, store=store).to_dict()
    mine = [line.split(" | ")[:4] for line in row_lines(row)]
    assert mine == [line.split(" | ")[:4] for line in lines_about(name, text)]


#: What a compiled graph does not offer, with a part of the message that says so.
REFUSED = {"second derivatives": "double backward"}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_message(name: str, store: Path) -> None:
    """Never another result than eager's."""
    found = measure(name, stock=False, store=store)
    assert found.policy.state == "raises" and REFUSED[name] in found.policy.reason


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in names() if name not in REFUSED])
def test_equal_to_eager(name: str, store: Path) -> None:
    """Every workload, through Inductor: eager's results, and a mistake that the comparison sees."""
    found = measure(name, stock=False, store=store)
    if found.policy.state == "missing":
        pytest.skip(found.policy.reason)
    assert found.policy.state == "equal", found
    assert found.control > BITES * found.tolerance


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_whole_page_is_true() -> None:
    """``compile-policy matrix --workloads --check`` over all of them."""
    _needs_the_page()
    assert main(["matrix", "--workloads", "--check", str(PAGE)]) == 0
