"""What has to hold with every supported pair of versions, measured in the environment that runs this file.

Prints one JSON object. Needs nothing but the package and its dependencies, so that it runs in a bare environment.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import compile_policy as cp
from compile_policy import self_test
from compile_policy.glance import versions_move
from compile_policy_transformers import self_test as decoder_self_test
from compile_policy_transformers.tiny import tiny_inputs, tiny_model

#: In this order, so that a part of them is still a choice.
ARCHITECTURES = (
    *("llama", "qwen3_5", "gemma3", "voxtral", "mamba2", "qwen2_5_vl"),
    *("jamba", "gpt2", "mixtral", "bloom", "deepseek_v3", "evolla"),
)
_PICTURES = {"gemma3", "qwen3_5", "qwen2_5_vl"}
_SOUNDS = {"voxtral"}
_SIZES = ((9, 1), (14, 2))
_CACHES = (None, "static")
_TOLERANCE = 1e-3
_NEW_TOKENS = 3
_SECOND_START = "--second-start"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", type=int, default=len(ARCHITECTURES), help="how many of the list")
    parser.add_argument(_SECOND_START, metavar="FOLDER", help="run the embedded model once on this cache directory")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    if asked.second_start:
        print(json.dumps(_embedded(Path(asked.second_start))))
        return 0
    row: dict[str, Any] = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "changes seen by": "versions" if versions_move() else "contents",
        "self-test": self_test.self_test() + decoder_self_test(),
        "recorder": _attempt(_recorder),
        "fault": _attempt(_fault),
        "embedded": _attempt(_two_starts),
        "architectures": {},
    }
    for name in ARCHITECTURES[: asked.architectures]:
        row["architectures"][name] = _attempt(_architecture, name)
        print(name, row["architectures"][name], file=sys.stderr, flush=True)
    print(json.dumps(row))
    return 0


def _attempt(check: Any, *args: Any) -> Any:
    """What a check found, or the exception that ended it: a row has to say why it is red."""
    try:
        return check(*args)
    except Exception as error:
        return {"raises": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}


def _two_starts() -> dict[str, Any]:
    """The embedded model through Inductor in two processes on one cache directory."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = _start(folder), _start(folder)
    return {"first": first, "second": second}


def _start(folder: str) -> dict[str, Any]:
    command = [sys.executable, __file__, _SECOND_START, folder]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(ran.stderr.strip().splitlines()[-1])
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def _embedded(folder: Path) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    config = cp.CompilationConfig(cache_dir=folder / "entries")
    started = time.perf_counter()
    model = cp.load_model(config=config)
    inputs = tiny_inputs(model, text_len=6, images=[(48, 48)])
    got = _generated(model, inputs, None)
    seconds = time.perf_counter() - started
    with cp.eager(model):
        want = _generated(model, inputs, None)
    row = _decoder(model)
    return {
        "equal": _error(got, want) <= _TOLERANCE,
        "graphs": row.graphs,
        "eager_calls": row.eager_calls,
        "loaded": row.loaded,
        "frames": int(sum(counters["frames"].values())),
        "seconds": round(seconds, 1),
        "fallback": row.fallback,
    }


def _architecture(name: str) -> dict[str, Any]:
    model = tiny_model(name)
    calls = [(_inputs(model, name, *size), kind) for size in _SIZES for kind in _CACHES]
    expected = [_attempt(_generated, model, inputs, kind) for inputs, kind in calls]
    encoders = name in _PICTURES
    cp.apply(model, cp.CompilationConfig(backend="eager", cache_dir=False, compile_mm_encoder=encoders))
    worst = 0.0
    for (inputs, kind), want in zip(calls, expected, strict=True):
        if isinstance(want, dict):  # eager itself cannot do it
            continue
        worst = max(worst, _error(_generated(model, inputs, kind), want))
    compiled = [row for row in cp.report(model).components if row.decision == "compile"]
    return {
        "equal": worst <= _TOLERANCE,
        "error": worst,
        "graphs": {row.role: row.graphs for row in compiled},
        "eager_calls": sum(row.eager_calls for row in compiled),
        "fallback": next((row.fallback for row in compiled if row.fallback), None),
    }


def _inputs(model: Any, name: str, length: int, batch: int) -> dict[str, Any]:
    if name in _PICTURES:
        return tiny_inputs(model, text_len=length, batch=batch, images=[(56, 56)])
    if name in _SOUNDS:
        return tiny_inputs(model, text_len=length, batch=batch, sounds=[3000])
    return tiny_inputs(model, text_len=length, batch=batch)


def _generated(model: Any, inputs: dict[str, Any], kind: str | None) -> Any:
    options: dict[str, Any] = {"max_new_tokens": _NEW_TOKENS, "do_sample": False, "output_logits": True}
    if kind is not None:
        options["cache_implementation"] = kind
    with torch.no_grad():
        return model.generate(**inputs, **options, return_dict_in_generate=True).logits


def _error(got: Any, want: Any) -> float:
    if len(got) != len(want):
        return float("inf")
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))


def _decoder(model: Any) -> Any:
    return next(row for row in cp.report(model).components if row.role == "decoder")


class _Recording(nn.Module):
    """Counts its calls in a buffer, and is recorded by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.shape[0]
        result: torch.Tensor = self.linear(x).relu()
        return result


def _recorder() -> dict[str, Any]:
    """What a hook and a buffer record, against eager."""
    torch.manual_seed(0)
    plain = _Recording()
    decorated = type("Decorated", (_Recording,), {})
    made = cp.support_torch_compile(config=cp.CompilationConfig(backend="eager", cache_dir=False))(decorated)()
    made.load_state_dict(plain.state_dict())
    recorded: list[list[float]] = [[], []]
    for module, into in zip((plain, made), recorded, strict=True):
        module.linear.register_forward_hook(lambda m, args, out, into=into: into.append(float(out.detach().sum())))
        with torch.no_grad():
            for rows in (2, 5, 1):
                module(torch.ones(rows, 3))
    return {"equal": recorded[0] == recorded[1] and bool(plain.seen == made.seen)}


class _Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def _fault() -> dict[str, Any]:
    """A forward that branches on values: eager's result for both, and a reason that names the line."""
    made = cp.support_torch_compile(config=cp.CompilationConfig(backend="eager", cache_dir=False))(_Branching)()
    x = torch.ones(2, 3)
    with torch.no_grad():
        equal = torch.equal(made(x), x + 1) and torch.equal(made(-x), -x - 1)
    from compile_policy.applied import regions

    (region,) = regions(made)
    reason = str(region.report().fallback)
    return {"equal": equal, "eager_calls": region.eager_calls, "named": "contract.py" in reason, "reason": reason}


if __name__ == "__main__":
    sys.exit(main())
