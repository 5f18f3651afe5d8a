"""Towers of which only the layers are compiled.

Some towers read the sizes of their pictures in Python before their layers run, picture by picture: they crop, resize
position tables, or pad. That part is cheap and stays eager; nearly all of the time goes into the stack of layers,
which sees nothing but hidden states, masks and positions. The stack is one graph for every number and size of
pictures, where the whole tower would be one for each size, or none. It is a module inside the tower, or the list that
the tower itself goes through (`chains`).
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from compile_policy_transformers.chains import chain_name
from compile_policy_transformers.known_code import methods_used, tree_of
from compile_policy_transformers.pictures import GRIDS, grid_argument

#: Arguments that say of what size each picture is, where pictures are padded or cut up.
_SIZES = {
    *("image_sizes", "spatial_shapes", "pixel_position_ids", "image_grid_hw", "merge_sizes"),
    *("aspect_ratio_ids", "flattened_patches"),
}
#: First arguments of a layer.
STATES = ("hidden_states", "inputs_embeds")


def stacks_of(tower: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of the stacks of layers to compile in place of the whole tower; empty: the whole tower is.

    A tower is taken apart when it is called with the sizes of its pictures, or when it reads a grid in Python.
    """
    found = list(_stacks(tower))
    if not found:
        return _own_layers(tower)
    takes_sizes = bool(_SIZES & set(inspect.signature(tower.forward).parameters))
    return found if takes_sizes or (grid_argument(tower) and _reads_numbers(tower, [s for _, s in found])) else []


def _own_layers(tower: nn.Module) -> list[tuple[str, nn.Module]]:
    """The list that the tower goes through itself, where it also goes through its pictures one by one."""
    name = chain_name(tower)
    layers = list(getattr(tower, name).children()) if name else []
    if name is None or not layers:
        return []
    methods = (method for cls in _classes_outside(tower, layers) for method in methods_used(cls))
    reads = any(_goes_through_pictures(method) for method in methods)
    return [(name, getattr(tower, name))] if reads and grid_argument(tower) else []


def _goes_through_pictures(method: Callable[..., Any]) -> bool:
    """Whether a method makes a list of numbers of a grid, or loops over its rows."""
    tree = tree_of(method)
    nodes = list(ast.walk(tree)) if tree is not None else []
    loops = [node.iter for node in nodes if isinstance(node, (ast.For, ast.comprehension))]
    lists = [node.value for node in nodes if isinstance(node, ast.Attribute) and node.attr == "tolist"]
    names = (node.id for part in (*loops, *lists) for node in ast.walk(part) if isinstance(node, ast.Name))
    return any("grid" in name or name in GRIDS for name in names)


def is_stack(module: nn.Module) -> bool:
    """Whether ``module`` is a stack of layers over hidden states."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList) and len(child)]
    if any(isinstance(m, nn.Conv2d) and max(m.stride) > 1 for m in module.modules()):
        return False  # it takes the pictures themselves, by whatever name (florence2)
    return _over_states(module) and any(all(_over_states(layer) for layer in layers) for layers in lists)


def _over_states(module: nn.Module) -> bool:
    return next(iter(inspect.signature(module.forward).parameters), "") in STATES


def _stacks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if is_stack(child):
            yield prefix + name, child
        elif not isinstance(child, nn.ModuleList):
            yield from _stacks(child, f"{prefix}{name}.")


def _reads_numbers(tower: nn.Module, stacks: Sequence[nn.Module]) -> bool:
    """Whether a method outside the stacks turns tensors into lists of numbers."""
    return any(_calls_tolist(cls) for cls in _classes_outside(tower, stacks))


def _classes_outside(tower: nn.Module, stacks: Sequence[nn.Module]) -> set[type[nn.Module]]:
    """Classes of modules in ``tower`` that are in none of the stacks."""
    inside = {id(m) for stack in stacks for m in stack.modules()}
    return {type(m) for m in tower.modules() if id(m) not in inside and not type(m).__module__.startswith("torch.")}


def _calls_tolist(cls: type) -> bool:
    """Whether a method does; attention that has a packed form as well does not need to."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return False
    return ".tolist()" in source and "is_flash_attention_requested" not in source
