"""Versions that are supported, and private symbols of torch that others rely on."""

from __future__ import annotations

import re

from compile_policy.errors import EnvironmentNotSupported

TORCH_FLOOR = (2, 11)
TRANSFORMERS_FLOOR = (5, 17)


def check_versions(torch_version: str, transformers_version: str) -> None:
    """Refuse a torch or Transformers older than the oldest tested one."""
    for name, version, floor in (
        ("torch", torch_version, TORCH_FLOOR),
        ("transformers", transformers_version, TRANSFORMERS_FLOOR),
    ):
        found = re.match(r"(\d+)\.(\d+)", version)
        if found is None or (int(found[1]), int(found[2])) < floor:
            least = ".".join(map(str, floor))
            raise EnvironmentNotSupported(
                f"{name} {version} is not supported, {least} is the oldest that is.",
                remedy=f"pip install '{name}>={least}'",
            )
