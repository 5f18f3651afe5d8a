"""The captured graph as readable Python: inputs by the names that people know, the model's line beside each op."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping, Sequence

from compile_policy.graphs.source import Op
from compile_policy.graphs.text import one_line

_COLUMN = 96  # where lines of the model start, unless the operation is longer
_SIGNATURE = re.compile(r"^    def forward\(self, (?P<inputs>.*)\):$")
_INPUT = re.compile(r'(?P<name>\w+)(?P<kind>: "[^"]*")?(?:, |$)')
_ALIAS = re.compile(r"^        (?P<node>\w+) = (?P<argument>L_\w+)$")
_ASSIGNED = re.compile(r'^        (?P<name>\w+)(?:: "[^"]*")? = ')
_FREED = re.compile(r";  (?:\w+ = )+None$")


def captured_text(
    title: Sequence[str], readable: str, inputs: Sequence[str], ops: Sequence[Op], labels: Mapping[str, str]
) -> str:
    """Lay a printed graph out for reading.

    Args:
        title: lines that go on top, as comments.
        readable: the graph as torch prints it.
        inputs: what each input is, in order.
        ops: the operations, with their places in the model.
        labels: symbol of a size -> what people call it.
    """
    lines = [line for line in readable.splitlines() if not line.startswith("        # File: ")]
    aliases = {m["argument"]: m["node"] for line in lines if (m := _ALIAS.match(line))}
    signature = next((i for i, line in enumerate(lines) if _SIGNATURE.match(line)), None)
    sources = {op.name: op for op in ops}
    text = [f"# {one_line(line)}" for line in title] + [""]
    names: dict[str, str] = {}
    for i, line in enumerate(lines):
        if i == signature:
            parameters = list(_INPUT.finditer(lines[i][len("    def forward(self, ") : -len("):")]))
            names = _names([aliases.get(p["name"], p["name"]) for p in parameters], inputs, lines, labels)
            text += _signature(parameters, aliases, names, inputs)
        elif not _ALIAS.match(line) and (line.strip() or text[-1].strip()):
            text.append(_beside(line, sources, names))
    return "\n".join(text) + "\n"


def _names(
    nodes: Sequence[str], inputs: Sequence[str], lines: Sequence[str], labels: Mapping[str, str]
) -> dict[str, str]:
    """node -> what it is called here: a parameter, leaf or size by its own name, where nothing else has that name."""
    taken = {word for line in lines for word in re.findall(r"\w+", line)}
    names: dict[str, str] = {}
    wanted = dict(zip(nodes, inputs, strict=False))
    for node, said in {**wanted, **labels}.items():
        name = re.sub(r"\W+", "_", one_line(said)).strip("_")
        free = name.isidentifier() and not keyword.iskeyword(name) and name not in taken
        if (node.startswith("l_") or node in labels) and free:
            names[node] = name
            taken.add(name)
    return names


def _signature(
    parameters: Sequence[re.Match[str]], aliases: dict[str, str], names: dict[str, str], inputs: Sequence[str]
) -> list[str]:
    """One input a line, with what it is."""
    lines = ["    def forward(", "        self,"]
    for i, parameter in enumerate(parameters):
        node = aliases.get(parameter["name"], parameter["name"])
        said = f"  # {one_line(inputs[i])}" if i < len(inputs) else ""
        lines.append(f"        {names.get(node, node)}{_renamed(parameter['kind'] or '', names)},{said}")
    return [*lines, "    ):"]


def _beside(line: str, sources: dict[str, Op], names: dict[str, str]) -> str:
    assigned = _ASSIGNED.match(line)
    op = sources.get(assigned["name"]) if assigned else None
    line = _renamed(_FREED.sub("", line), names)
    if op is None or op.source is None:
        return line
    return f"{line:<{_COLUMN}}  # {one_line(op.source.place)}: {one_line(op.source.code)}"


def _renamed(line: str, names: Mapping[str, str]) -> str:
    return re.sub(r"(?<![.\w])[a-z]\w*", lambda m: names.get(m[0], m[0]), line)
