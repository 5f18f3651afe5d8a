"""Graphs written for people: dumps, and what reads them.

Nothing here is imported by the path of a call; depyf is imported only while bytecode is written.
"""

from compile_policy.graphs.dump import GraphDump as GraphDump
from compile_policy.graphs.reading import Dump as Dump
from compile_policy.graphs.reading import DumpedEntry as DumpedEntry
