"""The two tables that ``compile-policy matrix`` measures: architectures and workloads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compile_policy.cli import matrix_page, workloads_page

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Sheet:
    """One table: which module of the backend measures it, and how its rows are written.

    Attributes:
        module: below the backend; its ``measure(name)`` gives a row.
        key: field of a row that names it.
        noun: what the rows are, in the plural.
        flags: what a command that measures one row adds.
    """

    module: str
    key: str
    noun: str
    flags: tuple[str, ...]
    page: Callable[[Sequence[Row], Mapping[str, str]], str]
    row_lines: Callable[[Row], list[str]]
    lines_about: Callable[[str, str], list[str]]
    table: Callable[[Sequence[Row]], Any]

    def failed(self, name: str, reason: str) -> dict[str, Any]:
        """The row of what could not be measured."""
        return {self.key: name, "obstacle": reason}


ARCHITECTURES = Sheet(
    "matrix",
    "model_type",
    "architectures",
    (),
    matrix_page.page,
    matrix_page.row_lines,
    matrix_page.lines_about,
    matrix_page.table,
)
WORKLOADS = Sheet(
    "workloads.measure",
    "workload",
    "workloads",
    ("--workloads",),
    workloads_page.page,
    workloads_page.row_lines,
    workloads_page.lines_about,
    workloads_page.table,
)
