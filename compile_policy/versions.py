"""Versions of Python, torch and Transformers that the project is tested with, and how the installed ones compare.

Reads package metadata only, so that neither torch nor Transformers is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from compile_policy.errors import EnvironmentNotSupported

Release = tuple[int, int]
State = Literal["tested", "older", "newer", "missing", "unreadable"]


@dataclass(frozen=True)
class Tested:
    """The releases of one package that the tests run on.

    Attributes:
        package: ``python``, ``torch`` or ``transformers``.
        oldest: first release, major and minor; an older one is refused.
        newest: last release; a newer one is compiled after a self-test.
        pinned: the version that every test runs on.
    """

    package: str
    oldest: Release
    newest: Release
    pinned: str

    def remedy(self) -> str:
        """A command that installs a tested version."""
        if self.package == "python":
            return f"Run it with Python {_dotted(self.oldest)} to {_dotted(self.newest)}."
        after = f"{self.newest[0]}.{self.newest[1] + 1}"
        return f"pip install '{self.package}>={_dotted(self.oldest)},<{after}'"


#: What `docs/versions.md` shows the results of.
TESTED = (
    Tested("python", (3, 11), (3, 13), "3.11"),
    Tested("torch", (2, 11), (2, 15), "2.13.0"),
    Tested("transformers", (5, 17), (5, 24), "5.24.0"),
)


@dataclass(frozen=True)
class Finding:
    """One installed package compared with `TESTED`.

    Attributes:
        version: as installed; empty where it is missing.
        message: one sentence; ``remedy``: what to install, empty where nothing has to be.
    """

    package: str
    version: str
    state: State
    message: str
    remedy: str = ""


def installed() -> dict[str, str]:
    """Package -> installed version; empty for one that is missing."""
    import importlib.metadata  # imports email
    import platform

    found = {"python": platform.python_version()}
    for tested in TESTED:
        if tested.package == "python":
            continue
        try:
            found[tested.package] = importlib.metadata.version(tested.package)
        except importlib.metadata.PackageNotFoundError:
            found[tested.package] = ""
    return found


def compare(versions: Mapping[str, str]) -> tuple[Finding, ...]:
    """A finding for each package of `TESTED` that is among ``versions``."""
    return tuple(_finding(tested, versions[tested.package]) for tested in TESTED if tested.package in versions)


def check_versions(torch_version: str, transformers_version: str) -> None:
    """Refuse a torch or Transformers older than the oldest tested one.

    Raises:
        EnvironmentNotSupported: with the command that installs a tested version.
    """
    refuse_unsupported(compare({"torch": torch_version, "transformers": transformers_version}))


def refuse_unsupported(findings: tuple[Finding, ...]) -> None:
    """Raise for the first package that is missing, unreadable or too old.

    Raises:
        EnvironmentNotSupported: with the command that installs a tested version.
    """
    for finding in findings:
        if finding.state in ("missing", "unreadable", "older"):
            raise EnvironmentNotSupported(finding.message, remedy=finding.remedy)


def _finding(tested: Tested, version: str) -> Finding:
    name, oldest, newest = tested.package, _dotted(tested.oldest), _dotted(tested.newest)
    if not version:
        return Finding(name, version, "missing", f"{name} is not installed.", tested.remedy())
    release = release_of(version)
    if release is None:
        message = f"{name} {version} is not supported: its version cannot be read."
        return Finding(name, version, "unreadable", message, tested.remedy())
    if release < tested.oldest:
        message = f"{name} {version} is not supported, {oldest} is the oldest that is."
        return Finding(name, version, "older", message, tested.remedy())
    if release > tested.newest:
        message = f"{name} {version} is newer than {newest}, the newest that is tested."
        return Finding(name, version, "newer", message, tested.remedy())
    return Finding(name, version, "tested", f"{name} {version} is tested ({oldest} to {newest}).")


def release_of(version: str) -> Release | None:
    """Major and minor number of a version; ``None`` where it does not begin with both."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return None if found is None else (int(found[1]), int(found[2]))


def _dotted(release: Release) -> str:
    return ".".join(map(str, release))
