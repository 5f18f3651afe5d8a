"""Whether the installed versions can be relied on: asked once a process, before anything is compiled.

An older version than the oldest tested one is refused. A newer one than tested is told of once and has to pass a
self-test; where it fails, every component runs eager, and each report gives the reason.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from compile_policy.caller import warn_user
from compile_policy.self_test import Result, failures, self_test
from compile_policy.versions import Finding, compare, installed, refuse_unsupported

#: What every component relies on. Backends name their own library.
CORE = ("python", "torch")
_lock = threading.RLock()
_obstacles: dict[tuple[str, ...], str] = {}


def obstacle(packages: tuple[str, ...] = CORE, test: Callable[[], list[Result]] = self_test) -> str:
    """Why no component may be compiled with the installed ``packages``; empty where nothing forbids it.

    Args:
        packages: names in `versions.TESTED`.
        test: run once where one of them is newer than tested.

    Raises:
        EnvironmentNotSupported: one of them is missing or too old; the message says what to install.
    """
    with _lock:
        if packages not in _obstacles:
            versions = {name: version for name, version in installed().items() if name in packages}
            findings = compare(versions)
            refuse_unsupported(findings)
            _obstacles[packages] = ""  # what the self-test itself compiles is not held up
            newer = [finding for finding in findings if finding.state == "newer"]
            if newer:
                _obstacles[packages] = _tested(newer, test)
        return _obstacles[packages]


def forget() -> None:
    """Ask again at the next component, for tests and for those who install into a running process."""
    with _lock:
        _obstacles.clear()


def _tested(newer: list[Finding], test: Callable[[], list[Result]]) -> str:
    """Run the self-test and warn of its outcome; the reason to run eager where it failed."""
    try:
        wrong = failures(test())
    except Exception as error:
        wrong = f"the self-test raised {type(error).__name__}: {error}"
    said = " ".join(finding.message for finding in newer)
    remedy = " or ".join(f"`{finding.remedy}`" for finding in newer)
    if wrong:
        reason = f"{said} The self-test failed: {wrong}"
        warn_user(f"{reason}. Every component runs eager. {remedy}")
        return reason
    warn_user(f"{said} The self-test passed, so components are compiled. {remedy}")
    return ""
