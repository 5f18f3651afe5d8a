"""What a layer, and a claim on one, must fulfil; every problem is found before anything is applied."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

from compile_policy.layers.identity import qualified
from compile_policy.layers.records import Claim, Kind, LayerError, LayerRecord

PLATFORM_FORWARDS = tuple(f"forward_{name}" for name in ("native", "cuda", "hip", "xpu", "cpu", "tpu", "oot"))


def apply_claims(layers: Sequence[LayerRecord], claims: Sequence[Claim]) -> dict[type, Claim]:
    """Target class -> the claim that wins, for the claims on layers whose target is known.

    Raises:
        LayerError: all conflicts at once, one on a line.
    """
    by_target: dict[type, list[Claim]] = {}
    for claim in claims:
        target = find_target(claim, layers)
        if target is not None and claim.where == "layer":
            by_target.setdefault(target, []).append(claim)
    problems: list[str] = []
    for target, rivals in by_target.items():
        problems += conflicts(qualified(target), rivals)
        for claim in rivals:
            problems += check_claim(claim, target)
    applied = {target: max(rivals, key=lambda c: c.priority) for target, rivals in by_target.items()}
    problems += _circles(applied)
    if problems:
        raise LayerError("\n".join(problems))
    return applied


def find_target(claim: Claim, layers: Sequence[LayerRecord]) -> type | None:
    """The class that a claim is about; ``None`` while no layer of that name is registered.

    Raises:
        LayerError: the name fits several classes.
    """
    if not isinstance(claim.target, str):
        return claim.target
    found = [r.cls for r in layers if claim.target in (r.name, qualified(r.cls))]
    found = found or [r.cls for r in layers if claim.target == r.cls.__name__]
    if len(found) > 1:
        names = ", ".join(sorted(qualified(c) for c in found))
        raise LayerError(f"{claim} overrides {claim.target!r}, which may be {names}.", remedy="Write module:Class.")
    return found[0] if found else None


def import_target(claim: Claim) -> type:
    """The class that a claim on a model's class is about.

    Raises:
        LayerError: ``module:Class`` that cannot be imported.
    """
    if isinstance(claim.target, type):
        return claim.target
    module, _, name = claim.target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise LayerError(f"{claim} overrides {claim.target!r}, which is not there: {error}.") from None
    assert isinstance(found, type)
    return found


def conflicts(target: str, rivals: Sequence[Claim]) -> list[str]:
    """Why ``rivals`` cannot hold together: one message, or none."""
    top = max(c.priority for c in rivals)
    winners = sorted(str(c) for c in rivals if c.priority == top)
    if len(winners) == 1:
        return []
    return [f"{target} is claimed by {' and by '.join(winners)}. Remove one, or give one a higher priority."]


def check_claim(claim: Claim, target: type) -> list[str]:
    """Why ``claim`` cannot take the place of ``target``."""
    out: list[str] = []
    if claim.cls is target:
        out.append(f"{claim} overrides itself.")
    if not issubclass(claim.cls, target) and not claim.state_dict_compatible:
        out.append(
            f"{claim} overrides {qualified(target)} and is no subclass of it. Derive it from {target.__name__}, or "
            "pass state_dict_compatible=True, which is proven on what is built."
        )
    try:
        check_forward(claim.cls, getattr(claim.cls, "layer_kind", "pluggable"), target)
    except LayerError as error:
        out.append(str(error))
    return out


def check_forward(cls: type, kind: Kind, target: type | None = None) -> None:
    """Refuse a class whose forward nobody would call.

    Raises:
        LayerError: ``forward_oot`` and its kin where nothing dispatches to them, or a `CustomOp` without
            ``forward_native``.
    """
    if kind == "custom_op":
        if not _defines(cls, "forward_native"):
            raise LayerError(
                f"{qualified(cls)} defines no forward_native.", remedy="Every other forward falls back to it."
            )
        return
    dead = [name for name in PLATFORM_FORWARDS if _defines(cls, name, target)]
    if dead and not _defines(cls, "forward", target):
        why = f"{target.__name__} is" if target else "it would be"
        raise LayerError(
            f"{qualified(cls)} defines {', '.join(dead)}, which nobody calls: {why} a PluggableLayer and has no "
            "forward per platform.",
            remedy="Define forward instead.",
        )


def _defines(cls: type, name: str, target: type | None = None) -> bool:
    """Whether ``cls`` defines ``name`` itself: neither inherited from ``target`` nor from the base of a kind."""
    above = set(target.__mro__) if target is not None and issubclass(cls, target) else {object}
    own = [c for c in cls.__mro__ if c not in above and "layer_kind" not in vars(c)]
    own = [c for c in own if c.__module__.split(".")[0] != "torch"]
    return any(name in vars(c) for c in own)


def _circles(applied: Mapping[type, Claim]) -> list[str]:
    for start in applied:
        seen, cls = [start], applied[start].cls
        while cls in applied and cls not in seen:
            seen.append(cls)
            cls = applied[cls].cls
        if cls is start:
            return ["Overrides go in a circle: " + " -> ".join(qualified(c) for c in [*seen, start]) + "."]
    return []
