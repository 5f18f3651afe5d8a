"""Which layers exist and which are overridden; what is built where one is asked for.

Claims are collected first, checked against each other as a whole, and applied together, so their order cannot matter.
Classes are told apart by identity, never by their name alone: neither a subclass nor a class of the same name in
another module is replaced by accident.
"""

from __future__ import annotations

import difflib
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from compile_policy.caller import warn_user
from compile_policy.layers.checks import apply_claims, check_forward, find_target
from compile_policy.layers.identity import code_digest, origin_of, qualified
from compile_policy.layers.records import Claim, Kind, LayerError, LayerRecord, LayerRow, Snapshot

_snapshot = Snapshot()
_lock = threading.RLock()
_built: Counter[tuple[type, type]] = Counter()  # (class asked for, class built)
_staged: ContextVar[list[Claim] | None] = ContextVar("staged", default=None)
_state: tuple[Snapshot, tuple[Any, ...]] = (_snapshot, ())


def layers() -> tuple[LayerRecord, ...]:
    """Every named layer, by name."""
    return tuple(sorted(_snapshot.layers, key=lambda r: r.name))


def claims() -> tuple[Claim, ...]:
    """Every claim, applied or not."""
    return _snapshot.claims


def add_layer(name: str, cls: type, kind: Kind) -> None:
    """Give a class a name.

    Raises:
        LayerError: the name is taken, or the class has no forward that a layer of this kind calls.
    """
    check_forward(cls, kind)
    with _lock:
        for known in _snapshot.layers:
            if name == known.name:
                raise LayerError(
                    f"The layer name {name!r} is taken by {qualified(known.cls)} (from {known.origin}).",
                    remedy="Choose another name, or override that layer with register_oot.",
                )
        _commit((*_snapshot.layers, LayerRecord(name, cls, kind, origin_of(cls))), _snapshot.claims)


def add_claims(new: Iterable[Claim]) -> None:
    """Check ``new`` claims against each other and against all earlier ones, then apply all of them, or none.

    Inside `staging` they are only collected.

    Raises:
        LayerError: conflicts; the message lists each of them with both origins.
    """
    staged = _staged.get()
    if staged is not None:
        staged.extend(new)
        return
    with _lock:
        _commit(_snapshot.layers, (*_snapshot.claims, *new))


def _commit(known: Sequence[LayerRecord], claimed: Sequence[Claim]) -> None:
    global _snapshot
    applied = apply_claims(known, claimed)
    _snapshot = Snapshot(tuple(known), tuple(claimed), MappingProxyType(applied))


@contextmanager
def staging() -> Iterator[list[Claim]]:
    """Collect the claims that are made inside the block instead of applying them."""
    collected: list[Claim] = []
    token = _staged.set(collected)
    try:
        yield collected
    finally:
        _staged.reset(token)


@contextmanager
def registry_scope() -> Iterator[None]:
    """Everything registered inside the block is forgotten at its end, counts included."""
    global _snapshot
    with _lock:
        before, counted = _snapshot, _built.copy()
    try:
        yield
    finally:
        with _lock:
            _snapshot = before
            _built.clear()
            _built.update(counted)


def forget_failed_modules() -> None:
    """Give the names of layers free whose module is gone again, as its import failed."""
    with _lock:
        _commit([r for r in _snapshot.layers if r.cls.__module__ in sys.modules], _snapshot.claims)


def name_of(cls: type) -> str | None:
    """The registered name of ``cls`` or of the nearest base that has one; an override bears its target's name."""
    names = {r.cls: r.name for r in _snapshot.layers}
    targets = {claim.cls: target for target, claim in _snapshot.applied.items()}
    for base in cls.__mro__:
        if base in names:
            return names[base]
        if targets.get(base) in names:
            return names[targets[base]]
    return None


def resolve(cls: type) -> type:
    """The class that is built where ``cls`` is asked for; an override may be overridden in turn."""
    applied = _snapshot.applied
    while cls in applied:
        cls = applied[cls].cls
    return cls


def count_built(asked: type, made: type) -> None:
    """Remember that ``made`` was built where ``asked`` was asked for."""
    with _lock:
        _built[asked, made] += 1


def registry_state() -> tuple[Any, ...]:
    """What is overridden by which code: hashable, equal in every process that registered the same classes.

    A part of whatever identifies a compiled entry, in memory and on disk. Layers that nobody overrides do not count.
    """
    global _state
    snapshot, state = _state
    if snapshot is not _snapshot:
        snapshot = _snapshot
        rows = [("layer", qualified(target), c) for target, c in snapshot.applied.items()]
        rows += [("model", c.target_name, c) for c in snapshot.claims if c.where == "model"]
        state = tuple(sorted((w, t, qualified(c.cls), code_digest(c.cls), c.priority) for w, t, c in rows))
        _state = (snapshot, state)
    return state


def layer_notes() -> tuple[str, ...]:
    """One sentence for each override in force, for a plan's notes."""
    rows = [(qualified(target), str(claim)) for target, claim in _snapshot.applied.items()]
    rows += [(c.target_name, str(c)) for c in _snapshot.claims if c.where == "model"]
    return tuple(f"{target} is replaced by {claim}." for target, claim in sorted(rows))


def dead_claims() -> tuple[Claim, ...]:
    """Claims that replaced no instance so far."""
    return tuple(claim for claim in _snapshot.claims if not count_of(claim))


def count_of(claim: Claim) -> int:
    """How many instances ``claim`` replaced."""
    target = find_target(claim, _snapshot.layers)
    name = claim.target_name if target is None else qualified(target)
    return sum(n for (asked, made), n in _built.items() if issubclass(made, claim.cls) and qualified(asked) == name)


def check_claims(*, strict: bool = False) -> None:
    """Tell of every claim that replaced nothing; call it once the models are built.

    Raises:
        LayerError: with ``strict``, instead of a `PolicyWarning`.
    """
    dead = [f"{claim} overrides {claim.target_name} and replaced 0 instances{_hint(claim)}." for claim in dead_claims()]
    if dead and strict:
        raise LayerError("\n".join(dead), remedy="Correct the name, or remove the override.")
    for message in dead:
        warn_user(f"{message} Correct the name, or remove the override.")


def _hint(claim: Claim) -> str:
    if claim.where == "model" or find_target(claim, _snapshot.layers) is not None:
        return ""
    names = [n for r in _snapshot.layers for n in (r.name, r.cls.__name__)]
    near = difflib.get_close_matches(claim.target_name, names, n=3, cutoff=0.5)
    return ": no such layer" + (f" (did you mean {' or '.join(near)}?)" if near else "")


def layer_rows() -> tuple[LayerRow, ...]:
    """All layers and claims, for a table."""
    out = [_row(record) for record in layers()]
    named = {r.cls for r in _snapshot.layers}
    for claim in sorted(_snapshot.claims, key=lambda c: (c.target_name, str(c))):
        if find_target(claim, _snapshot.layers) not in named:
            note = _hint(claim).lstrip(": ")
            kind = "model" if claim.where == "model" else "pluggable"
            cls = qualified(claim.cls)
            out.append(LayerRow(claim.target_name, kind, "", cls, claim.origin, count_of(claim), note))
    return tuple(out)


def _row(record: LayerRecord) -> LayerRow:
    claim = _snapshot.applied.get(record.cls)
    if claim is None:
        count = sum(n for (asked, made), n in _built.items() if asked is made is record.cls)
        return LayerRow(record.name, record.kind, record.origin, count=count)
    cls = qualified(claim.cls)
    return LayerRow(record.name, record.kind, record.origin, cls, claim.origin, count_of(claim), _spared(claim, record))


def _spared(claim: Claim, record: LayerRecord) -> str:
    """Instances that one may think were replaced: of subclasses, and those built too early."""
    notes = []
    for (asked, made), n in _built.items():
        if asked is made is record.cls:
            notes.append(f"{n} built before the override")
        elif asked is made and issubclass(asked, record.cls) and not issubclass(asked, claim.cls):
            notes.append(f"{n} of the subclass {asked.__name__} not replaced")
    return ", ".join(sorted(notes))
