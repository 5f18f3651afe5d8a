"""What stands for a guard that is gone, from weakest to strongest; see `audit`."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from compile_policy.watched import Watched

COVERS = ("construction", "key", "sizes", "fingerprint", "check")
_OWN_PACKAGES = ("compile_policy", "compile_policy_transformers")
#: (module, global) -> why only the items matter that a graph has looked up, not how many there are or in which order.
lookup_tables: dict[tuple[str, str], str] = {
    ("compile_policy.adapters", "_adapters"): "adapters are looked up by type",
    ("torch.utils._pytree", "SUPPORTED_NODES"): "containers are looked up by type",
}


def register_lookup_table(module: str, name: str, why: str) -> None:
    """Declare that a global dictionary is only ever looked up by key, so that it may grow.

    Dynamo guards on all keys of a dictionary that is looked into. Only for one that nothing in a forward iterates over.
    """
    lookup_tables[module, name] = why


class Uncovered(Exception):
    """No rule and no check fits; says why."""


@dataclass(frozen=True)
class Node:
    """An object on the way of a guard.

    Attributes:
        value: the object.
        cover, rule: the strongest cover that a step up to here needed.
        watched: the checks that these steps need.
        closed: made for this entry or fixed by its key, containers included: nothing in it can change.
        class_dict: the value stands for the own attributes of this class.
    """

    value: Any
    cover: str
    rule: str
    watched: tuple[Watched, ...] = ()
    closed: bool = False
    class_dict: type | None = None

    def then(self, value: Any, cover: str, rule: str, watched: Sequence[Watched] = ()) -> Node:
        """The object one step on."""
        stronger = COVERS.index(cover) >= COVERS.index(self.cover)
        return Node(
            value, cover if stronger else self.cover, rule if stronger else self.rule, (*self.watched, *watched)
        )


def both(a: Node, b: Node) -> Node:
    stronger = a if COVERS.index(a.cover) >= COVERS.index(b.cover) else b
    return replace(stronger, watched=(*a.watched, *b.watched), closed=a.closed and b.closed)


def is_own(value: Any) -> bool:
    """A function, class or module of this package."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    if not isinstance(value, (types.ModuleType, types.FunctionType, type)) or not isinstance(name, str):
        return False
    return name.split(".")[0] in _OWN_PACKAGES
