"""What a fresh process pays before its first token: eager, compiling, and loading what an earlier process saved.

    python benchmarks/bench_fresh.py [--layers 8 32] [--repeats 5] [--write]

Each figure is from processes of their own, eager and warm ones in turn, medians of ``--repeats``; the cold one runs
once per depth and leaves the store behind that the warm ones load from. CPU-seconds, those of compilers included.
Inductor's directory is empty in every process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import write_section

ROOT = Path(__file__).resolve().parents[1]
PROMPT = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], options.one[1], options.layers[0], options.device)))
        return
    rows = [row for layers in options.layers for row in compare(layers, options.repeats, options.device)]
    titles = (
        "layers",
        "process",
        "first token, CPU-s",
        "of it finding and loading",
        "of it compiling",
        "x eager without loading",
        "frames",
    )
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}", *(f"| {' | '.join(row)} |" for row in rows)]
    said = f"On {options.device}: CPU-seconds from the first call of `generate` to its first token; medians."
    text = "\n".join([*lines, "", said, ""])
    print(text)
    if options.write:
        suffix = "" if options.device == "cpu" else f"-{options.device}"
        write_section(f"fresh{suffix}", "A fresh process", text)


def compare(layers: int, repeats: int, device: str) -> list[tuple[str, ...]]:
    with tempfile.TemporaryDirectory() as cache:
        cold = start("cold", cache, layers, device)
        runs: dict[str, list[dict[str, Any]]] = {"eager": [], "warm": []}
        for _ in range(repeats):
            for kind, found in runs.items():
                found.append(start(kind, cache, layers, device))
    middle = {kind: {key: statistics.median(r[key] for r in found) for key in found[0]} for kind, found in runs.items()}
    eager = middle["eager"]["first"]
    return [
        _row(layers, kind, run, eager)
        for kind, run in (("eager", middle["eager"]), ("cold", cold), ("warm", middle["warm"]))
    ]


def _row(layers: int, kind: str, run: dict[str, Any], eager: float) -> tuple[str, ...]:
    ratio = (run["first"] - run["loading"]) / eager
    figures = (f"{run['first']:.3f}", f"{run['loading']:.3f}", f"{run['compiling']:.1f}", f"{ratio:.2f}")
    return (str(layers), kind, *figures, str(int(run["frames"])))


def start(kind: str, cache: str, layers: int, device: str) -> dict[str, Any]:
    """One process."""
    with tempfile.TemporaryDirectory() as inductor:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": inductor, "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}"}
        command = [sys.executable, "-W", "ignore", __file__, "--one", kind, cache]
        command += ["--layers", str(layers), "--device", device]
        ran = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return found


def cpu() -> float:
    """CPU-seconds of this process and of those that it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure(kind: str, cache: str, layers: int, device: str) -> dict[str, Any]:
    """CPU-seconds of the first token in this process, and how many of them went where."""
    import torch
    from torch._dynamo import convert_frame
    from transformers import LlamaConfig, LlamaForCausalLM

    import compile_policy
    from compile_policy.saving import Place, Shelf

    spent = {"loading": 0.0}

    def timed(function: Any) -> Any:
        def call(*args: Any) -> Any:
            began = cpu()
            try:
                return function(*args)
            finally:
                spent["loading"] += cpu() - began

        return call

    Shelf.place, Place.load = timed(Shelf.place), timed(Place.load)  # type: ignore[method-assign]
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).eval().to(device)
    if kind != "eager":
        compile_policy.apply(model, compile_policy.CompilationConfig(cache_dir=Path(cache), on_fault="error"))
    ids = torch.randint(0, 1000, (1, PROMPT), device=device)
    began = cpu()
    model.generate(input_ids=ids, max_new_tokens=1, do_sample=False)
    first = cpu() - began
    rows = [row for row in compile_policy.report(model).components if row.decision == "compile"]
    assert kind != "warm" or all(row.loaded == 1 and row.graphs == 0 for row in rows), rows
    compiling = first - spent["loading"] if kind == "cold" else 0.0
    return {"first": first, "loading": spent["loading"], "compiling": compiling, "frames": convert_frame.FRAME_COUNTER}


if __name__ == "__main__":
    main()
