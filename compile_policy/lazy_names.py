"""Names of a package that are imported when they are first used (PEP 562).

A package lists its public names here so that ``import compile_policy`` costs milliseconds. Type checkers read the
same names from an ``if TYPE_CHECKING`` block beside the list.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str,
    homes: Mapping[str, str],
    *,
    over_modules: Sequence[str] = (),
    beside: Mapping[str, str] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``(__getattr__, __dir__)`` of a package whose names are imported on first use.

    Args:
        package: the package's ``__name__``.
        homes: public name -> module that defines it. A name that is a module itself is its own home.
        over_modules: public names that modules of the package have too. Importing a module sets its name in the
            package, once; these modules are imported now and their names removed, so that the public name is found.
        beside: home -> module that is imported with it, because it registers itself with one above.
    """
    for name in over_modules:
        importlib.import_module(f"{package}.{name}")
        vars(sys.modules[package]).pop(name, None)

    def __getattr__(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name)
        value: Any = importlib.import_module(home)
        if beside is not None and home in beside:
            importlib.import_module(beside[home])
        if home != f"{package}.{name}":
            value = getattr(value, name)
        vars(sys.modules[package])[name] = value  # the next access is a plain lookup
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return __getattr__, __dir__
