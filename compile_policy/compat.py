"""Private symbols of torch, each in one place and each with a test.

Beside it and its siblings ``compat_*`` nothing in ``compile_policy`` reaches below torch's documented interface.
"""

from __future__ import annotations

import os
import re
import shutil
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor
import torch._inductor.cpu_vec_isa
import torch.utils._pytree as pytree
from torch._C._dynamo.guards import TensorGuards
from torch._C._dynamo.guards import dict_version as _dict_version
from torch._guards import TracingContext
from torch._inductor.package.package import package_aoti
from torch.autograd import forward_ad, profiler
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as module_hooks
from torch.utils._device import DeviceContext
from torch.utils.hooks import RemovableHandle

from compile_policy.compat_precision import matmul_precision
from compile_policy.shortage import temporary_directory

_GLOBAL_HOOKS: tuple[Mapping[int, Any], ...] = (
    module_hooks._global_forward_pre_hooks,
    module_hooks._global_forward_hooks,
    module_hooks._global_backward_pre_hooks,
    module_hooks._global_backward_hooks,
)

# Bound once: they are asked at every call.
dict_version: Callable[[dict[Any, Any]], int] = _dict_version  # raised by a write, see `glance`
_is_grad_enabled, _is_inference_mode = torch.is_grad_enabled, torch.is_inference_mode_enabled
_any_autocast, _default_dtype = torch._C._is_any_autocast_enabled, torch.get_default_dtype
_deterministic = torch._C._get_deterministic_algorithms
_function_modes, _dispatch_modes = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack
_functorch_level, _jit_tracing = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
_global_pre, _global_after, _global_backward_pre, _global_backward = _GLOBAL_HOOKS

_UNPACKED = re.compile(r" (/[^\n]*/aotinductor_[^/\n]+)/[^\n]*\.so$", re.MULTILINE)  # not those "(deleted)" already
_SIZE_OF_LEAF = re.compile(r"L\['leaves'\]\[(\d+)\]\.size\(\)\[(\d+)\]")


def graph_argument(node: torch.fx.Node) -> tuple[Any, Any]:
    """(example, source) of a placeholder: Dynamo keeps the real tensor that it lifted, and where it stood."""
    argument = node.meta["grapharg"]
    return argument.example, argument.source


def source_name(source: Any) -> str:
    """The name is a method in torch 2.11 and a property since."""
    name = source.name
    return str(name() if callable(name) else name)


def leaf_dim_of_source(source: Any) -> tuple[int, int] | None:
    """(leaf, dim) of a size of a leaf, ``None`` for another source; the traced function takes ``*leaves``."""
    match = _SIZE_OF_LEAF.fullmatch(source_name(source))
    return None if match is None else (int(match[1]), int(match[2]))


def tracing_shape_env() -> Any:
    """The ``ShapeEnv`` of the capture that is running."""
    context = TracingContext.get()
    assert context.fake_mode is not None
    return context.fake_mode.shape_env


def traced_code() -> list[types.CodeType]:
    """Code of every function that the running capture has gone through."""
    return list(TracingContext.get().traced_code)


def symbol_sources(env: Any) -> dict[Any, list[Any]]:
    """symbol -> where its value comes from."""
    return dict(env.var_to_sources)


def guard_origin(guard: Any) -> str:
    """Where in torch or in the model a size relation was assumed."""
    return str(getattr(guard, "sloc", ""))


def compiled_call_impl(module: torch.nn.Module) -> Any:
    """What ``module(...)`` calls instead of ``_call_impl``; the hook that ``nn.Module.compile`` sets too."""
    return module.__dict__.get("_compiled_call_impl")


def set_compiled_call_impl(module: torch.nn.Module, call: Any) -> None:
    """Route calls of this instance through ``call``; ``None`` restores the module's own."""
    if call is None:
        module.__dict__.pop("_compiled_call_impl", None)
    else:
        module.__dict__["_compiled_call_impl"] = call


def plain_call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's own call with its hooks, past whatever is attached to the instance."""
    return module._call_impl(*args, **kwargs)


def autocast_state() -> tuple[Any, ...]:
    """Autocast as the calling thread sees it, for every device type that is in use."""
    return tuple(
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    )


def forget_failed_probes() -> None:
    """Have Inductor ask the compiler again what the processor can do: it keeps "nothing" when there was no compiler."""
    module: Any = torch._inductor.cpu_vec_isa
    functions = [vars(module).get("valid_vec_isa_list")]
    kinds = [cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, module.VecISA)]
    functions += [value for cls in kinds for name, value in vars(cls).items() if "__bool__" in name]
    for function in functions:
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def renew_after_fork(lock: Any) -> None:
    """Let a forked child start with ``lock`` free, whichever thread of its parent held it."""
    os.register_at_fork(after_in_child=lock._at_fork_reinit)


def original_error(error: BaseException) -> BaseException:
    """What went wrong, without the wrappers that Dynamo puts round a backend's exception."""
    while isinstance(inner := getattr(error, "inner_exception", None), BaseException):
        error = inner
    return error


def write_package(gm: torch.fx.GraphModule, inputs: tuple[Any, ...], path: str, options: dict[str, Any]) -> None:
    """Compile a graph with AOTInductor and write the package.

    The documented way goes through ``torch.export``, which would trace the graph a second time.
    """
    files: Any = torch._inductor.aot_compile(gm, inputs, options=options)
    package_aoti(path, files)


def load_package(path: str) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """A package as a function of a list of tensors, which it empties; without the pytree layer of the public loader."""
    before, there = _unpacked(), _leftovers()
    try:
        loader: Any = torch._C._aoti.AOTIModelPackageLoader(path, "model", False, 1, -1)
    except BaseException:  # it leaves what it has unpacked, whole or in part
        for folder in _leftovers() - there:
            if not _used_by_another(folder):
                shutil.rmtree(folder, ignore_errors=True)
        raise
    # Several MB each, and torch removes them only when a loader is deleted, which the end of a process is not. What is
    # mapped stays mapped. Kernels of a GPU are read later: they stay.
    for folder in _unpacked() - before:
        if not any(Path(folder).rglob("*.cubin")):
            shutil.rmtree(folder, ignore_errors=True)
    run: Callable[[list[torch.Tensor]], list[torch.Tensor]] = loader.boxed_run
    return run


def _unpacked() -> set[str]:
    """Folders in which packages lie that this process has loaded and that are still there."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:  # not Linux
        return set()
    return {found[1] for found in _UNPACKED.finditer(mapped)}


def _leftovers() -> set[str]:
    """Folders of this user in the temporary directory into which packages are unpacked."""
    try:
        found = [
            path for path in Path(temporary_directory()).glob("aotinductor_*") if path.stat().st_uid == os.getuid()
        ]
    except OSError:
        return set()
    return set(map(str, found))


def _used_by_another(folder: str) -> bool:
    """Whether another process of this user has a file below the folder open or mapped."""
    inside = f"{folder}/"
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        try:
            if inside in (process / "maps").read_text():
                return True
            if any(os.readlink(link).startswith(inside) for link in (process / "fd").iterdir()):
                return True
        except OSError:  # gone, or another user's
            continue
    return False


def modes() -> tuple[tuple[str, Any], ...]:
    """What a graph takes for granted about the process and the calling thread, by name."""
    return (
        ("grad mode", torch.is_grad_enabled()),
        ("inference mode", torch.is_inference_mode_enabled()),
        ("autocast", autocast_state()),
        ("default dtype", torch.get_default_dtype()),
        ("default device", _default_devices()),
        ("deterministic algorithms", torch._C._get_deterministic_algorithms()),
        ("float32 matmul precision", matmul_precision()),
    )


def ambient(module: torch.nn.Module) -> tuple[Any, ...]:
    """All that `modes` and `eager_only` look at, and the training flag, in the form that is cheapest to compare.

    Equal tuples mean equal modes, and that what forbids compiled calls does so for both or for neither.
    """
    own = module.__dict__
    return (
        _is_grad_enabled(),
        _is_inference_mode(),
        _any_autocast() and autocast_state(),
        _default_dtype(),
        _deterministic(),
        matmul_precision(),
        _function_modes() and _function_mode_names(),
        _dispatch_modes(),
        _functorch_level(),
        _jit_tracing(),
        forward_ad._current_level,
        bool(_global_pre or _global_after or _global_backward_pre or _global_backward),
        bool(own["_backward_hooks"] or own["_backward_pre_hooks"] or own["_forward_hooks_always_called"]),
        own["training"],
    )


def _function_mode_names() -> tuple[Any, ...]:
    modes = map(_function_mode, range(_function_modes()))
    return tuple((type(mode), str(getattr(mode, "device", ""))) for mode in modes)


def _default_devices() -> tuple[Any, ...]:
    """Devices of `torch.device` contexts, the outermost first; other function modes are for `eager_only`."""
    count = torch._C._len_torch_function_stack()
    return tuple(str(_function_mode(i).device) for i in range(count)) if count else ()  # usual: none


def _function_mode(index: int) -> Any:
    return torch._C._get_function_stack_at(index)


def profiling() -> bool:
    """Whether a profiler of torch is on, in any thread."""
    return profiler._is_profiler_enabled


def eager_only(module: torch.nn.Module) -> str:
    """What about the process or the module forbids any compiled call just now, in words; empty when nothing does."""
    own = module.__dict__
    if own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "the component has a backward hook"
    if own["_forward_hooks_always_called"]:
        return "the component has a forward hook that is always called"
    if any(_GLOBAL_HOOKS):
        return "a hook for all modules is registered"
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is active"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "the call is inside a torch.func transformation"
    if forward_ad._current_level >= 0:
        return "forward-mode automatic differentiation is active"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing"
    for i in range(torch._C._len_torch_function_stack()):
        if not isinstance(_function_mode(i), DeviceContext):
            return f"the TorchFunctionMode {type(_function_mode(i)).__name__} is active"
    return ""


def saves_tensors_for_others() -> bool:
    """Whether somebody packs what autograd saves, as activation checkpointing does, in a call that wants gradients."""
    return torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


#: Words of `eager_only` -> what lets the next call be compiled.
_WITHOUT = (
    ("backward hook", "Remove it, or register it on the tensors that go in or come out."),
    ("always called", "Register it without always_call=True."),
    ("hook for all modules", "Remove it, or register it on the modules that it is for."),
    ("TorchDispatchMode", "Leave the mode to have the call compiled."),
    ("TorchFunctionMode", "Leave the mode to have the call compiled."),
    ("torch.func", "Call it outside of the transformation to have it compiled."),
    ("forward-mode", "Leave torch.autograd.forward_ad to have the call compiled."),
    ("torch.jit", "Call the model without tracing it to have it compiled."),
)


def remedy_of(obstacle: str) -> str:
    """What lets the next call be compiled where `eager_only` says that this one cannot; empty for any other text."""
    return next((remedy for words, remedy in _WITHOUT if words in obstacle), "")


def hooks_made() -> int:
    """Grows with every hook that is registered anywhere, on a module or on a tensor."""
    return RemovableHandle.next_id


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether forward hooks are registered on the module itself."""
    own = module.__dict__
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"])


def call_with_hooks(module: torch.nn.Module, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``call(args, kwargs)`` between the module's forward pre-hooks and forward hooks, as ``_call_impl`` has it."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            both = hook(module, args, kwargs)
            if both is not None:
                args, kwargs = both
        else:
            changed = hook(module, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
    result = call(args, kwargs)
    for key, after in list(module._forward_hooks.items()):
        with_kwargs = key in module._forward_hooks_with_kwargs
        other = after(module, args, kwargs, result) if with_kwargs else after(module, args, result)
        result = result if other is None else other
    return result


def alike(tensors: Sequence[torch.Tensor], varying: Sequence[int | None]) -> Callable[..., bool]:
    """A check that as many arguments are tensors like these, in one call and without looking at their values.

    Compared are class, dtype, device, layout, sizes, strides, ``requires_grad`` and the dispatch keys (a lazy
    conjugate, a tensor of inference mode, a vmapped one), as the calling thread sees them.

    Args:
        varying: per tensor the dim whose size may differ. The strides of the dims before it are free then.
    """
    places = [-1 if dim is None else dim for dim in varying]
    sizes = [[None if i == d else n for i, n in enumerate(t.shape)] for t, d in zip(tensors, places, strict=True)]
    strides = [[None if i < d else n for i, n in enumerate(t.stride())] for t, d in zip(tensors, places, strict=True)]
    make: Any = TensorGuards  # its stub says otherwise
    check: Callable[..., bool] = make(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return check


def mark_static(tensor: torch.Tensor) -> None:
    """Trace the tensor's sizes as constants."""
    torch._dynamo.mark_static(tensor)


def storage_of(tensor: torch.Tensor) -> int:
    """A number that tensors of the same memory share, for fake tensors too."""
    return int(tensor.untyped_storage()._cdata)


#: Operators that write into these arguments while they train, although their schemas do not say so.
_RUNNING = ("running_mean", "running_var")
_UNDECLARED = frozenset(("aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm"))


def mutates(op: Any) -> bool:
    """Whether an operator may write into an argument."""
    if not isinstance(op, torch._ops.OpOverload):
        return False
    return bool(op._schema.is_mutable) or op._schema.name in _UNDECLARED


def written_by(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that a call of an operator writes into."""
    given = dict(kwargs)
    given.update(zip([argument.name for argument in op._schema.arguments], args, strict=False))
    if op._schema.name in _UNDECLARED:
        return [given[n] for n in _RUNNING if given.get(n) is not None] if given.get("training") else []
    written = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    found = pytree.tree_leaves([given.get(name) for name in written])
    return [t for t in found if isinstance(t, torch.Tensor)]


def storage_alive(tensor: torch.Tensor) -> Callable[[], bool]:
    """Asks whether the tensor's memory still exists, so that its number was given to no other."""
    reference = StorageWeakRef(tensor.untyped_storage())
    return lambda: not reference.expired()


def set_version(tensor: torch.Tensor, version: int) -> None:
    """Set the count of writes into a tensor, by which autograd notices them."""
    torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))


def inductor_settings() -> dict[str, Any]:
    """Inductor's configuration without what has no influence on its code, as its own cache takes it."""
    settings = dict(torch._inductor.config.save_config_portable())
    for name in ("aot_inductor.metadata", "cpp.cxx"):  # notes of its last compile, and what the compiler is called here
        settings.pop(name, None)
    return settings


def inductor_passes() -> list[str]:
    """Names of the settings under which somebody installed a pass of their own."""
    config: Any = torch._inductor.config
    names = [f"{when}_custom_{where}_pass" for when in ("joint", "post_grad") for where in ("pre", "post")]
    names += ["pre_grad_custom_pass", "_pre_fusion_custom_pass", "_post_fusion_custom_pass", "custom_partitioner_fn"]
    return [name for name in names if getattr(config, name, None) is not None]


def cpu_capability() -> str:
    """Which of its own kernels torch takes on this processor."""
    return str(torch.backends.cpu.get_cpu_capability())


def default_store() -> Any:
    """The key-value store through which the default process group was set up; every rank reaches it."""
    return torch.distributed.distributed_c10d._get_default_store()
