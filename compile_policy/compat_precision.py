"""How exactly torch multiplies float32 numbers, read so that no way of setting it makes the reading fail.

Torch has two generations of this setting: ``set_float32_matmul_precision`` and ``allow_tf32``, and since 2.9
``fp32_precision`` of each backend and operation. After a write to the newer one the older one raises when it is read.
"""

from __future__ import annotations

from typing import Any

import torch

#: Operations whose float32 precision torch keeps apart; each value has its backend's default in it.
_OPERATIONS = [(backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")]
_older: Any = torch._C._get_float32_matmul_precision
_newer: Any = getattr(torch._C, "_get_fp32_precision_getter", None)


def matmul_precision() -> Any:
    """Return the precision of float32 products; `float32_precisions` where only torch's newer settings can be read.

    Cheap enough for every call. A change of the newer settings that leaves the older one readable concerns other
    operations than products; `float32_precisions` sees it.
    """
    try:
        return _older()
    except RuntimeError:  # "PyTorch is checking the matmul precision without a specific backend name"
        return float32_precisions()


def float32_precisions() -> tuple[str, ...]:
    """Return the float32 precision of every backend and operation: ``none``, ``ieee``, ``tf32`` or ``bf16`` each."""
    if _newer is None:
        return (_older(), str(torch._C._get_cublas_allow_tf32()), str(torch._C._get_cudnn_allow_tf32()))
    return tuple([_newer(backend, op) for backend, op in _OPERATIONS])


def product_dtypes() -> set[torch.dtype]:
    """Dtypes as exact as float32 products where the user allows less than float32; TF32 keeps ten bits, as float16."""
    given = matmul_precision()
    if not isinstance(given, str):
        matmul = [i for i, (_, operation) in enumerate(_OPERATIONS) if operation == "matmul"]
        given = " ".join([given[i] for i in matmul])
    found = set()
    if "bf16" in given or given == "medium":
        found.add(torch.bfloat16)
    if "tf32" in given or given == "high":
        found.add(torch.float16)
    return found
