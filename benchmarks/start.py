"""What a cold start costs by depth: CPU seconds of the first answers, compilers included.

    python benchmarks/start.py [--layers 8 16 32] [--hidden 256] [--tokens 8] [--only NAME ...] [--limit 120] [--write]

Every contender compiles one random Llama in a separate process, with empty compile caches and one thread, and then
answers three prompts of different lengths. Counted is the processor time of that process and of every compiler that it
started, less what the same answers cost eager; importing torch and building the model are not counted. The last column
is the cost of the deepest model as a multiple of the cost of the shallowest. A start that takes longer than the limit
(wall-clock seconds) is ended, and its cell says so; without the limit, the slowest takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable

import torch
from bench_decode import PROMPTS, Contender, build, regional, run
from results import write_section
from transformers import CompileConfig, PreTrainedModel

import compile_policy
from compile_policy import CompilationConfig


def _policy(level: int) -> Callable[[PreTrainedModel], None]:
    config = CompilationConfig(mode=level, cache_dir=False)
    return lambda model: compile_policy.apply(model, config=config) and None


def _nothing(model: PreTrainedModel) -> None:
    pass


CONTENDERS: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "compile-policy -O1": (_policy(1), "dynamic"),
    "compile-policy -O2": (_policy(2), "dynamic"),
    "compile-policy -O3": (_policy(3), "dynamic"),
    "decoder.compile(dynamic=True)": (lambda m: m.model.compile(dynamic=True), "dynamic"),
    "accelerate compile_regions": (regional, "dynamic"),
    "generate's own compile": (_nothing, "static"),
}


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def one(name: str, layers: int, hidden: int, tokens: int) -> dict[str, float | bool]:
    """Start one contender in this process."""
    prepare, cache = CONTENDERS[name]
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64
    torch._inductor.config.compile_threads = 1  # a pool of workers would be counted when it ends, if at all
    model = build(layers, hidden)
    prompts = [torch.randint(0, 500, (1, n), generator=torch.Generator().manual_seed(n)) for n in PROMPTS]
    wanted, eager = [], 0.0
    for ids in [prompts[0], *prompts]:  # the first answer of a process pays for more than itself
        started = cpu_seconds()
        wanted.append(run(Contender("eager", model), ids, cache, tokens))
        eager = cpu_seconds() - started
    contender = Contender(name, model)
    if cache == "static":
        contender.arguments["compile_config"] = CompileConfig()
        contender.arguments["compile_config"]._compile_all_devices = True
    started = cpu_seconds()
    prepare(model)
    answers = [run(contender, prompts[0], cache, tokens)]
    first = cpu_seconds() - started - eager
    answers += [run(contender, ids, cache, tokens) for ids in prompts[1:]]
    every = cpu_seconds() - started - 3 * eager
    same = all(torch.equal(a, b) for a, b in zip(answers, wanted[1:], strict=True))
    return {"first": first, "every": every, "equal": same}


def started_cold(name: str, layers: int, hidden: int, tokens: int, limit: float) -> dict[str, float] | None:
    """Start one contender in a separate process; ``None`` where it takes too long."""
    with tempfile.TemporaryDirectory() as empty:
        environ = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": f"{empty}/inductor",
            "TMPDIR": empty,
            "OMP_NUM_THREADS": "1",
        }
        environ["XDG_CACHE_HOME"] = f"{empty}/cache"
        command = [sys.executable, __file__, "--one", name, "--hidden", str(hidden), "--tokens", str(tokens)]
        with subprocess.Popen(
            [*command, "--layers", str(layers)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                said, errors = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # its compilers too
                return None
        if process.returncode != 0:
            raise RuntimeError(f"{name} at {layers} layers failed:\n{errors[-2000:]}")
        answer: dict[str, float] = json.loads(said.strip().splitlines()[-1])
        return answer


def table(names: list[str], depths: list[int], hidden: int, tokens: int, limit: float) -> list[str]:
    heads = " | ".join(f"{n} layers: first / all" for n in depths)
    lines = [f"| CPU seconds | {heads} | {depths[-1]} over {depths[0]} layers | tokens equal |"]
    lines.append("|---" * (len(depths) + 3) + "|")
    print(*lines, sep="\n", flush=True)
    for name in names:
        found = [started_cold(name, n, hidden, tokens, limit) for n in depths]
        cells = " | ".join(f"{f['first']:.1f} / {f['every']:.1f}" if f else f"> {limit:.0f} s" for f in found)
        ratio = f"{found[-1]['every'] / found[0]['every']:.2f}" if found[0] and found[-1] else "-"
        equal = "yes" if all(f["equal"] for f in found if f) else "NO"
        lines.append(f"| {name} | {cells} | {ratio} | {equal} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that one start may take")
    parser.add_argument("--one", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="replace the section in benchmarks/RESULTS.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.one:
        print(json.dumps(one(options.one, options.layers[0], options.hidden, options.tokens)))
        return
    lines = table(options.only, options.layers, options.hidden, options.tokens, options.limit)
    if options.write:
        head = (
            f"Hidden {options.hidden}, {options.tokens} tokens to each of three prompts, one thread, CPU, float32, "
            f"torch {torch.__version__}, compile caches empty; processor seconds with every compiler that was started."
        )
        write_section(f"start-{options.hidden}", "Cold start by depth", "\n".join([head, "", *lines]))


if __name__ == "__main__":
    main()
