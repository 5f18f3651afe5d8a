"""Build an environment for each pair of versions, run the contract in it, and write docs/versions.md.

    PYTHONPATH=tests python -m versions --write

Environments are kept in ``--folder`` and made again when they are missing. A torch without a build for the CPU in the
registry is several GB; `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu` finds small ones.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from .page import NOT_RUN, page
from .pairs import PAIRS, Pair

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = Path(__file__).parent / "results.json", ROOT / "docs" / "versions.md"
CONTRACT = Path(__file__).parent / "contract.py"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m versions", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the page and the results that it is made from")
    parser.add_argument("--only", default="", help="pairs whose name contains this; the others keep their results")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venvs", help="where the environments are")
    parser.add_argument("--take", type=Path, nargs="*", help="results of contracts that were run elsewhere")
    parser.add_argument("--architectures", type=int, default=12)
    asked = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if asked.take is not None:
        for path in asked.take:
            row = json.loads(path.read_text())
            results |= {pair.name: row for pair in PAIRS if _is_of(row, pair)}
    else:
        for pair in PAIRS:
            if asked.only in pair.name:
                results[pair.name] = run(pair, asked.folder, asked.architectures)
                print(pair.name, json.dumps(results[pair.name])[:2000], flush=True)
    if asked.write:
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        PAGE.write_text(page(results))
    return 0


def run(pair: Pair, folder: Path, architectures: int) -> dict[str, Any]:
    """The row of one pair; one that cannot be built has the reason."""
    python = folder / pair.name / "bin" / "python"
    try:
        if not python.exists():
            _build(pair, folder / pair.name)
    except (OSError, subprocess.CalledProcessError) as error:
        return {NOT_RUN: f"the environment cannot be built ({error})"}
    path = f"{ROOT}{os.pathsep}{ROOT / 'backends'}"
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(python), str(CONTRACT), "--architectures", str(architectures)]
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if ran.returncode:
        return {NOT_RUN: f"the contract ended with status {ran.returncode}"}
    row: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return row


def _build(pair: Pair, folder: Path) -> None:
    interpreter = shutil.which(f"python{pair.python}")
    if interpreter is None:
        raise FileNotFoundError(f"python{pair.python} is not on PATH")
    subprocess.run([interpreter, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    wanted = [f"torch=={pair.torch}", f"transformers=={pair.transformers}", str(ROOT)]
    subprocess.run([*pip, *wanted], check=True)


def _is_of(row: dict[str, Any], pair: Pair) -> bool:
    torch_version = row["torch"].partition("+")[0]
    python = ".".join(row["python"].split(".")[:2])
    return (python, torch_version, row["transformers"]) == (pair.python, pair.torch, pair.transformers)


if __name__ == "__main__":
    sys.exit(main())
