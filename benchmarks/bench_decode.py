"""Greedy decoding through ``generate()``: the policy beside eager and the ways in which people compile today.

    python benchmarks/bench_decode.py [--layers 8] [--hidden 256] [--tokens 64] [--prefill 256] [--rounds 7] [--write]
    python benchmarks/bench_decode.py --layers 16 --hidden 1024 --tokens 24 --rounds 5 --write
    python benchmarks/bench_decode.py --levels --write

Every contender has its own copy of one random Llama and answers the same prompts; rounds are interleaved, so that a
machine that slows down slows all of them. Reported: milliseconds a token (median of the rounds; processor time on a
CPU, time until the device is done elsewhere) and the ratio to eager in the same run, the same for the prefill of a
longer prompt (an answer of one token), the seconds that the first answer took, and how many graphs Dynamo made. A size
is a section of its own in RESULTS.md, and so is ``--levels``: the policy's own levels beside each other.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from results import write_section
from torch._dynamo.utils import counters
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

import compile_policy
from compile_policy import CompilationConfig
from compile_policy_transformers.cache_argument import CACHE

PROMPTS = (40, 57, 23)


@dataclass
class Contender:
    """One way to run the model."""

    name: str
    model: PreTrainedModel
    arguments: dict[str, Any] = field(default_factory=dict)
    first: float = 0.0
    graphs: int = 0
    seconds: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    equal: bool = True


def build(layers: int, hidden: int) -> PreTrainedModel:
    """A random Llama; heads of 32 (64 from a hidden size of 1024 on), feed-forward 2.75 times as wide."""
    heads = hidden // (64 if hidden >= 1024 else 32)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def regional(model: PreTrainedModel) -> None:
    from accelerate.utils import compile_regions

    model.model = compile_regions(model.model, dynamic=True)


def contenders(model: PreTrainedModel, cache: str, levels: bool) -> list[Contender]:
    """Eager first; the policy second; then the peers that take this kind of cache, or the levels of the policy."""

    def made(name: str, prepare: Callable[[PreTrainedModel], Any], **arguments: Any) -> Contender:
        own = copy.deepcopy(model)
        prepare(own)
        return Contender(name, own, arguments)

    def policy(**wishes: Any) -> Callable[[PreTrainedModel], Any]:
        return lambda m: compile_policy.apply(m, CompilationConfig(cache_dir=False, **wishes))

    rows = [made("eager", lambda m: None)]
    if levels:
        return rows + [made(f"compile-policy -O{level}", policy(mode=level)) for level in (1, 2, 3)]
    rows += [
        made("compile-policy", policy()),
        made("decoder.compile(dynamic=True)", lambda m: m.model.compile(dynamic=True)),
        made("accelerate compile_regions", regional),
    ]
    if cache == "static":
        everywhere = CompileConfig()
        everywhere._compile_all_devices = True
        rows.append(made("generate's own compile", lambda m: None, compile_config=everywhere))
    return rows


def run(contender: Contender, ids: torch.Tensor, cache: str, tokens: int) -> torch.Tensor:
    arguments = dict(contender.arguments)
    if cache == "static":
        length = -(-(ids.shape[1] + tokens) // 256) * 256
        arguments[CACHE] = StaticCache(contender.model.config, max_cache_len=length)
    return contender.model.generate(
        ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **arguments
    )


def measure(rows: list[Contender], cache: str, tokens: int, prefill: int, rounds: int) -> None:
    device = rows[0].model.device
    *prompts, long = [
        torch.randint(0, 500, (1, n), generator=torch.Generator().manual_seed(n)).to(device)
        for n in (*PROMPTS, prefill)
    ]
    wanted = [run(rows[0], ids, cache, tokens) for ids in prompts]
    for row in rows:
        before = counters["stats"]["unique_graphs"]
        started = time.perf_counter()
        answers = [run(row, prompts[0], cache, tokens)]
        row.first = time.perf_counter() - started
        answers += [run(row, ids, cache, tokens) for ids in prompts[1:]]
        row.graphs = counters["stats"]["unique_graphs"] - before
        row.equal = all(torch.equal(a, b) for a, b in zip(answers, wanted, strict=True))
        run(row, long, cache, 1)  # whoever compiles for another length does it here
    for _ in range(rounds):
        for row in rows:
            row.seconds.append(_seconds(row, prompts[0], cache, tokens))
            row.prefill.append(_seconds(row, long, cache, 1))


def _seconds(row: Contender, ids: torch.Tensor, cache: str, tokens: int) -> float:
    """Seconds of an answer: of the processor, or until another device is done."""
    if ids.device.type == "cpu":
        started = time.process_time()
        run(row, ids, cache, tokens)
        return time.process_time() - started
    torch.accelerator.synchronize()
    started = time.perf_counter()
    run(row, ids, cache, tokens)
    torch.accelerator.synchronize()
    return time.perf_counter() - started


def table(rows: list[Contender], cache: str, tokens: int) -> list[str]:
    lines = [
        f"| {cache} cache | ms a token | x eager | ms a prefill | x eager | first answer, s | graphs | tokens equal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    eager, eager_prefill = statistics.median(rows[0].seconds), statistics.median(rows[0].prefill)
    for row in rows:
        median, prefill = statistics.median(row.seconds), statistics.median(row.prefill)
        lines.append(
            f"| {row.name} | {median / tokens * 1e3:.2f} | {eager / median:.2f} | {prefill * 1e3:.1f} | "
            f"{eager_prefill / prefill:.2f} | {row.first:.1f} | {row.graphs} | {'yes' if row.equal else 'NO'} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 8), ("hidden", 256), ("tokens", 64), ("prefill", 256), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--levels", action="store_true", help="-O1, -O2 and -O3 instead of the peers")
    parser.add_argument("--write", action="store_true", help="replace the section in benchmarks/RESULTS.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # first answers are cold ones
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # contenders share code objects, and with them the limit
    model = build(options.layers, options.hidden).to(options.device)
    where = "one thread, CPU" if options.device == "cpu" else torch.cuda.get_device_name()
    lines = [
        f"{options.layers} layers, hidden {options.hidden}, {options.tokens} tokens, prefill of {options.prefill}, "
        f"{where}, float32, torch {torch.__version__}; median of {options.rounds} interleaved rounds; compile "
        "caches empty at the start.",
        "",
    ]
    for cache in ("dynamic", "static"):
        rows = contenders(model, cache, options.levels)
        measure(rows, cache, options.tokens, options.prefill, options.rounds)
        lines += [*table(rows, cache, options.tokens), ""]
        print("\n".join(lines), flush=True)
    if options.write:
        size = f"{options.layers}x{options.hidden}" + ("" if options.device == "cpu" else f"-{options.device}")
        name, what = ("levels", "Levels") if options.levels else ("decode", "Decoding")
        write_section(f"{name}-{size}", f"{what} through generate(), {size}", "\n".join(lines))


if __name__ == "__main__":
    main()
