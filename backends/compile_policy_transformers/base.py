"""From a model to its components: the decoder, the encoders, the head, and what lies between them.

Transformers answers most of this itself (``get_decoder``, ``get_encoder``, ``get_output_embeddings``); the answers are
corrected where a decoder holds the head or a tower, so that what is compiled is the language model and nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from compile_policy.errors import UnsupportedModelError
from compile_policy.failure import place_in

from .cache_argument import cache_parameter
from .components import Found, as_model, generates, holds, qualname, rule_for
from .forward_parts import parts_of
from .multimodal import as_encoder, decoder_as_named, find_encoders

#: Arguments of a module that is fed with text.
_TEXT = {"input_ids", "inputs_embeds"}


def _get_decoder_cls(config_or_model: PreTrainedConfig | nn.Module) -> type[nn.Module]:
    """Class of the language decoder that a call of the model runs; nothing is allocated for a configuration.

    Raises:
        UnsupportedModelError: the model has no decoder that stands by itself.
    """
    model = as_model(config_or_model)
    decoder = next((found for found in find_components(model) if found.role == "decoder"), None)
    if decoder is None:
        raise UnsupportedModelError(f"No decoder was found in {type(model).__name__}.", remedy="Run it eager.")
    if decoder.obstacle:
        raise UnsupportedModelError(f"{type(model).__name__}: {decoder.obstacle}", remedy="Run it eager.")
    return type(decoder.module)


def find_components(model: nn.Module) -> list[Found]:
    """The components of a model: decoder first, then encoders, head, and the rest as projectors.

    No component holds another one, except a decoder that calls a tower itself: before its layers, which are compiled
    alone then (`forward_parts.py`), or among them, which is an ``obstacle``.
    """
    rule = rule_for(model)
    if rule is not None and rule.inner:
        inner = model.get_submodule(rule.inner)
        found = [replace(f, qualname=f"{rule.inner}.{f.qualname}".rstrip(".")) for f in find_components(inner)]
    else:
        heads = _find_heads(model)
        encoders = find_encoders(model)
        decoder = _find_decoder(model, [f.module for f in encoders + heads])
        if decoder is not None and not decoder.obstacle:  # a rule's decoder may end in its head
            heads = [head for head in heads if not holds(decoder.module, head.module)]
        found = ([decoder] if decoder is not None else []) + encoders + heads
        if decoder is None and not encoders and (itself := as_encoder(model)) is not None:
            found = [itself]
    known = {f.qualname for f in found}
    claimed = [f.module for f in found]
    return found + [Found("projector", n, m) for n, m in _unclaimed(model, "", claimed) if n not in known]


def called_components(model: nn.Module, found: Sequence[Found], inputs: Mapping[str, Any]) -> set[str]:
    """Paths of those components that one call ``model(**inputs)`` really calls: the proof that they are on its path."""
    called: set[str] = set()
    handles = [f.module.register_forward_pre_hook(lambda *_, path=f.qualname: called.add(path)) for f in found]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return called


def _find_heads(model: nn.Module) -> list[Found]:
    """Output embeddings of the model, and of the decoder where that brings its own."""
    modules: list[nn.Module] = []
    for owner in (model, decoder_as_named(model)):
        get_head = getattr(owner, "get_output_embeddings", None)
        head = get_head() if get_head is not None else None
        # a decoder may answer its *input* embeddings here (udop): a table of vectors is no head
        if not isinstance(head, nn.Module) or isinstance(head, nn.Embedding):
            continue
        if not any(head is known for known in modules):
            modules.append(head)
    return [Found("head", path, head) for head in modules if (path := qualname(model, head))]


def _find_decoder(model: nn.Module, others: list[nn.Module]) -> Found | None:
    rule = rule_for(model)
    if rule is not None and rule.decoder:
        return Found("decoder", rule.decoder, model.get_submodule(rule.decoder))
    named = decoder_as_named(model)
    if named is not None and not _holds_blocks(named, others):  # a head may be called "decoder" (modernbert-decoder)
        named = getattr(model, "base_model", named)
    if named is None or qualname(model, named) is None:
        return None
    if any(holds(named, other) for other in others):  # a causal language model knows its own decoder
        inner = decoder_as_named(named)
        named = inner if inner is not None and holds(named, inner) else named
    if any(named is other for other in others):  # an image model, which has no decoder
        return None
    module, obstacle = _descend(named, others)
    path = qualname(model, module)
    assert path is not None
    if not _holds_blocks(module, others):
        return None
    if not is_language_decoder(model, module):
        reads_text = bool(_TEXT & set(inspect.signature(module.forward).parameters))
        return Found("encoder[text]", path, module) if reads_text and not obstacle else None
    return Found("decoder", path, module, obstacle=obstacle)


def is_language_decoder(model: nn.Module, module: nn.Module) -> bool:
    """True if ``module`` continues a text: it takes token ids or their embeddings, or keeps a cache, and its attention
    looks back alone.

    A model that generates has one. Of others, causal attention tells: an encoder such as BERT takes a cache in its
    signature, and looks both ways; what turns features into a depth map may be called a decoder, and takes no text.
    """
    parameters = set(inspect.signature(module.forward).parameters)
    cached = cache_parameter(inspect.unwrap(type(module).forward)) is not None
    if not cached and not parameters & _TEXT:
        return False
    if generates(model):
        return True
    looks_back = {m.is_causal for m in module.modules() if isinstance(getattr(m, "is_causal", None), bool)}
    if not looks_back:  # no attention that says so: a state space, or code that is older than the attribute
        return cached and getattr(module, "is_decoder", True) is not False
    return True in looks_back


def _descend(module: nn.Module, others: list[nn.Module]) -> tuple[nn.Module, str]:
    """Go down until neither head nor tower is inside; the second value says why that was not possible."""
    inside = [other for other in others if holds(module, other)]
    if not inside:
        return module, ""
    children = [c for c in module.children() if not any(c is other for other in others)]
    if not any(isinstance(c, nn.ModuleList) and len(c) for c in children):
        below = [c for c in children if _holds_blocks(c, others)]
        if below:
            return _descend(max(below, key=_size), others)
    if parts_of(module) is not None:  # what is inside is called before its layers, which are compiled
        return module, ""
    names = " and ".join(sorted({type(other).__name__ for other in inside}))
    own = f"{type(module).__name__} holds {names} beside its own layers"
    return module, f"{own} and calls it itself ({_calls(module, inside[0])}), so neither can be compiled alone"


def _calls(module: nn.Module, inner: nn.Module) -> str:
    """The line of ``module``'s forward that calls ``inner``, or what holds it."""
    path = qualname(module, inner)
    assert path
    return place_in(type(module).forward, f"self.{path.split('.')[0]}(")


def _holds_blocks(module: nn.Module, others: list[nn.Module]) -> bool:
    """Whether there are repeated blocks that do not belong to ``others``."""
    if any(module is other for other in others):
        return False
    if isinstance(module, nn.ModuleList) and len(module):
        return True
    return any(_holds_blocks(child, others) for child in module.children())


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _unclaimed(module: nn.Module, prefix: str, claimed: list[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The largest modules with weights that neither are nor hold a claimed one."""
    if any(module is c for c in claimed):
        return
    if prefix and not any(holds(module, c) for c in claimed):
        if next(module.parameters(), None) is not None:
            yield prefix, module
        return
    for name, child in module.named_children():
        yield from _unclaimed(child, f"{prefix}.{name}" if prefix else name, claimed)
