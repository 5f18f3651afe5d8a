"""Layers that can be replaced as a whole, where they are built.

The idea and the names are vLLM's (``PluggableLayer``, ``register``, ``register_oot``); docs/layers.md lists what
differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import nn

from compile_policy.layers import registry
from compile_policy.layers.identity import origin_of, qualified
from compile_policy.layers.records import Claim, Kind, LayerError

C = TypeVar("C", bound=type)


class LayerMeta(type):
    """Builds the override of a class where the class is called.

    At the call, not in ``__new__``: a copy or an unpickled instance keeps the class that it had, and a replacement that
    is no subclass is initialised like any other.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "layer_kind" in vars(cls):
            raise TypeError(f"{cls.__name__} is a base to derive layers from; it cannot be built itself.")
        made = registry.resolve(cls)
        layer = type.__call__(made, *args, **kwargs)
        if not issubclass(made, cls):
            _prove_state_dict(cls, layer, args, kwargs)
        registry.count_built(cls, made)
        return layer


def _prove_state_dict(cls: type, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with torch.device("meta"):
        reference = type.__call__(cls, *args, **kwargs)
    compare_state_dicts(reference, layer)


def compare_state_dicts(reference: nn.Module, layer: nn.Module, *, dtypes: bool = True) -> None:
    """Refuse ``layer`` unless its state dict has the names, shapes and (``dtypes``) dtypes of the reference's.

    Raises:
        LayerError: the first differences, by name.
    """
    wanted, found = _signature(reference, dtypes), _signature(layer, dtypes)
    differing = [
        f"{key}: {wanted.get(key, 'absent')} became {found.get(key, 'absent')}"
        for key in sorted(wanted.keys() | found.keys())
        if wanted.get(key) != found.get(key)
    ]
    if differing:
        shown = "; ".join(differing[:5])
        raise LayerError(
            f"{qualified(type(layer))} was declared state_dict_compatible with {qualified(type(reference))} "
            f"and is not: {shown}.",
            remedy="Give its parameters and buffers the same names, shapes and dtypes.",
        )


def _signature(module: nn.Module, dtypes: bool) -> dict[str, str]:
    tensors = {k: v for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)}
    return {k: f"{tuple(v.shape)} {v.dtype if dtypes else ''}".rstrip() for k, v in tensors.items()}


class Layer(nn.Module, metaclass=LayerMeta):
    """What `PluggableLayer` and `CustomOp` share: a name, and overrides."""

    layer_kind: ClassVar[Kind]

    @classmethod
    def register(cls, name: str) -> Callable[[C], C]:
        """Class decorator: name a layer, for instance in ``custom_ops`` and in ``compile-policy layers ls``.

        Raises:
            LayerError: the name is taken; or nothing would call the forwards that the class defines.
        """

        def decorate(layer_cls: C) -> C:
            if not issubclass(layer_cls, cls):
                raise LayerError(
                    f"{qualified(layer_cls)} is no {cls.__name__}.", remedy=f"Derive it from {cls.__name__}."
                )
            registry.add_layer(name, layer_cls, cls.layer_kind)
            return layer_cls

        return decorate

    @overload
    @classmethod
    def register_oot(cls, layer_cls: C, /) -> C: ...

    @overload
    @classmethod
    def register_oot(
        cls, /, *, name: str | None = None, priority: int = 0, state_dict_compatible: bool = False
    ) -> Callable[[C], C]: ...

    @classmethod
    def register_oot(
        cls,
        layer_cls: Any = None,
        /,
        *,
        name: str | None = None,
        priority: int = 0,
        state_dict_compatible: bool = False,
    ) -> Any:
        """Class decorator: build the decorated class wherever a layer is asked for.

        ``@InTree.register_oot`` overrides ``InTree``. ``@PluggableLayer.register_oot(name=...)`` names the layer, which
        need not exist yet: by its registered name, its class name or ``module:Class``.

        Args:
            name: the layer, when ``cls`` is not the layer itself.
            priority: of several overrides the highest is built; equal ones are refused.
            state_dict_compatible: allow a class that is no subclass; its state dict is compared whenever one is built.

        Raises:
            LayerError: no layer is named, the class is no subclass, or another override is already there.
        """
        is_base = "layer_kind" in vars(cls)
        if is_base and name is None:
            raise LayerError(
                f"{cls.__name__}.register_oot names no layer to override.",
                remedy='Decorate with the layer, as in @RMSNorm.register_oot, or pass name="...".',
            )
        if not is_base and name is not None and name not in (cls.__name__, qualified(cls), registry.name_of(cls)):
            raise LayerError(f"{cls.__name__}.register_oot was given the name {name!r} of something else.")

        def decorate(override: Any) -> Any:
            if not isinstance(override, type):
                raise TypeError("register_oot decorates classes.")
            target: type | str = name if is_base and name is not None else cls
            claim = Claim(target, override, "layer", origin_of(override), priority, state_dict_compatible)
            registry.add_claims([claim])
            return override

        return decorate if layer_cls is None else decorate(layer_cls)


class PluggableLayer(Layer):
    """Base of layers that compose modules, own parameters, and can be replaced as a whole.

    There is no forward per platform here: a class that brings ``forward_cuda``, ``forward_oot`` or their kin and no
    ``forward`` is refused where it is registered, as nothing would ever call them (see `CustomOp`).
    """

    layer_kind = "pluggable"


def override(target: type | str, *, priority: int = 0, state_dict_compatible: bool = False) -> Callable[[C], C]:
    """Class decorator: build the decorated class where a model would build ``target``, a class of the modelling
    library.

    Holds for models that are built inside a backend's scope (see docs/layers.md), so nothing is changed for good.

    Args:
        target: the class, or ``module:Class`` where it is not to be imported yet.
        priority: of several overrides the highest is built; equal ones are refused.
        state_dict_compatible: allow a class that is no subclass; the model's state dict is compared after building.

    Raises:
        LayerError: the target is a bare name. That the class cannot take its place is found when a scope is entered.
    """
    if isinstance(target, str) and ":" not in target:
        raise LayerError(
            f"override was given {target!r}, a name that several modules may use.", remedy="Write module:Class."
        )

    def decorate(cls: C) -> C:
        registry.add_claims([Claim(target, cls, "model", origin_of(cls), priority, state_dict_compatible)])
        return cls

    return decorate
