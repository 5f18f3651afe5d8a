"""Training steps: the policy beside eager and the ways in which people compile training today.

    python benchmarks/bench_train.py [--layers 8] [--hidden 256] [--rounds 5] [--rows full,lora] [--write]
    python benchmarks/bench_train.py --layers 16 --hidden 1024 --rounds 5 --write

A step is forward, backward and SGD on one batch. Every contender has its own copy of one random Llama and the same
batches; rounds are interleaved, so that a machine that slows down slows all of them. A first pass over 12 batches of
mixed sizes compiles whatever a contender compiles, with an evaluation after every third, and counts the graphs; it is
not timed. Each case (full fine-tuning or LoRA, with checkpointing or without) is measured in a separate process, and
so is the peak of memory of each contender: the highest resident size that the kernel sees, less that before the step.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from results import write_section
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import compile_policy
from compile_policy import CompilationConfig

SHAPES = ((1, 256), (4, 128))
MIXED = (
    *((1, 64), (2, 40), (1, 100), (3, 33), (2, 64), (1, 128)),
    *((4, 24), (1, 77), (2, 90), (5, 16), (3, 50), (1, 31)),
)
CASES = {
    "full": {"lora": False, "checkpointing": False},
    "full, checkpointing": {"lora": False, "checkpointing": True},
    "LoRA": {"lora": True, "checkpointing": False},
    "LoRA, checkpointing": {"lora": True, "checkpointing": True},
}
VOCABULARY = 512


@dataclass
class Contender:
    """One way to train the model."""

    name: str
    model: Any
    call: Any
    optimizer: torch.optim.Optimizer
    first: float = 0.0
    graphs: int = 0
    seconds: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)


def build(layers: int, hidden: int, lora: bool, checkpointing: bool) -> Any:
    """A random Llama in training mode; heads of 32 (64 from a hidden size of 1024 on)."""
    heads = hidden // (64 if hidden >= 1024 else 32)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        use_cache=False,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def decoder(model: Any) -> Any:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model


def policy(model: Any) -> Any:
    return compile_policy.apply(model, CompilationConfig(cache_dir=False))


def stock(model: Any) -> Any:
    return torch.compile(model, dynamic=True)


def trainer(model: Any) -> Any:
    """What ``Trainer(torch_compile=True)`` does: accelerate compiles the whole model with Inductor's defaults."""
    return torch.compile(model)


def regional(model: Any) -> Any:
    from accelerate.utils import compile_regions

    part = decoder(model)
    for number, layer in enumerate(part.layers):
        part.layers[number] = compile_regions(layer, dynamic=True)
    return model


WAYS: dict[str, Callable[[Any], Any]] = {
    "eager": lambda model: model,
    "compile-policy": policy,
    "torch.compile(dynamic=True)": stock,
    "Trainer(torch_compile=True)": trainer,
    "accelerate compile_regions": regional,
}


def contender(name: str, model: Any) -> Contender:
    own = copy.deepcopy(model)
    weights = [p for p in own.parameters() if p.requires_grad]
    return Contender(name, own, WAYS[name](own), torch.optim.SGD(weights, lr=1e-3))


def batch(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


def step(one: Contender, ids: torch.Tensor) -> float:
    loss = one.call(input_ids=ids, labels=ids).loss
    loss.backward()
    one.optimizer.step()
    one.optimizer.zero_grad()
    return float(loss.detach())


def mixed(one: Contender) -> None:
    """All mixed sizes, with an evaluation after every third: compiles, and counts graphs."""
    before, started = counters["stats"]["unique_graphs"], time.process_time()
    for number, shape in enumerate(MIXED):
        one.model.train()
        one.losses.append(step(one, batch(*shape)))
        if number % 3 == 2:
            one.model.eval()
            with torch.no_grad():
                one.losses.append(float(one.call(input_ids=batch(*shape), labels=batch(*shape)).loss))
    one.model.train()
    one.first = time.process_time() - started
    one.graphs = counters["stats"]["unique_graphs"] - before
    if one.name == "compile-policy":  # its captures, of which Dynamo counts some twice
        one.graphs = sum(row.graphs for row in compile_policy.report(one.model).components)


def equal(one: Contender, eager: Contender) -> bool:
    return all(abs(a - b) <= 1e-4 * abs(b) for a, b in zip(one.losses, eager.losses, strict=True))


def measure(case: str, layers: int, hidden: int, rounds: int, ways: list[str]) -> list[dict[str, Any]]:
    model = build(layers, hidden, **CASES[case])
    rows = [contender(name, model) for name in ways]
    for row in rows:
        mixed(row)
    for shape in SHAPES:
        for row in rows:
            step(row, batch(*shape))
            row.seconds[shape] = []
        for _ in range(rounds):
            for row in rows:
                started = time.process_time()
                step(row, batch(*shape))
                row.seconds[shape].append(time.process_time() - started)
    return [
        {
            "name": row.name,
            "seconds": [statistics.median(row.seconds[shape]) for shape in SHAPES],
            "first": row.first,
            "graphs": row.graphs,
            "equal": equal(row, rows[0]),
        }
        for row in rows
    ]


def peak(case: str, layers: int, hidden: int, way: str) -> float:
    """MiB that two steps of the largest batch need beyond what is there between steps, once everything is compiled.

    Freed memory goes back to the system and the kernel's mark is put back before the steps, so that what compiling
    needed does not count.
    """
    one = contender(way, build(layers, hidden, **CASES[case]))
    for shape in (*MIXED[:2], SHAPES[1], SHAPES[1]):
        step(one, batch(*shape))
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as marks:
        marks.write("5")
    before = _resident("VmRSS")
    for _ in range(2):
        step(one, batch(*SHAPES[1]))
    return (_resident("VmHWM") - before) / 1024


def _resident(name: str) -> int:
    """KiB that the kernel says of this process."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def apart(options: argparse.Namespace, *more: str) -> Any:
    """What this script says as JSON in a separate process, with empty compile caches."""
    sizes = ["--layers", str(options.layers), "--hidden", str(options.hidden), "--rounds", str(options.rounds)]
    command = [sys.executable, __file__, *sizes, "--ways", options.ways, *more]
    with tempfile.TemporaryDirectory() as caches:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def table(case: str, rows: list[dict[str, Any]], peaks: dict[str, float]) -> list[str]:
    titles = " | ".join(f"{rows} x {tokens}, ms | x eager" for rows, tokens in SHAPES)
    lines = [f"| {case} | {titles} | peak, MiB | first 12 sizes, CPU-s | graphs | losses equal |", f"|{'---|' * 9}"]
    for row in rows:
        cells = [row["name"]]
        for mine, eager in zip(row["seconds"], rows[0]["seconds"], strict=True):
            cells += [f"{mine * 1e3:.1f}", f"{eager / mine:.2f}"]
        memory = f"{peaks[row['name']]:.0f}" if row["name"] in peaks else "-"
        cells += [memory, f"{row['first']:.1f}", str(row["graphs"]), "yes" if row["equal"] else "NO"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 8), ("hidden", 256), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cases", default=";".join(CASES), help="separated by ;")
    parser.add_argument("--ways", default=";".join(WAYS), help="separated by ;")
    parser.add_argument("--note", default="", help="a remark below the table")
    parser.add_argument("--no-memory", action="store_true", help="leave the peaks out")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="replace the section in benchmarks/RESULTS.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # contenders share code objects, and with them the limit
    ways = options.ways.split(";")
    if options.one and options.peak_of:
        print(json.dumps(peak(options.one, options.layers, options.hidden, options.peak_of)))
    elif options.one:
        print(json.dumps(measure(options.one, options.layers, options.hidden, options.rounds, ways)))
    else:
        report(options, ways)


def report(options: argparse.Namespace, ways: list[str]) -> None:
    size = f"{options.layers}x{options.hidden}"
    lines = [
        f"{options.layers} layers, hidden {options.hidden}, one thread, CPU, float32, torch {torch.__version__}, "
        f"Transformers {transformers.__version__}; forward, backward and SGD, processor milliseconds, median of "
        f"{options.rounds} interleaved rounds; compile caches empty at the start. Graphs over 12 mixed sizes in "
        f"training and 4 in evaluation. `python benchmarks/bench_train.py --layers {options.layers} --hidden "
        f"{options.hidden} --rounds {options.rounds}`",
        "",
    ]
    for case in options.cases.split(";"):
        rows = apart(options, "--one", case)
        peaks = {}
        if not options.no_memory:
            peaks = {way: apart(options, "--one", case, "--peak-of", way) for way in ways}
        lines += table(case, rows, peaks)
        print("\n".join(lines), flush=True)
        if options.write:
            note = [options.note] if options.note else []
            write_section(f"train-{size}", f"Training steps, {size}", "\n".join([*lines, *note]))


if __name__ == "__main__":
    main()
