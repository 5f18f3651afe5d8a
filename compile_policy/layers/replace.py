"""Replacement of layers in a model that exists, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from compile_policy.layers.identity import qualified
from compile_policy.layers.records import LayerError

Replacement = type | Callable[[nn.Module], nn.Module]
FilterFn = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Replaced:
    """One replaced instance: every place where the model refers to it."""

    old: nn.Module
    new: nn.Module
    places: tuple[tuple[nn.Module, str, str], ...]  # (parent, attribute, dotted name)


class Replacements:
    """What `replace_layers_` did. ``restore_()`` undoes it; as a context manager it does so at the end of the block."""

    def __init__(self, replaced: tuple[Replaced, ...]) -> None:
        self.replaced = replaced

    @property
    def counts(self) -> dict[str, int]:
        """Class of the replaced instances -> how many."""
        out: dict[str, int] = {}
        for one in self.replaced:
            name = qualified(type(one.old))
            out[name] = out.get(name, 0) + 1
        return out

    def restore_(self) -> None:
        """Put the old instances back. A second call does nothing.

        Raises:
            LayerError: somebody else has replaced one of them since; nothing is changed then.
        """
        for one in self.replaced:
            for parent, attribute, name in one.places:
                if getattr(parent, attribute, None) is not one.new:
                    raise LayerError(f"{name} has been replaced again since.", remedy="Undo that replacement first.")
        for one in self.replaced:
            _carry_state(one.new, one.old)
            for parent, attribute, _ in one.places:
                setattr(parent, attribute, one.old)
        self.replaced = ()

    def __enter__(self) -> Replacements:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore_()


def replace_layers_(
    model: nn.Module,
    replacements: Mapping[type, Replacement],
    filter_fn: FilterFn | None = None,
) -> Replacements:
    """Replace instances of exactly the given classes, in place. All of them, or none when one cannot be built.

    The verb, mapping and filter are after torchao's ``quantize_``.

    Args:
        model: the model; it is not replaced itself.
        replacements: class -> what takes the place of its instances: a class with ``from_layer(layer)``; a subclass
            without an ``__init__`` of its own, which takes over everything the instance holds; or a function of the
            instance.
        filter_fn: ``filter_fn(layer, dotted_name)`` says whether to replace this one.

    Returns:
        What was replaced, with ``restore_()``.

    Raises:
        LayerError: nothing to replace, a class that can't be built from an instance, or no module as result.
    """
    found: dict[int, tuple[nn.Module, list[tuple[nn.Module, str, str]]]] = {}
    for parent_name, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            name = f"{parent_name}.{attribute}".lstrip(".")
            if child is not None and type(child) in replacements and (filter_fn is None or filter_fn(child, name)):
                found.setdefault(id(child), (child, []))[1].append((parent, attribute, name))
    if not found:
        names = ", ".join(qualified(c) for c in replacements)
        raise LayerError(f"{type(model).__name__} has no instance of {names} that the filter lets pass.")
    # build everything before the model is touched
    replaced = tuple(
        Replaced(old, _built(old, replacements[type(old)], places[0][2]), tuple(places))
        for old, places in found.values()
    )
    for one in replaced:
        for parent, attribute, _ in one.places:
            setattr(parent, attribute, one.new)
    return Replacements(replaced)


def _built(old: nn.Module, replacement: Replacement, name: str) -> nn.Module:
    new = _from_class(old, replacement) if isinstance(replacement, type) else replacement(old)
    if not isinstance(new, nn.Module):
        raise LayerError(f"The replacement of {name} is a {type(new).__name__}, no module.")
    if new is old:
        raise LayerError(f"The replacement of {name} is the old layer itself.", remedy="Build a new one.")
    new.train(old.training)
    return new


def _from_class(old: nn.Module, cls: type) -> Any:
    from_layer = getattr(cls, "from_layer", None)
    if from_layer is not None:
        return from_layer(old)
    own = next(c for c in cls.__mro__ if "__init__" in vars(c))
    if not issubclass(cls, type(old)) or own not in type(old).__mro__:
        raise LayerError(
            f"{qualified(cls)} cannot be built from an instance of {qualified(type(old))}.",
            remedy="Give it a classmethod from_layer(layer), or derive it from that class without its own __init__.",
        )
    new = cls.__new__(cls)
    # The containers of parameters, buffers, children and hooks are shared, not copied: whatever happens to one of the
    # two (a move, a hook, training) holds for the other, and restoring loses nothing.
    new.__dict__.update(old.__dict__)
    new.__dict__.pop("_compiled_call_impl", None)
    return new


def _carry_state(new: nn.Module, old: nn.Module) -> None:
    """What happened to the replacement since also happened to the old layer."""
    old.train(new.training)
    if new._parameters is old._parameters:
        return
    own = old.state_dict(keep_vars=True)
    # a split layer gathers; all ranks restore together
    gather: Any = getattr(new, "whole_state_dict", None)
    state = new.state_dict(keep_vars=True) if gather is None or not _is_split(new) else gather()
    moved = [k for k, v in state.items() if k in own and own[k] is not v]
    if not moved:
        return
    if state.keys() != own.keys() or any(state[k].shape != own[k].shape for k in own):
        raise LayerError(
            f"The state of {qualified(type(new))} does not fit back into {qualified(type(old))}.",
            remedy="Save and load the model instead.",
        )
    for key in moved:
        own[key].data = state[key].detach()  # the tensors stay themselves, so what was tied to them still is


def _is_split(layer: Any) -> bool:
    return bool(getattr(getattr(layer, "group", None), "size", 1) > 1)
