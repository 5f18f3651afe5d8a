"""The figures in README.md are those of the tables that were measured."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _rows(text: str) -> list[list[str]]:
    """The cells of every row of every table, without marks of code."""
    lines = [line.replace("`", "") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_counts_of_architectures() -> None:
    """Its counts are those of the page's totals."""
    said = re.findall(r"\b\d+ of \d+\b", README)
    totals = re.findall(r"\| (\d+ of \d+) \|", (ROOT / "docs" / "models.md").read_text(encoding="utf-8"))
    assert said and said == totals[: len(said)]


def test_decoding_figures() -> None:
    """The factors and graphs of each way to compile are those of the two measured tables."""
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    section = re.search(r"<!-- decode-8x256:begin -->(.*?)<!-- decode-8x256:end -->", results, re.DOTALL)
    assert section is not None
    dynamic, static = section[1].split("| static cache")
    ways = [
        {name: (x, graphs) for name, _, x, _, _, _, graphs, _ in _rows(part)[1:]}
        for part in (dynamic, "| static" + static)
    ]
    said = [row for row in _rows(README) if any(row[0] in way for way in ways)]
    assert len(said) == 4
    for name, *factors, graphs in said:
        expected = [way[name] for way in ways if name in way]
        assert [x for x in factors if x] == [x for x, _ in expected]
        assert graphs.split(" / ") == [n for _, n in expected]


def test_counts_of_hazards() -> None:
    """What was silently wrong, stock, with guards dropped and here, is what the table of hazards counts."""
    text = " ".join(README.split())
    said = re.search(
        r"(\d+) changes .* wrong (\d+) times with stock `torch.compile`, (\d+) times .* (\d+) times here", text
    )
    page = (ROOT / "docs" / "safety.md").read_text(encoding="utf-8")
    wrong = next(row for row in _rows(page) if row[0].startswith("silently wrong"))
    assert said is not None and list(said.groups())[1:] == wrong[1:4]
    assert f"{said[1]} hazards" in page
