"""Records of layers and of claims on them: data only, frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from compile_policy.errors import PolicyError
from compile_policy.layers.identity import qualified

Kind = Literal["pluggable", "custom_op"]
Where = Literal["layer", "model"]


class LayerError(PolicyError):
    """A layer, or the class that shall take its place, cannot be registered or built as asked."""


@dataclass(frozen=True)
class LayerRecord:
    """A layer with a name. ``origin`` is the distribution, or the module, that brought it."""

    name: str
    cls: type
    kind: Kind
    origin: str


@dataclass(frozen=True)
class Claim:
    """``cls`` wants the place of ``target``.

    Attributes:
        target: a class; or, as a string, the name of a registered layer, its class name, or ``module:Class``.
        cls: the class that is built instead.
        where: ``layer`` for a registered layer, ``model`` for a class of the modelling library.
        origin: who claims it.
        priority: of several claims on one target the highest wins; equal ones are a conflict.
        state_dict_compatible: ``cls`` is no subclass, but its state dict has the same names, shapes and dtypes; proven
            on what is built, not believed.
    """

    target: type | str
    cls: type
    where: Where
    origin: str
    priority: int = 0
    state_dict_compatible: bool = False

    @property
    def target_name(self) -> str:
        return self.target if isinstance(self.target, str) else qualified(self.target)

    def __str__(self) -> str:
        return f"{qualified(self.cls)} (from {self.origin})"


@dataclass(frozen=True)
class Snapshot:
    """The whole registry at one moment; replaced, never changed. ``applied``: target class -> the claim that holds."""

    layers: tuple[LayerRecord, ...] = ()
    claims: tuple[Claim, ...] = ()
    applied: Mapping[type, Claim] = field(default_factory=lambda: MappingProxyType({}), hash=False)


@dataclass(frozen=True)
class LayerRow:
    """One line of the list of layers.

    Attributes:
        name: registered name, or the claimed class where none is registered.
        kind: ``pluggable``, ``custom_op`` or ``model``.
        origin: who brought the layer.
        override: the class that is built instead; empty when there is none.
        override_origin: who claims it.
        count: instances built in this process: of the override where there is one, else of the layer.
        note: what is wrong or surprising, in a sentence.
    """

    name: str
    kind: str
    origin: str
    override: str = ""
    override_origin: str = ""
    count: int = 0
    note: str = ""
