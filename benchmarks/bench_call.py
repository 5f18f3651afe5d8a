"""What a decode step costs beside its kernels: the policy's part of a call, with the graph replaced by a stub.

    python benchmarks/bench_call.py [--layers 8 32 64] [--calls 400] [--write]

Included: recognising the step, embeddings, positions and mask made canonical, size conditions, writing the cache back,
and Transformers' own output object.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import torch
from results import write_section
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import compile_policy
from compile_policy.applied import regions

PROMPT, SLOTS, WIDTH = 5, 64, 32


def call(decoder: torch.nn.Module, cache: Any, new: int, seen: int) -> dict[str, Any]:
    """Arguments of one call as ``generate`` passes them: padding mask for a dynamic cache, dense one for a static."""
    static = isinstance(cache, StaticCache)
    mask = torch.ones(1, 1, new, SLOTS, dtype=torch.bool) if static else torch.ones(1, seen + new, dtype=torch.long)
    return {
        "inputs_embeds": torch.randn(1, new, WIDTH),
        "attention_mask": mask,
        "position_ids": torch.arange(seen, seen + new)[None],
        "past_key_values": cache,
        "use_cache": True,
    }


@torch.no_grad()
def microseconds(layers: int, kind: str, calls: int) -> list[float]:
    """Sorted microseconds of ``calls`` decode steps whose graph does nothing."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = compile_policy.apply(
        LlamaForCausalLM(config).eval(), compile_policy.CompilationConfig(backend="eager", on_fault="error")
    )
    decoder = model.model
    cache: Any = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=SLOTS)
    decoder(**call(decoder, cache, PROMPT, 0))
    decoder(**call(decoder, cache, 1, PROMPT))
    (region,) = regions(model)
    (entry,) = [e for found in region.entries.values() for e in found]
    state = [t for layer in cache.layers for t in (layer.keys, layer.values)] if kind == "dynamic" else []
    results = [torch.randn(1, 1, WIDTH), *state]
    entry.graph.run = lambda leaves: results  # type: ignore[method-assign]
    step = call(decoder, cache, 1, PROMPT + 1)
    taken = []
    for _ in range(calls):
        started = time.perf_counter()
        decoder(**step)
        taken.append((time.perf_counter() - started) * 1e6)
    assert (region.eager_calls, region.graphs) == (0, 1)
    return sorted(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--write", action="store_true", help="replace the section in benchmarks/RESULTS.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = [
        f"Microseconds a call, median (minimum) of {options.calls}, one thread, CPU, torch {torch.__version__}.",
        "",
        "| layers | dynamic cache | static cache |",
        "|---|---|---|",
    ]
    for layers in options.layers:
        cells = []
        for kind in ("dynamic", "static"):
            taken = microseconds(layers, kind, options.calls)
            cells.append(f"{taken[len(taken) // 2]:.0f} ({taken[0]:.0f})")
        lines.append(f"| {layers} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if options.write:
        write_section("call-cost", "What a decode step costs beside its kernels", "\n".join(lines))


if __name__ == "__main__":
    main()
