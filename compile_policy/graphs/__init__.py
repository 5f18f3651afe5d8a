"""Graphs written for people: dumps, and what reads them.

Nothing here is imported by the path of a call; depyf is imported only while bytecode is written. What reads a dump
needs no torch, so the names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from compile_policy.lazy_names import lazy_names as _lazy_names

if TYPE_CHECKING:
    from compile_policy.graphs.dump import GraphDump as GraphDump
    from compile_policy.graphs.reading import Dump as Dump
    from compile_policy.graphs.reading import DumpedEntry as DumpedEntry

__all__ = ["Dump", "DumpedEntry", "GraphDump"]

if not TYPE_CHECKING:  # a checker would let any name pass where there is a `__getattr__`
    __getattr__, __dir__ = _lazy_names(
        __name__,
        {
            "GraphDump": "compile_policy.graphs.dump",
            "Dump": "compile_policy.graphs.reading",
            "DumpedEntry": "compile_policy.graphs.reading",
        },
    )
