"""Prefill of long prompts: the policy beside eager and the ways in which people compile today.

    python benchmarks/bench_prefill.py [--layers 4] [--hidden 256] [--lengths 256 2048 4096 8192] [--rounds 5] [--write]

Every contender has its own copy of one random Llama and answers one token to the same prompts, without padding and
with a tenth of each second row padded on the left; rounds are interleaved. Reported: milliseconds of processor time
(median of the rounds), the ratio to eager in the same run, and the memory that the call took at its peak beyond what
the process held before (Linux). A prompt is shown once before it is measured, so that whoever compiles for its length
does it there.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bench_decode import Contender, build, contenders
from results import write_section
from transformers import StaticCache

from compile_policy_transformers.cache_argument import CACHE

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Prompt:
    """Token ids (batch, length) and their padding mask."""

    name: str
    ids: torch.Tensor
    mask: torch.Tensor


@dataclass
class Figures:
    """What was measured of one contender on one prompt."""

    seconds: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)


def prompts(length: int, batches: list[int]) -> list[Prompt]:
    found = []
    for batch in batches:
        ids = torch.randint(0, 500, (batch, length), generator=torch.Generator().manual_seed(length + batch))
        mask = torch.ones_like(ids)
        found.append(Prompt(f"{batch} x {length}", ids, mask))
        if batch > 1:
            padded = mask.clone()
            padded[1::2, : length // 10] = 0
            found.append(Prompt(f"{batch} x {length}, padded", ids, padded))
    return found


def answer(row: Contender, prompt: Prompt, cache: str) -> torch.Tensor:
    arguments = dict(row.arguments)
    if cache == "static":
        room = -(-(prompt.ids.shape[1] + 1) // 256) * 256
        arguments[CACHE] = StaticCache(row.model.config, max_cache_len=room)
    return row.model.generate(
        prompt.ids, attention_mask=prompt.mask, max_new_tokens=1, do_sample=False, pad_token_id=0, **arguments
    )


def megabytes(field_name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field_name))
    return int(line.split()[1]) / 1024


def measure(rows: list[Contender], prompt: Prompt, cache: str, rounds: int) -> list[Figures]:
    wanted = answer(rows[0], prompt, cache)
    for row in rows:
        row.equal = row.equal and torch.equal(answer(row, prompt, cache), wanted)
    figures = [Figures() for _ in rows]
    for _ in range(rounds):
        for row, figure in zip(rows, figures, strict=True):
            CLEAR.write_text("5")
            before = megabytes("VmRSS")
            started = time.process_time()
            answer(row, prompt, cache)
            figure.seconds.append(time.process_time() - started)
            figure.peak.append(megabytes("VmHWM") - before)
    return figures


def table(prompt: Prompt, rows: list[Contender], figures: list[Figures]) -> list[str]:
    eager = statistics.median(figures[0].seconds)
    lines = []
    for row, figure in zip(rows, figures, strict=True):
        median = statistics.median(figure.seconds)
        peak = statistics.median(figure.peak)
        equal = "yes" if row.equal else "NO"
        lines.append(
            f"| {prompt.name} | {row.name} | {median * 1e3:.0f} | {eager / median:.2f} | {peak:.0f} | {equal} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 4), ("hidden", 256), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048, 4096, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--caches", nargs="+", default=["dynamic", "static"])
    parser.add_argument("--write", action="store_true", help="replace the section in benchmarks/RESULTS.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # contenders share code objects, and with them the limit
    model = build(options.layers, options.hidden)
    model.config.max_position_embeddings = 2 * max(options.lengths)
    lines = [
        f"{options.layers} layers, hidden {options.hidden}, one thread, CPU, float32, torch {torch.__version__}; "
        f"median of {options.rounds} interleaved rounds, processor time.",
        "",
    ]
    for cache in options.caches:
        lines += [f"| {cache} cache | | ms | x eager | MB at the peak | token equal |", "|---|---|---|---|---|---|"]
        rows = contenders(copy.deepcopy(model), cache, levels=False)
        for length in options.lengths:
            for prompt in prompts(length, options.batches):
                lines += table(prompt, rows, measure(rows, prompt, cache, options.rounds))
                print("\n".join(lines[-len(rows) :]), flush=True)
        lines.append("")
    if options.write:
        size = f"{options.layers}x{options.hidden}"
        write_section(f"prefill-{size}", f"Prefill of long prompts, {size}", "\n".join(lines))


if __name__ == "__main__":
    main()
