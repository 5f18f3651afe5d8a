"""What forbids a cache from being passed to a graph, found out before anything in it is touched.

A cache whose layers start without tensors gets them before the graph. One that turns out to be unusable afterwards
would go to eager with layers that eager did not make, so every refusal that can be told from classes and attributes
comes first.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache, EncoderDecoderCache

from compile_policy.call_key import CONSTANTS
from compile_policy.errors import NotCompilable
from compile_policy.failure import place_in
from compile_policy_transformers.cache_layers import kind_of_class
from compile_policy_transformers.releases import DummyLayer

#: Attributes that every cache of Transformers has; the last two belong to offloading.
_STOCK = frozenset(("layers", "layer_class_to_replicate", "offloading", "only_non_sliding", "prefetch_stream"))
_TRANSFORMERS = "transformers"


def check(cache: Cache) -> None:
    """Refuse a cache that no graph can serve; nothing in it changes.

    Raises:
        NotCompilable: it is offloaded, one of its methods was replaced, or a class in it is not known.
    """
    parts = [cache]
    if isinstance(cache, EncoderDecoderCache):
        parts += [cache.self_attention_cache, cache.cross_attention_cache]
    for part in parts:
        _check_one(part)


def _check_one(cache: Any) -> None:
    if getattr(cache, "offloading", False):
        raise NotCompilable("the cache is offloaded", remedy="Use a cache that stays on the device.")
    layers: list[Any] = list(getattr(cache, "layers", ()))
    for part in (cache, *layers):
        replaced = next(
            (n for n, v in vars(part).items() if callable(v) and callable(getattr(type(part), n, None))), ""
        )
        if replaced:
            raise NotCompilable(f"`{replaced}` was replaced on this cache", remedy="Write it into a class of its own.")
    own_attributes(cache)
    classes = {type(layer) for layer in layers} - {DummyLayer}
    replicated = getattr(cache, "layer_class_to_replicate", None)
    for cls in (*classes, *(() if replicated is None else (replicated,))):
        kind_of_class(cls)


def own_attributes(cache: Any) -> tuple[tuple[str, Any], ...]:
    """Return the attributes of a cache of the user's class that its methods may read, by name.

    Raises:
        NotCompilable: one of them is no plain constant, which a graph can neither read nor keep up to date.
    """
    cls = type(cache)
    if cls.__module__.split(".")[0] == _TRANSFORMERS:
        return ()
    found = {n: v for n, v in vars(cache).items() if n not in _STOCK and not isinstance(cache, EncoderDecoderCache)}
    for name, value in found.items():
        if not isinstance(value, CONSTANTS):
            where = place_in(cls, f"class {cls.__name__}")
            raise NotCompilable(
                f"the cache is a {cls.__name__} ({where}), which holds a {type(value).__name__} in {name}: "
                "a graph cannot keep that up to date",
                remedy="Give a cache of Transformers' own classes, or keep such things outside of it.",
            )
    return tuple(sorted(found.items()))
