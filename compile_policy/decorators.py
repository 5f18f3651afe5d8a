"""`support_torch_compile`: say of a class that its instances are compiled, and how.

The decorator wraps ``__init__`` and nothing else: when an instance is built, a `Region` is put in front of that
instance (see ``region.py`` for what happens in a call). No base class, no ``__call__`` and no ``forward`` is touched.

    @support_torch_compile
    class Decoder(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None): ...

Inheritance: a subclass follows its nearest decorated base unless it is decorated itself or carries
`ignore_torch_compile`. Decorating one class twice with different policies is an error.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch

from compile_policy.config import CompilationConfig
from compile_policy.configured import region_options
from compile_policy.errors import DecorationError
from compile_policy.positional import PositionalCheck
from compile_policy.region import Binder, Region, SignatureBinder, region_of
from compile_policy.shapes import ArgDims, DimSpec, infer_dynamic_arg_dims, normalise

#: Why a component is compiled whose class the user decorated.
DECORATED = "its class is decorated with support_torch_compile"
C = TypeVar("C", bound=type[torch.nn.Module])
_config: ContextVar[CompilationConfig | None] = ContextVar("compile_policy_config", default=None)


@dataclass(frozen=True)
class ClassPolicy:
    """What was said about a class.

    Attributes:
        dynamic_arg_dims: per argument the dims that vary; inferred from annotations when ``None``.
        mark_unbacked_dims: per argument the dims that are traced without any assumption on their size.
        enable_if: compile an instance only when this says so of the configuration.
        is_encoder: compile only with ``compile_mm_encoder``.
        config: configuration of the instances; the one in force where they are built when ``None``.
        role: role of the instances in reports.
        binder: makes calls canonical; by signature and dims when ``None``.
    """

    dynamic_arg_dims: Mapping[str, DimSpec] | None = None
    mark_unbacked_dims: Mapping[str, DimSpec] | None = None
    enable_if: Callable[[CompilationConfig], bool] | None = None
    is_encoder: bool = False
    config: CompilationConfig | None = None
    role: str = "component"
    binder: Callable[[torch.nn.Module], Binder] | None = None


# None: the class was decorated with ignore_torch_compile.
# Policies of a plan, in force while its model is built (`decorated`).
_planned: weakref.WeakSet[type] = weakref.WeakSet()
_policies: weakref.WeakKeyDictionary[type, ClassPolicy | None] = weakref.WeakKeyDictionary()


@overload
def support_torch_compile(cls: C, /) -> C: ...
@overload
def support_torch_compile(
    *,
    dynamic_arg_dims: Mapping[str, DimSpec] | None = None,
    mark_unbacked_dims: Mapping[str, DimSpec] | None = None,
    enable_if: Callable[[CompilationConfig], bool] | None = None,
    is_encoder: bool = False,
    config: CompilationConfig | None = None,
) -> Callable[[C], C]: ...
def support_torch_compile(cls: C | None = None, /, **policy: Any) -> C | Callable[[C], C]:
    """Compile the instances of a class, with or without arguments.

    Args:
        dynamic_arg_dims: argument -> dim, dims, or ``{dim: shape id}``; negative dims count from the end, dims with
            one shape id are equal in every call. Without it, dim 0 of every argument annotated as a tensor.
        mark_unbacked_dims: dims that no assumption may be made about, not even that they are at least 2.
        enable_if: called with the configuration when an instance is built; ``False`` leaves the instance alone.
        is_encoder: the class is a vision or audio encoder, compiled only when ``compile_mm_encoder`` is set.
        config: configuration for all instances; else the one in force (`use_config`) or the defaults.

    Raises:
        DecorationError: not a module class, no dynamic dims, an argument that ``forward`` doesn't have, or another
            policy on the same class.
    """
    if cls is None:
        return lambda decorated: _decorate(decorated, ClassPolicy(**policy))
    return _decorate(cls, ClassPolicy(**policy))


def ignore_torch_compile(cls: C) -> C:
    """Leave the instances of ``cls`` (and of its subclasses) alone although a base class is decorated."""
    _policies[cls] = None
    return cls


@contextmanager
def use_config(config: CompilationConfig) -> Iterator[None]:
    """Instances built inside the block, in this context, follow ``config``."""
    token = _config.set(config)
    try:
        yield
    finally:
        _config.reset(token)


@contextmanager
def decorated(policies: Mapping[type[torch.nn.Module], ClassPolicy]) -> Iterator[None]:
    """Decorate classes inside the block only; they are as they were afterwards, whatever happens inside.

    A class that carries a policy of its own already keeps it.
    """
    undo: list[tuple[type[torch.nn.Module], Any]] = []
    try:
        for cls, policy in policies.items():
            if cls in _policies:
                continue
            before = cls.__dict__.get("__init__")
            _install(cls, policy)
            _planned.add(cls)
            undo.append((cls, before))
        yield
    finally:
        for cls, init in undo:
            _policies.pop(cls, None)
            _planned.discard(cls)
            if init is None:
                del cls.__init__
            else:
                cls.__init__ = init  # type: ignore[method-assign]


def policy_of(cls: type) -> ClassPolicy | None:
    """The policy that instances of ``cls`` follow: of the nearest decorated or ignored class in its MRO."""
    source = _source(cls)
    return None if source is None else _policies[source]


def _source(cls: type) -> type | None:
    """The class whose policy instances of ``cls`` follow."""
    return next((base for base in cls.__mro__ if base in _policies), None)


def _decorate(cls: C, policy: ClassPolicy) -> C:
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise DecorationError(
            f"support_torch_compile was applied to {cls!r}, which is no nn.Module class.",
            remedy="Decorate the class of a module; for an instance use compile_policy.apply(model).",
        )
    known = _policies.get(cls)
    if known is not None:
        if known == policy:
            return cls
        raise DecorationError(
            f"{cls.__qualname__} is decorated with another policy already.", remedy="Keep one of the two decorators."
        )
    if policy.binder is None:
        dims_of(cls, policy)  # mistakes are told where the class is written, not at the first call
    _install(cls, policy)
    return cls


def dims_of(cls: type, policy: ClassPolicy) -> ArgDims:
    """Dynamic dims of ``cls`` under ``policy``; dims without assumptions carry the mark of `shapes.UNBACKED`."""
    given = policy.dynamic_arg_dims
    if given is not None and not given:
        raise DecorationError(
            f"dynamic_arg_dims of {cls.__qualname__} is empty.",
            remedy="Name a dim, or leave it out to have it inferred.",
        )
    dims = infer_dynamic_arg_dims(cls) if given is None else normalise(cls, given)
    for name, unbacked in normalise(cls, policy.mark_unbacked_dims or {}).items():
        for dim, shape_id in unbacked.items():
            at = dims.setdefault(name, {})
            at[dim] = f"?{shape_id or at.get(dim) or f'{name}.{dim}'}"
    return dims


def _install(cls: type[torch.nn.Module], policy: ClassPolicy) -> None:
    original = cls.__init__
    checked = PositionalCheck(cls, original)

    @functools.wraps(original)
    def __init__(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        checked(self, args)
        original(self, *args, **kwargs)
        _attach(self)

    cls.__init__ = __init__  # type: ignore[method-assign]
    _policies[cls] = policy


def _attach(module: torch.nn.Module) -> None:
    """Put a region in front of a new instance, unless its class, the configuration or ``enable_if`` says no."""
    policy = policy_of(type(module))
    if policy is None or region_of(module) is not None:
        return
    config = policy.config or _config.get() or CompilationConfig()
    wanted = config.enabled and config.mode > 0 and (config.compile_mm_encoder or not policy.is_encoder)
    if not wanted or (policy.enable_if is not None and not policy.enable_if(config)):
        return
    if policy.binder is not None:
        binder = policy.binder(module)
    else:
        override = config.dynamic_arg_dims.get(type(module).__name__)
        dims = dims_of(type(module), policy) if override is None else normalise(type(module), override)
        inferred_for = None
        if override is None and policy.dynamic_arg_dims is None:
            inferred_for = type(module)
        binder = SignatureBinder(dims, inferred_for)
    options, own = region_options(config), _source(type(module)) not in _planned
    Region(module, role=policy.role, binder=binder, options=options, reason=DECORATED, decorated=own).attach()
