"""Exceptions and warnings of the policy.

Exception
+-- ValueError
|   +-- PolicyError                 the user's mistake; the message says the fix
|       +-- ConfigError             a configuration field: unknown, wrong type, contradictory
|       +-- DecorationError         a class that cannot be decorated as asked
|       +-- UnsupportedModelError   an explicit wish that this model cannot fulfil
|       +-- CacheError              a cache directory, key file or bundle that cannot be used or trusted
|       +-- InputError              an input file or prompt that cannot be used
|       +-- EnvironmentNotSupported version of torch or Transformers outside the tested range
+-- RuntimeError
|   +-- CompileFault                lowering or capture failed (raised only with on_fault="error")
|   +-- BudgetExceeded              more entries than max_entries (raised only with on_budget="error")
+-- NotCompilable                   internal: this call, or this component, has to run eager
|   +-- InternalError               because of a mistake of this package
UserWarning
+-- PolicyWarning                   a wish that was skipped, with reason and remedy
"""

from __future__ import annotations


class PolicyError(ValueError):
    """The user's mistake. ``remedy`` is one sentence that says what to do instead."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(f"{message} {remedy}".strip())
        self.message = message
        self.remedy = remedy


class ConfigError(PolicyError):
    """A configuration field is unknown, of the wrong type, or contradicts another."""


class DecorationError(PolicyError):
    """``support_torch_compile`` cannot be applied as asked."""


class UnsupportedModelError(PolicyError):
    """The user asked for something that this model cannot do."""


class InputError(PolicyError):
    """An input (model folder, picture, prompt) cannot be used."""


class CacheError(PolicyError):
    """A cache directory, its key file or a bundle cannot be used, or is not to be trusted."""


class EnvironmentNotSupported(PolicyError):
    """The installed torch or Transformers is older than the oldest tested version."""


class CompileFault(RuntimeError):
    """Capture or lowering of a component failed; ``__cause__`` is the original exception."""


class BudgetExceeded(RuntimeError):
    """A component needed more entries than ``max_entries`` allows."""


class NotCompilable(Exception):
    """Internal: a call or a component has to run eager; ``reason`` and ``remedy`` are for the report.

    Several reasons ``about`` one cause (a class that is refused at each step for what it does there) are told once.
    """

    def __init__(self, reason: str, *, remedy: str = "", about: str = "") -> None:
        super().__init__(reason)
        self.about = about
        self.reason = reason
        self.remedy = remedy
        #: Numbers of the arguments without tensors that were read, where a trace has shown it.
        self.read: frozenset[int] | None = None


class InternalError(NotCompilable):
    """Internal: a mistake of this package stopped the way of a call, which runs eager; users are asked to report it."""

    def __init__(self, doing: str, error: BaseException) -> None:
        where = _innermost(error)
        said = f"internal error of compile-policy while {doing}: {first_line(error)}"
        super().__init__(f"{said}{f' ({where})' if where else ''}", remedy=REPORT)
        self.__cause__ = error


#: What to do about a mistake of this package.
REPORT = (
    "The result is eager's. Please report this with the model, the call and the versions; "
    "it is a fault of compile-policy and not of the model."
)


def _innermost(error: BaseException) -> str:
    """File without its folders, and line, where an exception was raised; empty for one that was never raised."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return ""
    file = place.tb_frame.f_code.co_filename.replace("\\", "/").rpartition("/")[2]
    return f"{file}:{place.tb_lineno}"


def first_line(error: BaseException) -> str:
    """Type and first line of an exception, and the second where the first announces it: what fits into a reason."""
    lines = str(error).strip().splitlines() or [""]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {said[:300]}"


class PolicyWarning(UserWarning):
    """A wish of the user was skipped; the message gives the reason and the remedy."""
