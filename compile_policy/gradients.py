"""Gradients of two runs of one component, eager and compiled, compared by value.

Both runs get the same random cotangents for every floating result. Compared are the gradients of all parameters that
require one and of all tensors of the call that do. A tensor that has no gradient in one run must have none in the
other: an optimizer treats a gradient of zeros and none at all differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch

from compile_policy.compat_backward import plain_checkpoints, tensor_hooks_off

#: Largest difference between two gradients, relative to the largest value of the tensor's gradient.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}

#: Gradients smaller than this, relative to the largest of all, are compared by this scale: where the terms of a sum
#: cancel, as for the bias of keys in attention, what is left is rounding.
SMALLEST = 1e-3

Gradients = Mapping[str, torch.Tensor | None]


def wanted_of(module: torch.nn.Module, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by name whose gradients are compared: parameters, and those of the call, that require one."""
    found: dict[str, torch.Tensor] = {
        f"the gradient of {name}": p for name, p in module.named_parameters() if p.requires_grad
    }
    for name, tensor in given.items():
        if tensor.requires_grad and tensor.is_leaf:
            found[f"the gradient of the argument {name.lstrip('.')}"] = tensor
    return found


def cotangents_of(results: Mapping[str, torch.Tensor], rows: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Reproducible random cotangents for the results that have a gradient.

    Args:
        rows: boolean, (batch, sequence): the positions that count. Others get cotangents of zero, and results of
            other sizes get none.
    """
    generator = torch.Generator().manual_seed(0)
    found = {}
    for path, result in results.items():
        if not result.requires_grad or (rows is not None and result.shape[:-1] != rows.shape):
            continue
        drawn = torch.randn(result.shape, generator=generator).to(result.device, result.dtype)
        if rows is not None:
            drawn[~rows.to(result.device)] = 0
        found[path] = drawn
    return found


def gradients_of(
    results: Mapping[str, torch.Tensor],
    cotangents: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor | None]:
    """Gradients of ``wanted`` by name; ``.grad`` of no tensor changes, and no hook of a tensor runs.

    Raises:
        RuntimeError: what autograd raises, such as for a result that does not require a gradient.
    """
    if not cotangents or not wanted:
        return dict.fromkeys(wanted)
    outputs = [results[path] for path in cotangents]
    with _autocast_off(), tensor_hooks_off(list(wanted.values())):
        found = torch.autograd.grad(outputs, list(wanted.values()), list(cotangents.values()), allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def gradient_difference(got: Gradients, want: Gradients, tolerance: Mapping[torch.dtype, float]) -> str:
    """How the gradients differ, in words; empty where they do not."""
    sizes = {name: _largest(g) for name, g in want.items() if g is not None}
    smallest = SMALLEST * max(sizes.values(), default=0.0)
    for name, expected in want.items():
        found = got.get(name)
        if found is None and expected is None:
            continue
        if found is None or expected is None:
            return f"{name} is {_named(found)}, and {_named(expected)} in eager"
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return f"{name} is {_named(found)}, and {_named(expected)} in eager"
        error = _error(found, expected, max(sizes[name], smallest))
        if not error <= tolerance.get(expected.dtype, 0.0):
            return f"{name} differs from eager by {error:.2g}"
    return ""


@contextmanager
def comparable() -> Iterator[None]:
    """Inside the block, an eager run of a component that is checkpointed can be differentiated with `gradients_of`."""
    with plain_checkpoints():
        yield


@contextmanager
def _autocast_off() -> Iterator[None]:
    """A backward runs outside of autocast: each operator in the precision of its forward."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _largest(gradient: torch.Tensor) -> float:
    finite = gradient[gradient.isfinite()] if gradient.numel() else gradient
    return float(finite.abs().max().item()) if finite.numel() else 0.0


def _error(got: torch.Tensor, want: torch.Tensor, scale: float) -> float:
    wide = torch.complex128 if want.is_complex() else torch.float64
    a, b = got.detach().to(wide), want.detach().to(wide)
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    differences = (a - b)[b.isfinite()].abs()
    worst = float(differences.max().item()) if differences.numel() else 0.0
    return worst / scale if scale else worst


def _named(gradient: torch.Tensor | None) -> str:
    if gradient is None:
        return "none"
    return f"{gradient.dtype} of {tuple(gradient.shape)}"


def numbered(results: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Flat results of a graph by name."""
    return {f"result {i}": result for i, result in enumerate(results)}
