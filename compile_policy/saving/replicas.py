"""Components that are the same on every rank: one rank compiles them, the others load.

A component that communicates while it is traced has to be traced on all ranks at once, and one whose code asks for the
rank may have another graph on each. Such are told by the rank in their key, and nobody waits for anybody.
"""

from __future__ import annotations

import functools
import re

import torch
import torch.distributed as dist

from compile_policy.saving.sources import file_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_DISTRIBUTED = re.compile(rb"torch\.distributed|from torch import distributed|_c10d_functional")
#: Names in traced code by which it may tell ranks apart, or communicate.
OF_RANKS = frozenset(
    {"distributed", "get_rank", "get_local_rank", "get_node_local_rank", "get_group_rank", "get_coordinate"}
    | {"_c10d_functional", "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"}
    | {"all_to_all", "all_to_all_single"}
)


def rank_factor(module: torch.nn.Module) -> str:
    """The rank and the number of ranks, or that it is the same on any of them."""
    size = _size()
    if size == 1:
        return "0 of 1"
    return f"{'any' if is_replica(module) else dist.get_rank()} of {size}"


def is_replica(module: torch.nn.Module) -> bool:
    """Whether several ranks may share the code of a component: nothing in it speaks of ranks.

    Hooks of inner modules are how libraries bring communication into a model; other code has to name torch's module for
    it. What a trace finds out later (`OF_RANKS`) is not saved. Sharded weights are tensor subclasses, which
    no artifact has, and process groups cannot be recognised in another process.
    """
    if _size() == 1:
        return False
    modules = list(module.modules())
    if any(getattr(m, kind) for m in modules if m is not module for kind in _HOOKS):
        return False
    named = {name for m in modules for name in (type(m).__module__, type(m).forward.__module__)}
    return not any(_names_distributed(name) for name in named)


def _size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@functools.cache
def _names_distributed(module: str) -> bool:
    """Whether a module's text speaks of `torch.distributed`; torch's own layers are known not to communicate."""
    if module.startswith("torch.nn.modules.") and not module.endswith("batchnorm"):
        return False
    path = file_of(module)
    try:
        return path is None or _DISTRIBUTED.search(path.read_bytes()) is not None
    except OSError:
        return True
