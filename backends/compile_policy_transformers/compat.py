"""Private or undocumented symbols of Transformers and accelerate, each in one place and each with a test.

When an upgrade breaks one, this is the file to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch._dynamo.utils import counters as dynamo_counters
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import output_capturing as output_capturing_of_transformers

from compile_policy.audit import register_lookup_table
from compile_policy.failure import helpers_of_models, known_cause
from compile_policy.walk import trace_hooks_of

trace_hooks_of(output_capturing_of_transformers.__name__)  # they note what the graph returns
trace_hooks_of("transformers.modeling_utils")  # makes embeddings require gradients, outside the graph
helpers_of_models("transformers.utils")  # decorators around a model's methods
_WITHOUT_HOOKS = (
    "Where all weights are on one device, take the hooks off with "
    "accelerate.hooks.remove_hook_from_module(model, recurse=True), or load the model without dispatching it."
)
known_cause(  # CompileableContextVar.reset: the inner model's ends what the outer one's set() began
    "ContextVar.get",
    "before this line a model inside was called, which ended the collecting of outputs for both; what is asked after "
    "that (ContextVar.get) cannot be traced",
    "Call the model inside in the one around, and hand its result in as an argument, in subclasses of both.",
)
#: Set on a model that has its output-capturing hooks.
_CAPTURING = "_output_capturing_hooks_installed"
#: Among what is collected: which hidden states are wanted. Argument of the collecting decorator.
_SELECTED, _TIED = "_hidden_states_layers", "tie_last_hidden_states"


def dynamo_graphs() -> int:
    """Graphs that Dynamo has captured in this process; its counters are not documented."""
    return int(dynamo_counters["stats"]["unique_graphs"])


def build_from_config(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build ``cls`` in float32 on the current device; the auto classes only offer this for classes in their tables."""
    return cast(PreTrainedModel, cls._from_config(config, dtype=torch.float32))


def model_class_names(task: str) -> dict[str, str]:
    """Model type to class name for ``task`` such as ``CAUSAL_LM``; the tables are importable but not documented."""
    mapping: dict[str, str | tuple[str, ...]] = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    return {name: cls if isinstance(cls, str) else cls[0] for name, cls in mapping.items()}


def offload_hooks(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks that move weights in and out around a call; it stores them as ``_hf_hook``."""
    for child in module.modules():
        hook = child.__dict__.get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "offload", False):
                yield one


def hook_that_stops(error: BaseException, module: nn.Module) -> tuple[str, str] | None:
    """(cause, remedy) where tracing stopped in a hook of accelerate, which Dynamo is forbidden to enter."""
    files = [frame.filename.replace("\\", "/") for frame in getattr(error, "real_stack", None) or ()]
    hooked = [(name, child) for name, child in module.named_modules() if "_hf_hook" in child.__dict__]
    if not hooked or not any(file.endswith("accelerate/hooks.py") for file in files):
        return None
    name, child = hooked[0]
    what = f"the sub-module {name} ({type(child).__name__})" if name else "the component"
    kind = type(child.__dict__["_hf_hook"]).__name__
    others = f", and {len(hooked) - 1} more" if len(hooked) > 1 else ""
    return f"{what} has a hook of accelerate ({kind}{others}), which cannot be part of a graph", _WITHOUT_HOOKS


def quantizer(model: nn.Module) -> Any | None:
    """The quantizer of a model that `from_pretrained` has quantized; an attribute without a documented contract."""
    return getattr(model, "hf_quantizer", None)


def device_map(model: nn.Module) -> dict[str, Any]:
    """Where accelerate has put each part, empty when it hasn't."""
    return cast(dict[str, Any], getattr(model, "hf_device_map", None) or {})


def rope_types(module: nn.Module) -> set[str]:
    """Kinds of rotary embedding below ``module``; a rotary module keeps one name, or one per kind of layer."""
    out: set[str] = set()
    for child in module.modules():
        kind = child.__dict__.get("rope_type")
        out |= set(kind.values()) if isinstance(kind, dict) else {kind} if isinstance(kind, str) else set()
    return out


def install_output_capturing(module: nn.Module) -> list[tuple[nn.Module, set[int]]]:
    """Install Transformers' output-capturing hooks, as its own first call that asks for outputs does.

    Transformers installs a second set where a model inside ``module`` already has its own; every output would be
    recorded twice from then on. Those are left out. Drop that part once ``install_all_output_capturing_hooks`` asks.

    Returns:
        Modules and the hooks that they got.
    """
    if not isinstance(module, PreTrainedModel):
        return []
    before = [(m, set(m._forward_hooks)) for m in module.modules()]
    hooked = {id(m) for inner in module.modules() if _CAPTURING in inner.__dict__ for m in inner.modules()}
    output_capturing_of_transformers.maybe_install_capturing_hooks(module)
    added = [(m, set(m._forward_hooks) - known) for m, known in before]
    _take_off([(m, hooks) for m, hooks in added if id(m) in hooked])
    return [(m, hooks) for m, hooks in added if id(m) not in hooked]


def _take_off(added: list[tuple[nn.Module, set[int]]]) -> None:
    for module, hooks in added:
        for hook in hooks:
            module._forward_hooks.pop(hook, None)


@contextmanager
def output_capturing(module: nn.Module) -> Iterator[None]:
    """Transformers' output-capturing hooks inside the block, and only there.

    Its first call that asks for hidden states installs them for good. A graph has to be traced with them; a model
    that keeps them cannot be pickled, so they do not stay on account of the policy.
    """
    unmarked = [m for m in module.modules() if _CAPTURING not in m.__dict__]
    added = install_output_capturing(module)
    try:
        yield
    finally:
        _take_off(added)
        for m in unmarked:
            m.__dict__.pop(_CAPTURING, None)


#: What decides whether `generate` compiles the model.
_MAY_COMPILE = "_valid_auto_compile_criteria"
#: What returns the compiled parts of a model that generates by diffusion: encoder, forward, and what it was given.
_COMPILES = "_compile_functions"


SET_ON_MODELS = (_MAY_COMPILE, _COMPILES)


class _InPlaceOfMethod:
    """Takes the place of a model's method on the instance; a copy or a pickle of the model has its own again."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.model, self.name)


class _Never(_InPlaceOfMethod):
    def __call__(self, *args: Any, **kwargs: Any) -> bool:
        return False


class _Uncompiled(_InPlaceOfMethod):
    def __call__(self, *parts: Any) -> tuple[Any, ...]:
        own: Any = self.model
        return (own.model.encoder, own.forward, *parts)


def disable_auto_compile(model: nn.Module) -> None:
    """Keep `generate` from compiling the whole model by itself; set on the instance, so no other model is touched.

    ``generation_config.disable_compile`` would do the same until a caller brings a generation config of their own.
    """
    for part in model.modules():  # a model may let a part of it generate
        if hasattr(part, _MAY_COMPILE):
            part.__dict__[_MAY_COMPILE] = _Never(part, _MAY_COMPILE)
    if hasattr(model, _COMPILES):  # block diffusion has a generate of its own, which never asks
        model.__dict__[_COMPILES] = _Uncompiled(model, _COMPILES)


def enable_auto_compile(model: nn.Module) -> None:
    """Undo `disable_auto_compile`."""
    for part in model.modules():
        part.__dict__.pop(_MAY_COMPILE, None)
    model.__dict__.pop(_COMPILES, None)


register_lookup_table(
    "transformers.utils.output_capturing",
    "_CAN_RECORD_REGISTRY",
    "what a class can record is looked up by class; the table grows when other models are built",
)


def collects_outputs() -> bool:
    """Whether a Transformers model around the current call collects what its layers compute."""
    return bool(output_capturing_of_transformers._active_collector.get())


class _Settled(list[Any]):
    """Collected hidden states that no layer adds to."""

    def append(self, item: Any) -> None:
        pass


def quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, traced without collecting."""

    def traced(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        token = output_capturing_of_transformers._active_collector.set(None)
        out = function(*args, **kwargs)
        output_capturing_of_transformers._active_collector.reset(token)
        return out

    return traced


@contextmanager
def uncollected(module: nn.Module) -> Iterator[None]:
    """Have ``module`` traced without collecting: its hooks ask a context variable, which Dynamo cannot follow.

    Only what is traced changes; calls that other threads make meanwhile collect as ever.
    """
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = quietly(module.forward)
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def collects_last_state_only(layers: int) -> bool:
    """Whether the model around the call collects its last hidden state, after ``layers`` layers, and nothing else."""
    collected = output_capturing_of_transformers._active_collector.get() or {}
    return collected.keys() == {"hidden_states", _SELECTED} and collected[_SELECTED] == {layers}


def settle_last_state(layers: int, stand_in: torch.Tensor) -> None:
    """Have the model around the call take its last hidden state from its own result, as it does where the two are tied.

    What the layers compute need not be seen then; ``stand_in`` is put aside for ``last_hidden_state``.
    """
    collected = output_capturing_of_transformers._active_collector.get()
    collected["hidden_states"] = _Settled([*[None] * layers, stand_in])


def ties_last_state(model: nn.Module) -> bool:
    """Whether the last of the model's hidden states is its ``last_hidden_state``; known to the decorator alone."""
    said = getattr(getattr(model, "config", None), _TIED, None)
    function: Any = type(model).forward
    while said is None and function is not None:
        free = function.__code__.co_freevars
        said = function.__closure__[free.index(_TIED)].cell_contents if _TIED in free else None
        function = getattr(function, "__wrapped__", None)
    return bool(said)
