"""What compiled code takes for granted about versions, the machine and the process, by name."""

from __future__ import annotations

import functools
import platform
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from compile_policy import compat
from compile_policy.artifacts.key import JSON
from compile_policy.compat_precision import float32_precisions
from compile_policy.saving.sources import package_digest
from compile_policy.saving.stable import Unstable, digest

#: Flags of a processor that a compiler may use on its own when it compiles for the machine that it runs on.
_INSTRUCTIONS = re.compile(
    r"(avx|sse|ssse|pni|fma|f16c|bmi|abm|popcnt|lzcnt|movbe|adx|aes|vaes|sha|gfni|vpclmul|pclmul|amx|sve|sme|neon|asimd"
    r"|fp|bf16|i8mm|dotprod|crc32|atomics)"
)
#: Parts of the policy that have no influence on what is compiled.
_BESIDE = ("cli", "graphs", "__pycache__")


def versions(classes: Iterable[type], binder: object) -> dict[str, JSON]:
    """Versions of Python, torch and the libraries that the classes are from, and the policy's own sources."""
    packages = sorted({cls.__module__.split(".")[0] for cls in classes} - {"builtins", "__main__"})
    found: dict[str, JSON] = {
        "python": platform.python_version(),
        "torch": f"{torch.__version__} {torch.version.git_version}",
    }
    for package in packages:
        version = getattr(sys.modules.get(package), "__version__", None)
        if version is not None and package != "torch":
            found[package] = str(version)
    found["policy"] = policy_digest(type(binder).__module__.split(".")[0])
    return found


@functools.cache
def policy_digest(backend: str) -> str:
    """Digest of the policy's own sources, and of the backend's."""
    packages = [p for p in ("compile_policy", backend) if p.startswith("compile_policy")]
    return digest([package_digest(p, _BESIDE) for p in sorted(set(packages))])


def machine(devices: Iterable[torch.device]) -> dict[str, JSON]:
    """The device types with their capability, the processor's instructions, and the number of threads."""
    found: dict[str, JSON] = {"device": ", ".join(sorted({_capability(device) for device in devices}))}
    found["instructions"] = f"{platform.system()} {platform.machine()} {compat.cpu_capability()} {_instructions()}"
    found["threads"] = str(torch.get_num_threads())  # compiled into the loops of a kernel
    return found


def _capability(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda {major}.{minor} {torch.version.cuda or torch.version.hip}"


@functools.cache
def _instructions() -> str:
    """Packages are compiled for the machine they are made on, so another processor may not know their instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").partition(":")[2].split()
    return digest(sorted(flag for flag in flags if _INSTRUCTIONS.match(flag)))


def numerics() -> str:
    """Switches of the process that change what kernels compute, beside those that a call key holds."""
    cuda = torch.backends.cuda
    values: list[Any] = [*float32_precisions(), torch.backends.cudnn.deterministic]
    values += [cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_bf16_reduced_precision_reduction]
    values += [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()]
    values += [torch.backends.mkldnn.enabled]
    return " ".join(map(str, values))


def inductor() -> str:
    """Inductor's own settings.

    Raises:
        Unstable: a pass written by the user is installed, which no setting describes.
    """
    custom = compat.inductor_passes()
    if custom:
        raise Unstable(f"Inductor's {custom[0]} is a pass of the user's")
    return digest(sorted((name, repr(value)) for name, value in compat.inductor_settings().items()))
