"""A question about sizes whose answer changes nothing: ``if x.shape[0] != n: x = x.expand(n, -1)``.

To expand a dim to the size that it has already changes nothing. So a graph that was traced where the body ran holds
where it would not have run.
"""

from __future__ import annotations

import ast
import linecache
import re
import sys
from collections.abc import Iterator

_PLACE = re.compile(r"^(if .*:)  # (\S+\.py):(\d+) in ")


def expands_where_it_differs(origin: str) -> bool:
    """Whether the line at ``origin`` asks for a size of a tensor only to expand it to that size.

    Args:
        origin: the line, ``#``, and the last parts of its file's name with the line's number, as torch names the place
            where a size relation was assumed.
    """
    found = _PLACE.match(origin.strip())
    if found is None:
        return False
    asked = [_if_at(file, int(found[3])) for file in _files(found[2]) if _line(file, found) == found[1]]
    return bool(asked) and all(one is not None and _only_expands(one) for one in asked)


def _files(end: str) -> Iterator[str]:
    """Loaded modules whose file's name ends like this: torch leaves out where a package lies.

    Where torch and the file have the root directory in common alone, torch cuts one character more.
    """
    for module in [*sys.modules.values()]:
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(end):
            continue
        left_out = file.removesuffix(end)
        if not left_out or left_out.endswith("/") or len(left_out) == 2:
            yield file


def _line(file: str, found: re.Match[str]) -> str:
    return linecache.getline(file, int(found[3])).strip()


def _if_at(file: str, number: int) -> ast.If | None:
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return None
    return next((n for n in ast.walk(tree) if isinstance(n, ast.If) and n.lineno == number), None)


def _only_expands(asked: ast.If) -> bool:
    """``if x.shape[d] != size: x = x.expand(-1, size, -1)``, the size at place ``d`` and -1 elsewhere."""
    match asked:
        case ast.If(
            test=ast.Compare(left=left, ops=[ast.NotEq()], comparators=[right]),
            body=[ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=done, args=sizes, keywords=[]))],
            orelse=[],
        ) if ast.unparse(done) == f"{name}.expand":
            written = [ast.unparse(size) for size in sizes]
            for of, size in ((left, right), (right, left)):
                for d in range(len(sizes)):
                    expanded = ["-1"] * d + [ast.unparse(size)] + ["-1"] * (len(sizes) - d - 1)
                    if ast.unparse(of) in (f"{name}.shape[{d}]", f"{name}.size({d})") and written == expanded:
                        return True
    return False
