"""A small decorated class on a store; tests of what happens between processes start it.

Arguments: the store's directory, then options: ``wait=SECONDS``, ``limit=SECONDS`` (of a compiler), ``barrier=PATH``
(waits until the file is there before the first call), ``files=N`` (descriptors that may be open after the model is
built), ``size=BYTES`` (that a file may have).
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
from torch import nn

import compile_policy
from compile_policy import CompilationConfig, support_torch_compile
from compile_policy.applied import regions
from compile_policy.events import Event, listening


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8, 8), 0.125))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.weight) + x


def main(cache: str, *options: str) -> None:
    given = dict(option.split("=", 1) for option in options)
    config = CompilationConfig(
        cache_dir=Path(cache),
        cache_wait=float(given.get("wait", 600)),
        compiler_timeout=float(given.get("limit", 300)),
    )
    seen: list[Event] = []
    with listening(seen.append), torch.no_grad():
        with compile_policy.use_config(config):
            model = Small()
        x = torch.arange(24, dtype=torch.float32).reshape(3, 8)
        wanted = torch.relu(x @ model.weight) + x
        while "barrier" in given and not Path(given["barrier"]).exists():
            time.sleep(0.005)
        if "files" in given:
            resource.setrlimit(resource.RLIMIT_NOFILE, (int(given["files"]), int(given["files"])))
        if "size" in given:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(given["size"]), int(given["size"])))
        equal = bool(torch.allclose(model(x), wanted))
        equal = equal and bool(torch.allclose(model(x[:2]), wanted[:2]))
    (region,) = regions(model)
    row = region.report()
    events = [[event.kind, event.message, event.data] for event in seen]
    found = {"graphs": row.graphs, "loaded": row.loaded, "fallback": row.fallback, "equal": equal, "events": events}
    print(json.dumps(found, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
