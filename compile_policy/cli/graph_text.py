"""What `graphs show` prints: graphs and files as text, and the trail of one operation or kernel."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from compile_policy.cli.terminal import clean
from compile_policy.graphs.folding import Fold
from compile_policy.graphs.kernels import Kernel
from compile_policy.graphs.sizes import tensor_type, type_of
from compile_policy.graphs.stats import code_of, line_of
from compile_policy.graphs.trail import KernelTrail, OpTrail
from compile_policy.graphs.values import Value

_COMMENT = "  # "
_BESIDE = 140  # columns that operations with the model's lines beside them need
_ASSIGNED = re.compile(r"^        (\w+)(?:: \"[^\"]*\")? = ")
_PLACED = re.compile(r"^(?P<code>.*?)\s+# (?P<place>[\w.]+:\d+: .*)$")
_INPUT = re.compile(r"^        \w+(?P<kind>: \"[^\"]*\"),  # (?P<is>.*)$")
_MOST = 12
Symbols = Mapping[str, Mapping[str, Any]]


def print_source(console: Console, text: str, found: Sequence[Fold] = ()) -> None:
    """A file; repeated blocks once, and the model's lines above the operations where there is no room beside them."""
    lines: Iterator[str] = _folded(clean(text).splitlines(), found) if found else iter(clean(text).splitlines())
    for line in lines if console.width >= _BESIDE else _stacked(lines):
        code, mark, comment = line.partition(_COMMENT)
        if not console.is_terminal:
            console.out(line, highlight=False)
        elif line.lstrip().startswith("# "):
            console.print(Text(line, style="dim cyan" if line.startswith(" ") else "dim"), soft_wrap=True)
        else:
            console.print(Text.assemble(code, (mark + comment, "dim cyan")), soft_wrap=True)


def _folded(lines: Sequence[str], found: Sequence[Fold]) -> Iterator[str]:
    """The captured graph with one line in place of what the blocks before it have had already."""
    hidden = {name: fold for fold in found for name in fold.hidden}
    told: set[int] = set()
    known: set[str] = set()
    left_out = 0
    for line in lines:
        if (numberless := _without_numbers(line)) in known:
            left_out += 1
            continue
        if left_out:
            yield f"        # and {left_out} like these in the other blocks (--all)"
            left_out = 0
        assigned = _ASSIGNED.match(line)
        fold = hidden.get(assigned[1]) if assigned else None
        if fold is None:
            known |= {numberless} if numberless else set()
            yield _cut(line)
        elif id(fold) not in told:
            told.add(id(fold))
            yield f"        # {fold.blocks[1]} ... {fold.blocks[-1]}: the same operations as {fold.blocks[0]} (--all)"


def _without_numbers(line: str) -> str:
    """What an input's line has in common with the same input of another block; empty for other lines."""
    said = _INPUT.match(line)
    return re.sub(r"\d+", "#", said["is"]) + said["kind"] if said and re.search(r"\d", said["is"]) else ""


def _cut(line: str) -> str:
    """What the graph returns, without most of the states of a cache."""
    names = line.split(", ")
    return (
        f"{', '.join(names[:_MOST])}, ... {len(names) - _MOST} more"
        if line.startswith("        return") and len(names) > _MOST
        else line
    )


def _stacked(lines: Iterator[str]) -> Iterator[str]:
    last, blank = "", False
    for line in lines:
        placed = _PLACED.match(line) if _ASSIGNED.match(line) else None
        if placed is None:
            if not line.strip() and blank:
                continue  # blocks that are left out leave their blank lines
            last, blank = "" if line.strip() else last, not line.strip()
            yield line
            continue
        if placed["place"] != last:
            last = placed["place"]
            yield f"        # {last}"
        blank = False
        yield placed["code"]


def print_op(console: Console, entry: str, trail: OpTrail, symbols: Symbols) -> None:
    """From an operation to its line, what it was lowered to, and its kernels."""
    op = trail.op
    said = f"{op.get('op')} -> {type_of(op, symbols) or 'no tensor'}"
    _print(console, Text.assemble((clean(str(op.get("name"))), "bold"), f"  {clean(said)}"))
    _row(console, "in", f"{op.get('module') or 'the component itself'}, {entry}")
    source = op.get("source")
    if isinstance(source, dict):
        _row(console, "line", f"{line_of(op)} in {source.get('function')}")
        for number, text in trail.around.items():
            here = number == source.get("line")
            _print(console, Text(clean(f"  {'>' if here else ' '} {number:5} {text}"), style="" if here else "dim"))
        if source.get("caller"):
            _row(console, "called by", str(source["caller"]))
    _values(console, "lowered to", trail.lowered, symbols)
    if not trail.lowered:
        _row(console, "lowered to", "nothing of its own")
    for number, kernel in trail.kernels.items():
        _row(console, "kernel", kernel_said(number, kernel))
    if not trail.kernels:
        _row(console, "kernel", "none of its own, or none is in the dump")
    _row(console, "reads", _listed(op.get("inputs", ())))
    _row(console, "read by", _listed(trail.users))


def print_kernel(console: Console, entry: str, trail: KernelTrail, symbols: Symbols) -> None:
    """From a kernel to the lines of the model, and its code."""
    said = kernel_said(trail.number, trail.kernel)
    _print(console, Text.assemble((clean(said), "bold"), f"  in {clean(entry)}"))
    lines: dict[str, list[dict[str, Any]]] = {}
    for op in trail.ops:
        lines.setdefault(line_of(op) or "line not known", []).append(op)
    for place, ops in sorted(lines.items()):
        _print(console, Text.assemble(("  " + clean(place), "cyan"), f"  {clean(code_of(ops[0]))}"))
        _print(console, Text(clean(f"      {_listed([str(op.get('name')) for op in ops])}"), style="dim"))
    if not lines:
        _row(console, "operations", "which are in it was not recorded")
    _values(console, "lowered", trail.lowered, symbols)
    if trail.code:
        console.print()
        console.out(clean(trail.code), highlight=False)
    elif not trail.kernel.generated:
        _row(console, "code", "a library's, nothing was generated")


def kernel_said(number: int, kernel: Kernel) -> str:
    """``5 cpp_fused_mul_silu_5: generated, 7 operations, in 32 blocks``."""
    kind = "generated" if kernel.generated else "library"
    times = f", runs {kernel.times} times" if kernel.times > 1 else ""
    times += ", in calls of frequent sizes" if kernel.special else ""
    members = f", {len(kernel.lowered)} lowered operations" if kernel.lowered else ""
    return f"{number} {kernel.name}: {kind}{members}{times}"


def _values(console: Console, title: str, values: Sequence[Value], symbols: Symbols) -> None:
    for value in values:
        kind = tensor_type(value.dtype, value.shape, symbols)
        _row(console, title, f"{value.name}{': ' * bool(kind)}{kind} = {value.text.replace('torch.ops.', '')}")
        title = ""


def _row(console: Console, title: str, text: str) -> None:
    _print(console, Text.assemble((f"  {title:<11}", "dim"), clean(text)))


def _print(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(map(str, names[:_MOST])) + more if names else "nothing in the graph"
