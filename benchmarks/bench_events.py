"""What listening costs a decode step: events, a time line, a profiler; and what nobody listening costs.

    python benchmarks/bench_events.py [--layers 32] [--rounds 40] [--calls 50] [--write]

The graph is replaced by a stub, so that what is measured is the policy's part of a call; the ways take turns in one
process. The first row is measured twice: the difference between the two is the noise.
"""

from __future__ import annotations

import argparse
import statistics
import time
import timeit
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from call_overhead import PROMPT, WIDTH, call
from results import write_section
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import compile_policy
from compile_policy import compat
from compile_policy.applied import regions
from compile_policy.events import listening
from compile_policy.trace import tracing


@contextmanager
def profiling() -> Iterator[None]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        yield


@torch.no_grad()
def microseconds(layers: int, rounds: int, calls: int) -> dict[str, float]:
    """Way -> median microseconds a decode step whose graph does nothing."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=layers, **sizes)
    wanted = compile_policy.CompilationConfig(backend="eager", on_fault="error")
    model = compile_policy.apply(LlamaForCausalLM(config).eval(), wanted)
    cache: Any = DynamicCache(config=config)
    model.model(**call(cache, PROMPT, 0))
    model.model(**call(cache, 1, PROMPT))
    (region,) = regions(model)
    (entry,) = [e for found in region.entries.values() for e in found]
    results = [torch.randn(1, 1, WIDTH), *(t for layer in cache.layers for t in (layer.keys, layer.values))]
    entry.graph.run = lambda leaves: results  # type: ignore[method-assign]
    step = call(cache, 1, PROMPT + 1)
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "nobody listens": nullcontext,
        "nobody listens, again": nullcontext,
        "events are heard": lambda: listening(lambda event: None),
        "a time line is made": lambda: tracing(model),
        "a profiler of torch is on": profiling,
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, around in ways.items():
            with around():
                model.model(**step)
                started = time.perf_counter()
                for _ in range(calls):
                    model.model(**step)
                taken[way].append((time.perf_counter() - started) / calls * 1e6)
            model.model(**step)  # after a profiler, the first call puts everything back
    assert (region.eager_calls, region.graphs) == (0, 1)
    return {way: statistics.median(found) for way, found in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--write", action="store_true", help="replace the section in benchmarks/RESULTS.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = microseconds(options.layers, options.rounds, options.calls)
    base = found["nobody listens"]
    question = min(timeit.repeat(compat.profiling, number=100_000, repeat=5)) * 1e4
    lines = [
        f"Microseconds a decode step beside its kernels, {options.layers} layers, dynamic cache, median of "
        f"{options.rounds} rounds of {options.calls} calls, one thread, CPU, torch {torch.__version__}.",
        f"Asking whether a profiler is on takes {question:.0f} ns of each.",
        "",
        "| way | us a call | x nobody |",
        "|---|---|---|",
        *(f"| {way} | {us:.1f} | {us / base:.2f} |" for way, us in found.items()),
    ]
    text = "\n".join(lines)
    print(text)
    if options.write:
        write_section("events-cost", "What listening costs", text)


if __name__ == "__main__":
    main()
