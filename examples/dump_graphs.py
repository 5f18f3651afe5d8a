"""Write the graphs of a model into a folder, and look into them."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import compile_policy
from compile_policy.graphs import Dump
from compile_policy.graphs.page import page_of
from compile_policy.graphs.stats import stats_of
from compile_policy_transformers.tiny import tiny_inputs


def main(folder: str | None = None) -> None:
    directory = Path(folder or tempfile.mkdtemp(prefix="graph_dumps_"))
    config = compile_policy.CompilationConfig(debug_dump_path=directory)
    model = compile_policy.load_model("tiny:qwen2_5_vl", config=config)
    model.generate(**tiny_inputs(model, text_len=8, images=[(56, 84)]), max_new_tokens=4, do_sample=False)

    for entry in Dump.open(directory).entries:
        component, numbers = entry.record["component"], stats_of(entry)
        print(f"{entry.id}: {component['cls']}, {numbers.ops} operations, {numbers.kernel_calls} kernel calls")
        print("  dynamic:", ", ".join(entry.record["labels"]))
        print("  most frequent:", ", ".join(f"{op} x{n}" for op, n in list(numbers.kinds.items())[:5]))
        line = next(line for line in entry.read("captured").splitlines() if "silu" in line)
        print("  for example:", " ".join(line.split()))
    page = directory / "graphs.html"
    page.write_text(page_of(Dump.open(directory)), "utf-8")
    print(f"see also: compile-policy graphs ls {directory}, and {page} in a browser")


if __name__ == "__main__":
    main(*sys.argv[1:2])
