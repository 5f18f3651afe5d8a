"""Dynamo's guards as plain data: the one place that knows its guard entries and sources.

A *place* says where a guarded object stands: a root and the steps from there, each a tuple of plain values.

- roots: ``("local", name)``, ``("global", name)``, ``("process",)`` for settings of torch;
- steps: ``("attr", name)``, ``("item", key)``, ``("key", i)`` for the i-th key of a dict, ``("item at", i)`` for
  the item under that key, ``("type",)``, ``("mro",)``, ``("class dict",)``, ``("weak",)`` for what a weak reference
  points to;
- ``("unknown", name of the source's class)`` where this module has no word for it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo import source as sources
from torch._guards import ChainedSource

from compile_policy.compat_precision import float32_precisions

Step = tuple[Any, ...]
Place = tuple[Step, ...]


@dataclass(frozen=True)
class GuardFacts:
    """One guard that Dynamo would have kept.

    Attributes:
        kind: Dynamo's name for the kind of guard, such as ``TYPE_MATCH``.
        name: the guarded expression; empty for settings of the process.
        detail: the test that would have been evaluated, as far as Dynamo writes it out.
        place: where the guarded object stands.
        word: the attribute or key that the guard asks for, where it asks for one.
        other: the second place of a guard that compares two objects.
        line: file and line of the model that the guard comes from; empty where Dynamo does not say.
    """

    kind: str
    name: str
    detail: str
    place: Place
    word: Any = None
    other: Place | None = None
    line: str = ""


def guard_facts(entry: Any) -> GuardFacts:
    """What a ``GuardFilterEntry`` says."""
    guard = entry.orig_guard
    words = guard.create_fn.keywords if isinstance(guard.create_fn, functools.partial) else {}
    other = words.get("source_b")
    asked = guard.originating_source
    if str(entry.guard_type) == "HASATTR" and "attr" not in words and isinstance(asked, sources.AttrSource):
        words, asked = {"attr": asked.member}, asked.base  # to torch 2.11: the source is that of the attribute
    return GuardFacts(
        kind=str(entry.guard_type),
        name=str(entry.name),
        detail="; ".join(guard.code_list or ()),
        place=place_of(asked),
        word=words.get("attr", words.get("key")),
        other=None if other is None else place_of(other),
        line=_line(guard),
    )


def _line(guard: Any) -> str:
    frames = list(getattr(guard, "user_stack", None) or ())
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def place_of(source: Any) -> Place:
    """Root and steps of a Dynamo source."""
    steps: list[Step] = []
    while isinstance(source, ChainedSource):
        steps[:0] = _steps(source)
        source = source.base
    return (_root(source), *steps)


def _root(source: Any) -> Step:
    if isinstance(source, sources.LocalSource):
        return ("local", source.local_name)
    if isinstance(source, sources.GlobalSource):
        return ("global", source.global_name)
    if isinstance(source, (sources.GlobalStateSource, sources.ShapeEnvSource)):
        return ("process",)
    if isinstance(source, sources.ImportSource):
        return ("module", source.module_name)
    return ("unknown", type(source).__name__)


def _steps(source: Any) -> Sequence[Step]:
    """The steps that one link of a chain stands for, nearest to the root first."""
    if isinstance(source, (sources.NNModuleSource, sources.SkipGuardSource, sources.OptimizerSource)):
        return ()
    if isinstance(source, (sources.AttrSource, sources.GenericAttrSource, sources.GradSource)):
        return (("attr", source.member),)
    if isinstance(source, (sources.DictGetItemSource, sources.DictSubclassGetItemSource)):
        if isinstance(source.index, sources.ConstDictKeySource):
            return (("item at", source.index.index),)
        return (("item", source.index),)
    if isinstance(source, sources.TupleIteratorGetItemSource):
        return (("unknown", type(source).__name__),)
    if isinstance(source, sources.GetItemSource):
        return (("item", source.unpack_slice() if source.index_is_slice else source.index),)
    if isinstance(source, sources.DefaultsSource):
        return (("attr", source.field), ("item", source.idx_key))
    return (_SINGLE.get(type(source), ("unknown", type(source).__name__)),) if not _keyed(source) else (_keyed(source),)


def _keyed(source: Any) -> Step:
    if isinstance(source, sources.ConstDictKeySource):
        return ("key", source.index)
    return ("item of set", source.index) if isinstance(source, sources.NonSerializableSetGetItemSource) else ()


_SINGLE: dict[type, Step] = {
    sources.TypeSource: ("type",),
    sources.TypeMROSource: ("mro",),
    sources.TypeDictSource: ("class dict",),
    sources.CodeSource: ("attr", "__code__"),
    sources.ClosureSource: ("attr", "__closure__"),
    sources.WeakRefCallSource: ("weak",),
    sources.SubclassAttrListSource: ("inner names",),
}


def inlined_saved_tensor_hooks() -> bool:
    """Whether saved-tensor hooks are active that would become part of a graph."""
    utils: Any = torch._functorch._aot_autograd.utils
    return bool(utils.saved_tensors_hooks_are_inlineable(utils.top_saved_tensors_hooks()))


def is_immutable_type(cls: type) -> bool:
    """Whether attributes of the class cannot be set: built-in types, and those that C code has closed."""
    heap_type, immutable = 1 << 9, 1 << 8
    return not cls.__flags__ & heap_type or bool(cls.__flags__ & immutable)


def process_settings() -> tuple[Any, ...]:
    """Settings that Dynamo's guard on the global state has and `compat.modes` has not."""
    return (
        *float32_precisions(),
        torch._C._get_cublas_allow_fp16_reduced_precision_reduction(),
        torch._C._get_cublas_allow_bf16_reduced_precision_reduction(),
        torch.is_autocast_cache_enabled(),
    )
