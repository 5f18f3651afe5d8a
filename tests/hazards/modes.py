"""Modes of the process and the thread: gradients, autocast, training, defaults, contexts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .case import Case, Hazard, chunk, counting, forward, gradients, plain, prompt, training


class DoublingSilu(TorchFunctionMode):
    """Changes what functions of torch give."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is torch.nn.functional.linear else result


class DoublingMM(TorchDispatchMode):
    """Changes what operators give."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        return result * 2 if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) else result


class Tagged(torch.Tensor):
    """A tensor subclass that does nothing."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self


def _inside(make: Callable[[], AbstractContextManager[Any]]) -> Any:
    """A change: from now on calls run inside this context."""
    return lambda case: case.kept.update(context=make)


def _in_context(case: Case) -> Any:
    make = case.kept.get("context")
    if make is None:
        return forward(case)
    with make():
        return forward(case)


def _gradients_in_context(case: Case) -> Any:
    make = case.kept.get("context")
    if make is None:
        return gradients(case)
    with make():
        return gradients(case)


def _with_history(case: Case) -> Any:
    """Whether the result can be differentiated, and its gradient when it can."""
    inputs = copy.deepcopy(case.inputs)
    with torch.set_grad_enabled(case.kept.get("grad", False)):
        logits = case.model(**inputs).logits
    if not logits.requires_grad:
        return [logits]
    logits.square().mean().backward()
    return [logits, *[p.grad for p in case.model.parameters() if p.grad is not None]]


def _leaves_no_history(case: Case) -> Any:
    result = plain(case) if case.kept.get("grad") else forward(case)
    return [*result, torch.tensor(result[0].is_inference()), torch.tensor(result[0].requires_grad)]


def _in_inference_mode(case: Case) -> Any:
    with torch.inference_mode(case.kept.get("inference", False)):
        result = forward(case)
        return [*result, torch.tensor(result[0].is_inference())]


def _jvp(case: Case) -> Any:
    """A directional derivative by forward-mode automatic differentiation."""
    embeds = case.base.get_input_embeddings()(case.inputs["input_ids"]).detach()
    mask = case.inputs["attention_mask"]

    def call(x: torch.Tensor) -> torch.Tensor:
        return case.model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits[:, -1]  # type: ignore[no-any-return]

    if not case.kept.get("jvp"):
        with torch.no_grad():
            return call(embeds)
    case.base.set_attn_implementation("eager")
    return torch.func.jvp(call, (embeds,), (torch.ones_like(embeds),))


def _dropout(case: Case) -> None:
    """Random numbers in training: drawn with the user's generator."""
    training(case)
    for layer in case.decoder.layers:
        layer.self_attn.attention_dropout = 0.5


def _draws(case: Case) -> Any:
    """Two different seeds must give two different results, and the same seed the same."""
    results = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        with torch.no_grad():
            results.append(case.model(**copy.deepcopy(case.inputs)).logits)
    return [torch.equal(results[0], results[1]), torch.equal(results[0], results[2])]


def _outer(case: Case) -> None:
    """The user compiles the whole model on top."""
    case.model = torch.compile(case.model, backend="eager")


def _outer_call(case: Case) -> Any:
    with torch.no_grad():
        inputs = copy.deepcopy(case.inputs)
        return counting(inputs, case.model(**inputs))


def _subclass(case: Case) -> None:
    ids = case.inputs.pop("input_ids")
    case.inputs["inputs_embeds"] = case.base.get_input_embeddings()(ids.flip(1)).detach().as_subclass(Tagged)


def _double_embeddings(case: Case) -> None:
    ids = case.inputs.pop("input_ids")
    case.inputs["inputs_embeds"] = case.base.get_input_embeddings()(ids).detach()
    case.model.double()
    case.inputs["inputs_embeds"] = case.inputs["inputs_embeds"].double()


HAZARDS = [
    Hazard(
        "gradients wanted",
        "Gradient mode after calls without it.",
        lambda c: c.kept.update(grad=True),
        prompt,
        _with_history,
        ("grad mode", "True", "False"),
    ),
    Hazard(
        "no gradients wanted",
        "`no_grad` after calls with gradients.",
        lambda c: c.kept.update(grad=False),
        lambda c: (prompt(c), c.kept.update(grad=True)),
        _leaves_no_history,
        ("grad mode", "True", "False"),
    ),
    Hazard(
        "inference mode",
        "`inference_mode` after `no_grad`.",
        lambda c: c.kept.update(inference=True),
        chunk,
        _in_inference_mode,
        ("inference mode", "True", "False"),
    ),
    Hazard(
        "autocast to bfloat16",
        "Matrix products in bfloat16.",
        _inside(lambda: torch.autocast("cpu", torch.bfloat16)),
        chunk,
        _in_context,
        ("autocast", "bfloat16"),
    ),
    Hazard(
        "autocast in training",
        "The same for gradients.",
        _inside(lambda: torch.autocast("cpu", torch.bfloat16)),
        training,
        _gradients_in_context,
        ("autocast", "bfloat16"),
        rounding=2e-2,
    ),
    Hazard(
        "training mode",
        "`model.train()` with dropout in attention.",
        lambda c: c.model.train(),
        lambda c: (_dropout(c), c.model.eval()),
        _draws,
        ("training",),
    ),
    Hazard(
        "one module in training",
        "A single layer is put into training mode.",
        lambda c: c.layer.train(),
        lambda c: (_dropout(c), c.model.eval()),
        _draws,
        ("training",),
    ),
    Hazard(
        "rate of dropout",
        "Dropout is turned off by its number.",
        lambda c: [setattr(layer.self_attn, "attention_dropout", 0.0) for layer in c.decoder.layers],
        _dropout,
        _draws,
        ("attention_dropout", "0.0", "0.5"),
    ),
    Hazard(
        "default dtype",
        "`set_default_dtype(torch.float64)`.",
        lambda c: torch.set_default_dtype(torch.float64),
        chunk,
        forward,
        ("default dtype", "float64", "float32"),
        harmless="the model names its dtypes",
    ),
    Hazard(
        "deterministic algorithms",
        "`use_deterministic_algorithms(True)`.",
        lambda c: torch.use_deterministic_algorithms(True),
        chunk,
        forward,
        ("deterministic algorithms",),
        harmless="the CPU's are",
    ),
    Hazard(
        "attention kernel chosen",
        "Inside `sdpa_kernel(SDPBackend.MATH)`.",
        _inside(lambda: sdpa_kernel(SDPBackend.MATH)),
        chunk,
        _in_context,
        harmless="kernels agree",
    ),
    Hazard("function mode", "A `TorchFunctionMode` that changes results.", _inside(DoublingSilu), chunk, _in_context),
    Hazard("dispatch mode", "A `TorchDispatchMode` that changes results.", _inside(DoublingMM), chunk, _in_context),
    Hazard(
        "saved tensors changed",
        "`saved_tensors_hooks` that scale what backward reads.",
        _inside(
            lambda: torch.autograd.graph.saved_tensors_hooks(
                lambda t: t, lambda t: t * 0.5 if t.is_floating_point() else t
            )
        ),
        training,
        _gradients_in_context,
    ),
    Hazard(
        "forward-mode derivative",
        "`torch.func.jvp` through the model.",
        lambda c: c.kept.update(jvp=True),
        prompt,
        _jvp,
    ),
    Hazard(
        "outer `torch.compile`",
        "The whole model is compiled on top.",
        _outer,
        prompt,
        _outer_call,
        harmless="the same numbers",
        only=("llama",),
    ),
    Hazard("tensor subclass", "Embeddings of a subclass of `Tensor`.", _subclass, chunk, forward),
    Hazard(
        "model and embeddings in float64",
        "Both change together, in a call.",
        _double_embeddings,
        prompt,
        forward,
        ("float64", "float32"),
    ),
]
