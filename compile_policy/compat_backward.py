"""Inductor's JIT for graphs with gradients: the backward keeps the sizes dynamic that the forward does.

`capture` traces without the assumption that no size is 0 or 1 (``backed_size_oblivious``). Under that setting
AOTAutograd compares the strides of the tensors saved for the backward with those that the compiled forward
returned, as values that might differ, takes every pair for different, and fixes the backward to the strides of the
example. Here the setting is off for that comparison alone: between the compilation of the forward and that of the
backward.
Drop this once ``_aot_stage2b_bw_compile`` compares hints; `tests/test_training.py` has the test that then fails.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch.fx.experimental._config as fx_config
import torch.utils.checkpoint as torch_checkpoint
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

#: Part of the key of torch's own caches, which do not tell apart what was traced with and without the assumption that
#: no size is 0 or 1. Nothing reads it.
_MARK = {"aot_inductor.metadata": {"compile_policy": "sizes of 0 and 1 are not excluded"}}

#: Random numbers come from eager's operators, in their order: the same seed draws the same dropout masks.
EAGER_RANDOM = {"fallback_random": True}

#: A backward may run twice: ``loss.backward(retain_graph=True)``.
_FUNCTORCH = {"donated_buffer": False}


def any_size() -> Any:
    """A context manager in which no size is assumed to be above 1."""
    return fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]


def inductor_jit(gm: torch.fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile a captured graph, and its backward where gradients are wanted, inside its capture."""
    compile_inner = _CompileInner()
    patches = {**_MARK, **EAGER_RANDOM, **options}
    with any_size(), functorch_config.patch(_FUNCTORCH):
        compile_inner.capturing = True
        try:
            code: Any = compile_fx(gm, list(inputs), inner_compile=compile_inner, config_patches=patches)
        finally:
            compile_inner.capturing = False
    compiled: Callable[..., Any] = code
    return compiled


class _CompileInner:
    """Compiles one graph, forward or backward; what follows inside the capture may compare sizes by their hints."""

    capturing = False

    def __call__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any], **given: Any) -> Any:
        with any_size():
            code = compile_fx_inner(gm, inputs, **given)
        if self.capturing:  # the patch round the capture gives the setting back
            fx_config.backed_size_oblivious = False
        return code


def keep_checkpoints(gm: torch.fx.GraphModule) -> None:
    """Make checkpoints of a graph that runs as it was captured those of eager.

    Dynamo's operator for them leaves random numbers and autocast to the compiler behind it: run as it is, a part that
    is computed again draws other dropout masks, and multiplies in another precision.
    """
    for module in [m for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]:
        for node in module.graph.nodes:
            if node.target is torch.ops.higher_order.tag_activation_checkpoint:
                node.target = torch_checkpoint.checkpoint
                node.kwargs = {**node.kwargs, "use_reentrant": False}
        module.recompile()


@contextmanager
def plain_checkpoints() -> Iterator[None]:
    """Inside the block, reentrant checkpoints of this thread keep what they would compute again.

    Reentrant checkpoints refuse ``torch.autograd.grad``. As in them, nothing has a gradient where no argument has one.
    """
    owner, stock = threading.get_ident(), torch_checkpoint.CheckpointFunction

    class Kept:
        @staticmethod
        def apply(run: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            if threading.get_ident() != owner:
                return stock.apply(run, preserve, *args)
            wanted = any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
            with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
                return run(*args)

    torch_checkpoint.CheckpointFunction = Kept  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch_checkpoint.CheckpointFunction = stock  # type: ignore[misc]


@contextmanager
def tensor_hooks_off(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside the block, hooks that were registered on these leaves do not run."""
    hooked = [(t, t._backward_hooks) for t in tensors if t._backward_hooks]
    for tensor, _ in hooked:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks
