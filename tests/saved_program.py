"""A process that runs one model with a store and says what happened; the tests of saved entries start it.

Arguments: the model (``tiny:<model type>``), the store's directory, and options: ``encoder`` compiles the towers too,
``seed=N`` gives other weights, ``name=PATH`` says that they came from elsewhere, ``mode=N`` is the level, ``static``
generates with a static cache.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import convert_frame, utils

import compile_policy
from compile_policy import CompilationConfig
from compile_policy.events import listening
from compile_policy_transformers import tiny_inputs


def main(name: str, cache: str, *options: str) -> None:
    seen: list[list[str]] = []
    encoder = "encoder" in options
    mode = next((int(o.removeprefix("mode=")) for o in options if o.startswith("mode=")), 2)
    config = CompilationConfig(cache_dir=Path(cache), compile_mm_encoder=encoder, mode=mode)
    with listening(lambda event: seen.append([event.kind, event.component, event.message])):
        model = compile_policy.load_model(name, config=config)
        for option in options:
            if option.startswith("seed="):
                torch.manual_seed(int(option.removeprefix("seed=")))
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.normal_(0, 0.05)
            if option.startswith("name="):
                for module in model.modules():
                    if hasattr(module, "config"):
                        module.config._name_or_path = option.removeprefix("name=")
        torch.manual_seed(0)
        inputs = tiny_inputs(model, text_len=8, images=[(64, 96)] if encoder else [])
        if "static" in options:
            inputs["cache_implementation"] = "static"
        compiled = [_tokens(model, inputs) for _ in range(2)]
    with compile_policy.eager(model):
        eager = _tokens(model, inputs)
    rows = [row for row in compile_policy.report(model).to_dict()["components"] if row["decision"] == "compile"]
    print(
        json.dumps(
            {
                "rows": rows,
                "equal": compiled == [eager, eager],
                "frames": convert_frame.FRAME_COUNTER,
                "captured": utils.counters["stats"]["unique_graphs"],
                "events": seen,
            }
        )
    )


def _tokens(model: Any, inputs: dict[str, Any]) -> list[list[int]]:
    tokens: list[list[int]] = model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()
    return tokens


if __name__ == "__main__":
    main(*sys.argv[1:])
