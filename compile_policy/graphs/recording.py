"""What can only be seen while a component compiles: bytecode, lowered graphs and the code of kernels."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from compile_policy.graphs.compat import kernel_origins, on_bytecode, structured_trace, trace_event

#: Name in torch's structured trace -> name of the file in ``lowered/``.
LOWERED = {
    "aot_inference_graph": "aot_inference_graph.py",
    "aot_joint_graph": "aot_joint_graph.py",
    "aot_forward_graph": "aot_forward_graph.py",
    "aot_backward_graph": "aot_backward_graph.py",
    "inductor_post_grad_graph": "post_grad_graph.py",
    "inductor_output_code": "output_code.py",
    "inductor_aot_wrapper_code": "aot_wrapper.cpp",
    "inductor_aot_kernel_code": "aot_kernels.cpp",
    "inductor_provenance_tracking_node_mappings": "provenance.json",
}
#: What comes first of a graph that is lowered.
FIRST = ("aot_inference_graph", "aot_joint_graph")
_LEAF = re.compile(r"L\['leaves'\]\[(\d+)\]")


@dataclass
class Recording:
    """What was seen during one compile.

    Attributes:
        packages: per graph that was lowered, (name in the structured trace, text) in the order in which they appeared.
        bytecode: what Dynamo made of the traced function.
        example: leaf -> sizes of the example that was traced.
        notes: what was seen and not kept, and why.
    """

    packages: list[list[tuple[str, str]]] = field(default_factory=list)
    bytecode: list[CodeType] = field(default_factory=list)
    example: dict[int, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def start_again(self) -> None:
        """A new capture: what the one before was lowered to has been given up."""
        self.packages.clear()

    def add(self, name: str, text: str) -> None:
        """Keep a text; each captured graph that is lowered begins a package."""
        if not self.packages or (name in FIRST and any(known in FIRST for known, _ in self.packages[-1])):
            self.packages.append([])
        self.packages[-1].append((name, text))

    def lowered(self) -> dict[str, str]:
        """File name -> text; a second graph of a kind gets a number, the same text twice is one file.

        Where several packages were made of one graph, each has a folder.
        """
        several = len(self.packages) > 1
        return {
            f"package-{number}/{name}" if several else name: text
            for number, texts in enumerate(self.packages)
            for name, text in _files(texts).items()
        }


def _files(texts: list[tuple[str, str]]) -> dict[str, str]:
    files: dict[str, str] = {}
    for name, text in texts:
        stem, _, suffix = LOWERED[name].rpartition(".")
        same_kind = [known for known in files if re.fullmatch(rf"{re.escape(stem)}(_\d+)?\.{suffix}", known)]
        if not any(files[known] == text for known in same_kind):
            files[f"{stem}_{len(same_kind)}.{suffix}" if same_kind else LOWERED[name]] = text
    return files


class _Listener(logging.Handler):
    """Takes what belongs to a dump from the structured trace of one thread; never disturbs the compile."""

    def __init__(self, recording: Recording, max_bytes: int) -> None:
        super().__init__()
        self.recording = recording
        self.max_bytes = max_bytes
        self.thread = threading.get_ident()
        self._sizes: dict[Any, list[int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if threading.get_ident() != self.thread:
            return
        try:
            self._take(*trace_event(record))
        except Exception:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        logging.getLogger("compile_policy").debug("a trace record was not understood", exc_info=True)

    def _take(self, name: str, details: Any, payload: str | None) -> None:
        if name == "dynamo_start":
            self.recording.start_again()
        elif name in LOWERED and payload and len(payload) > self.max_bytes:
            said = f"its {len(payload):,} characters exceed the size limit of the dump"
            self.recording.notes.append(f"lowered/{LOWERED[name]} is left out: {said}")
        elif name in LOWERED and payload:
            self.recording.add(name, payload)
        elif name == "describe_tensor":
            self._sizes[details["describer_id"], details["id"]] = list(details["size"])
        elif name == "describe_source" and (leaf := _LEAF.fullmatch(details["source"])):
            self.recording.example[int(leaf[1])] = self._sizes[details["describer_id"], details["id"]]


@contextmanager
def record(max_bytes: int, origins: bool, failed: Callable[[Exception], None]) -> Iterator[Recording]:
    """Record what this thread compiles inside the block.

    Args:
        max_bytes: texts that are larger are not kept.
        origins: have Inductor say which operations went into which kernel.
        failed: told when listening is impossible; the block runs all the same.
    """
    recording = Recording()
    with ExitStack() as stack:
        try:
            _listen(stack, recording, max_bytes)
            if origins:
                stack.enter_context(kernel_origins())
        except Exception as error:
            failed(error)
        yield recording


def _listen(stack: ExitStack, recording: Recording, max_bytes: int) -> None:
    thread = threading.get_ident()

    def keep(_: CodeType, transformed: CodeType) -> None:
        if threading.get_ident() == thread:
            recording.bytecode.append(transformed)

    stack.callback(on_bytecode(keep))
    trace, listener = structured_trace(), _Listener(recording, max_bytes)
    trace.addHandler(listener)
    stack.callback(trace.removeHandler, listener)
