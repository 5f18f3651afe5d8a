"""What a decode step costs beside its kernels, ours and others side by side: every graph is replaced by a stub.

    python benchmarks/call_overhead.py [--layers 8 32 64] [--batches 9] [--calls 200] [--write]

All ways run one decoder on one thread, in turns, batch by batch; a figure is the median over the batches of the mean of
a batch. Included are the module's call, whatever is checked (guards; modes, arguments, cache, sizes), gathering the
graph's inputs with all parameters, writing the cache back, and Transformers' output object. Masks: a padding mask for
a dynamic cache, a dense one for a static cache, as ``generate`` passes them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.utils
from results import write_section
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import compile_policy
from compile_policy.applied import regions
from compile_policy_transformers.cache_argument import CACHE

PROMPT, SLOTS, WIDTH = 5, 64, 32
WAYS = {
    "all guards": "`torch.compile(fullgraph, dynamic)`",
    "portable guards": "the same with `torch.compiler.keep_portable_guards_unsafe`",
    "no guards": "the same with `torch.compiler.skip_all_guards_unsafe`",
    "code alone": "guards dropped and the transformed code called directly, which is what vLLM's decorator does "
    "(vLLM itself is not installed here)",
    "ours, dynamic": "compile-policy, `DynamicCache`",
    "ours, static": "compile-policy, `StaticCache`",
}
Run = Callable[[], Any]


def call(cache: Any, new: int, seen: int) -> dict[str, Any]:
    """Arguments of one call as ``generate`` passes them."""
    static = isinstance(cache, StaticCache)
    mask = torch.ones(1, 1, new, SLOTS, dtype=torch.bool) if static else torch.ones(1, seen + new, dtype=torch.long)
    return {
        "inputs_embeds": torch.randn(1, new, WIDTH),
        "attention_mask": mask,
        "position_ids": torch.arange(seen, seen + new)[None],
        CACHE: cache,
        "use_cache": True,
    }


def model_of(layers: int) -> Any:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


class Stub:
    """A program that returns what it returned first; its cache states stay one token longer than the prompt's."""

    def __init__(self, run: Callable[..., Sequence[torch.Tensor]]) -> None:
        self.first, self.results = run, None

    def __call__(self, *inputs: Any) -> Any:
        if self.results is None:
            self.results = self.first(*inputs)
        return self.results

    def run(self, inputs: list[Any]) -> Any:
        return self.results


def decode(decoder: Any, arguments: dict[str, Any]) -> Any:
    return decoder(**arguments)


def stock(layers: int, way: str) -> Run:
    """A decode step through Dynamo's code, with the guards that ``way`` says."""
    decoder = model_of(layers).model
    keep = {
        "all guards": None,
        "portable guards": torch.compiler.keep_portable_guards_unsafe,
        "no guards": torch.compiler.skip_all_guards_unsafe,
        "code alone": torch.compiler.skip_all_guards_unsafe,
    }[way]
    # Dynamo files compiled code under the code object: without guards, ways that share one would run each other's.
    name = f"step_{way.replace(' ', '_')}_{layers}"
    step = types.FunctionType(decode.__code__.replace(co_name=name), decode.__globals__)
    codes: dict[str, types.CodeType] = {}
    note = torch._dynamo.convert_frame.register_bytecode_hook(lambda old, new: codes.update({old.co_name: new}))
    compiled = torch.compile(
        step,
        backend=lambda gm, inputs: Stub(gm.forward),
        fullgraph=True,
        dynamic=True,
        options=None if keep is None else {"guard_filter_fn": keep},
    )
    cache = DynamicCache(config=decoder.config)
    decoder(**call(cache, PROMPT, 0))
    with torch._dynamo.config.patch(specialize_float=True):  # or each scale and epsilon is made a tensor at every call
        compiled(decoder, call(cache, 1, PROMPT))
    counted = dict(torch._dynamo.utils.counters["stats"])
    note.remove()
    arguments = call(cache, 1, PROMPT + 1)  # from here on, every call finds the same sizes
    if way == "code alone":
        run = types.FunctionType(codes[name], step.__globals__)
        return lambda: run(decoder, arguments)
    compiled(decoder, arguments)
    assert dict(torch._dynamo.utils.counters["stats"]) == counted, "a timed call would recompile"
    return lambda: compiled(decoder, arguments)


def ours(layers: int, way: str) -> Run:
    """A decode step through the policy, its program called as one that was lowered ahead of time."""
    config = compile_policy.CompilationConfig(backend="eager", on_fault="error")
    model = compile_policy.apply(model_of(layers), config)
    decoder = model.model
    cache: Any = DynamicCache(config=decoder.config)
    if way.endswith("static"):
        cache = StaticCache(decoder.config, max_cache_len=SLOTS)
    decoder(**call(cache, PROMPT, 0))
    decoder(**call(cache, 1, PROMPT))
    (region,) = regions(model)
    (entry,) = [e for found in region.entries.values() for e in found]
    stub: Any = Stub(entry.graph.code)
    stub.results = [torch.randn(1, 1, WIDTH)]
    if way.endswith("dynamic"):
        stub.results += [t for layer in cache.layers for t in (layer.keys, layer.values)]
    entry.graph.bound = [a.tensor for a in entry.graph.arguments if a.kind == "tensor"]
    entry.graph.order = [a.leaf for a in entry.graph.arguments if a.kind == "leaf"]
    entry.graph.program = stub
    arguments = call(cache, 1, PROMPT + 1)
    for _ in range(3):
        decoder(**arguments)
    before, bind, bound = entry.calls, region.binder.bind, [0]

    def counted(*args: Any) -> Any:
        bound[0] += 1
        return bind(*args)

    region.binder.bind = counted  # type: ignore[method-assign]
    decoder(**arguments)
    assert (entry.calls - before, bound[0], region.eager_calls) == (1, 0, 0), "the step is not recognised"
    return lambda: decoder(**arguments)


@torch.no_grad()
def microseconds(layers: int, batches: int, calls: int) -> dict[str, list[float]]:
    """way -> microseconds a call, one figure a batch."""
    ways = {way: (ours if way.startswith("ours") else stock)(layers, way) for way in reversed(WAYS)}
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    gc.collect()
    gc.disable()  # what capture leaves behind would be gone through at the cost of whoever allocates
    try:
        for _ in range(batches + 1):  # the first one warms up
            for way, run in ways.items():
                started = time.perf_counter()
                for _ in range(calls):
                    run()
                taken[way].append((time.perf_counter() - started) / calls * 1e6)
    finally:
        gc.enable()
    return {way: figures[1:] for way, figures in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--batches", type=int, default=9)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--write", action="store_true", help="replace the section in benchmarks/RESULTS.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = [
        f"Microseconds a call, median (minimum) of {options.batches} batches of {options.calls} calls, the ways in "
        f"turns; one thread, CPU, torch {torch.__version__}.",
        "",
        f"| layers | {' | '.join(WAYS)} |",
        f"|---|{'---|' * len(WAYS)}",
    ]
    for layers in options.layers:
        taken = microseconds(layers, options.batches, options.calls)
        cells = [f"{statistics.median(taken[way]):.0f} ({min(taken[way]):.0f})" for way in WAYS]
        lines.append(f"| {layers} | {' | '.join(cells)} |")
    lines += ["", *[f"- {way}: {what}" for way, what in WAYS.items()]]
    print("\n".join(lines))
    if options.write:
        write_section("call-cost", "What a decode step costs beside its kernels", "\n".join(lines))


if __name__ == "__main__":
    main()
