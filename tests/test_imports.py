"""Imports are a contract: the front door stays light, and a room imports only from rooms above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
POLICY = ROOT / "compile_policy"
BACKENDS = ROOT / "backends"

# Top to bottom; a room may import from its own row's left and from every row above. See docs/architecture.md.
ROOMS = [
    {"lazy_names"}, {"shortage"}, {"errors"}, {"plan"}, {"events"}, {"caller"}, {"fallbacks"}, {"verdicts"},
    {"versions"}, {"settings"}, {"compat_precision"}, {"compat"}, {"config"}, {"flags"}, {"annotations"},
    {"shapes"},
]  # fmt: skip
ONLY_IN = {
    "rich": ("cli", "graphs"),
    "typer": ("cli",),
    "click": ("cli",),
    "depyf": ("graphs",),
    "transformers": (),
    "compile_policy_transformers": (),
}


def _imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _room(path: Path) -> str:
    first = path.relative_to(POLICY).parts[0]
    return first.removesuffix(".py")


POLICY_FILES = sorted(POLICY.rglob("*.py"))


def test_front_door_is_light() -> None:
    """``import compile_policy`` in a fresh process loads none of the heavy or optional packages."""
    heavy = [*ONLY_IN, "torch", "numpy", "pydantic", "yaml"]
    code = f"import sys; import compile_policy; print([m for m in {heavy!r} if m in sys.modules])"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{BACKENDS}"}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("path", POLICY_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_outside_packages_stay_in_their_rooms(path: Path) -> None:
    """Transformers only in the backend, rich and typer only in the command line, depyf only in ``graphs``."""
    for name in _imports(path):
        package = name.split(".")[0]
        allowed = ONLY_IN.get(package)
        assert allowed is None or _room(path) in allowed, f"{path} imports {name}"


def _edges() -> dict[str, set[str]]:
    """Which room imports from which, the front door left out."""
    edges: dict[str, set[str]] = {}
    for path in POLICY_FILES:
        targets = edges.setdefault(_room(path), set())
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] == "compile_policy" and len(parts) > 1:
                targets.add(parts[1])
    edges.pop("__init__", None)
    return {room: {t for t in targets if t != room and t in edges} for room, targets in edges.items()}


def test_no_import_cycle() -> None:
    """The rooms have an order in which each imports only from earlier ones, function-local imports included."""
    edges = _edges()
    while edges:
        free = [room for room, targets in edges.items() if not targets]
        assert free, f"rooms import each other: { {room: sorted(t) for room, t in edges.items()} }"
        edges = {room: targets - set(free) for room, targets in edges.items() if room not in free}


def test_the_top_rooms_stay_on_top() -> None:
    """Words, settings and dims know nothing of what is built on them, and nobody imports the command line."""
    edges = _edges()
    above: set[str] = set()
    for row in ROOMS:
        for room in row & set(edges):
            assert edges[room] <= above | row, f"{room} imports {sorted(edges[room] - above)}"
        above |= row
    for room, targets in edges.items():
        assert "cli" not in targets or room == "__main__", f"{room} imports the command line"


#: What reads the environment, under whatever name its module was imported.
READS_ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "expandvars", "expanduser"}


def _environment_reads(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that reads the environment or the command line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if node.attr in READS_ENVIRONMENT or (node.attr == "home" and owner.endswith("Path")):
                yield node.lineno, node.attr
            elif (owner, node.attr) == ("sys", "argv"):
                yield node.lineno, "argv"
        elif isinstance(node, ast.ImportFrom) and node.module in ("os", "os.path", "posixpath", "sys"):
            for alias in node.names:
                if alias.name in READS_ENVIRONMENT | {"argv"}:
                    yield node.lineno, alias.name


def test_no_environment_below_the_command_line() -> None:
    """The environment and ``sys.argv`` are read in ``cli`` only; ``~`` in a path is environment too."""
    for path in [*POLICY_FILES, *BACKENDS.rglob("*.py")]:
        if not path.is_relative_to(POLICY / "cli"):
            found = [f"{path}:{line} reads {name}" for line, name in _environment_reads(ast.parse(path.read_text()))]
            assert not found, found


@pytest.mark.parametrize(
    "code",
    [
        "os.environ['A']",
        "os.getenv('A')",
        "import os as o; o.environ.get('A')",
        "from os import environ",
        "from os.path import expandvars as e",
        "os.path.expandvars('$A')",
        "os.path.expanduser('~')",
        "Path('~').expanduser()",
        "Path.home()",
        "pathlib.Path.home()",
        "sys.argv",
    ],
)
def test_reading_the_environment_is_found(code: str) -> None:
    """Each way of reading it is seen, so that none in the package is a finding."""
    assert list(_environment_reads(ast.parse(code)))
