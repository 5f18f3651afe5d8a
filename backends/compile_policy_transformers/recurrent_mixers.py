"""Mixers of linear attention, state spaces and short convolutions traced as one graph for every length.

Transformers' mixers choose between a single-token form and a form for many tokens by ``seq_len == 1`` and by whether
their cache layer has a state; the form for many tokens then loops over chunks in Python. While a decoder is traced, a
mixer that this recipe knows

- sees no earlier state, which leads it to the form for many tokens without a look at the length. The convolution's
  state comes in all the same, through ``update_conv_state``, and the recurrent one through the rule;
- finds, under the name of the function for many tokens, an operator of `recurrence` that takes the state and picks
  the form at call time.

Which mixers: see `recurrent_rules`. Nothing of Transformers is changed; for the time of a trace the instances have a
``forward`` of ours, and calls from other threads go on to their own. Drop this once a stock mixer traces to one graph
for one token and for two hundred.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate

from compile_policy.errors import NotCompilable
from compile_policy_transformers.cache_argument import cache_parameter
from compile_policy_transformers.cache_masks import RECURRENT
from compile_policy_transformers.recurrent_rules import Rule, handed, rule_of

_MASK_PARAMETERS = {"config", "inputs_embeds", "attention_mask", "position_ids"}
_CONVOLUTION = frozenset(("get_conv_state", "update_conv_state", "causal_conv1d_fn", "causal_conv1d_update"))
#: The same of a mixer that asks whether there are states and reads them off the layer (to Transformers 5.20).
_ASKS_AND_READS = frozenset(("has_previous_state", "layers"))
_READING = _CONVOLUTION - {"get_conv_state"} | _ASKS_AND_READS | {"conv_states"}
#: What a mixer may ask of its cache.
_KNOWN = frozenset(("get_conv_state", "get_recurrent_state", "update_conv_state", "update_recurrent_state")) | {
    "is_recording_past"
}
_OTHER = frozenset(name for name in dir(Cache) if not name.startswith("__")) - _KNOWN | {
    "layers",
    "crop",
    "reorder_cache",
}


class CoveredStates:
    """A cache as a covered mixer sees it while it is traced: with no state before, and all of them taken over.

    Attributes:
        recurrent: the recurrent state that the mixer asked for, for the rule to take.
        taken: how often the rule took a part of it.
    """

    def __init__(self, cache: Any, layer: int | None = None) -> None:
        self.cache = cache
        self.layer = layer
        self.recurrent: torch.Tensor | None = None
        self.taken = self.wanted = 0

    def number(self, dims: int) -> int:
        """How many states of ``dims`` dims there are: one, or one a head."""
        assert self.recurrent is not None
        self.wanted = 1 if self.recurrent.dim() == dims else self.recurrent.shape[1]
        return self.wanted

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        self.recurrent = self.cache.layers[layer_idx].recurrent_states[state_idx]

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Say that there is none, and keep the recurrent one for the rule."""
        layer = self.cache.layers[self.layer if layer_idx is None else layer_idx]
        self.recurrent = layer.recurrent_states[state_idx or 0]
        return False

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """The convolution's state before this call, followed by the new one."""
        states: torch.Tensor = self.cache.update_conv_state(conv_states, layer_idx, state_idx=state_idx, **kwargs)
        return states

    def update_recurrent_state(self, recurrent_states: torch.Tensor, layer_idx: int, **kwargs: Any) -> torch.Tensor:
        states: torch.Tensor = self.cache.update_recurrent_state(recurrent_states, layer_idx, **kwargs)
        return states

    def is_recording_past(self, layer_idx: int) -> bool:
        return False


class RecurrentDecoder:
    """What is particular about a decoder with recurrent layers.

    Attributes:
        alone: it has no other kind of layer, and so takes a padding mask where others take a mapping.
        make_masks: makes the masks of a call: Transformers' own function, or that of the decoder's Python module.
    """

    def __init__(self, decoder: torch.nn.Module) -> None:
        self.decoder = decoder
        names = getattr(getattr(inspect.unwrap(type(decoder).forward), "__code__", None), "co_names", ())
        recurrent = "create_recurrent_attention_mask" in names
        kinds = set(getattr(getattr(decoder, "config", None), "layer_types", None) or ())
        alone = recurrent or (kinds and kinds <= {*RECURRENT})  # one that makes no mask hands on what it is given
        self.alone = bool(alone) and "create_causal_mask" not in names and "dict" not in names
        self.make_masks = (_own_masks(decoder) if recurrent else None) or create_masks_for_generate

    @property
    def stock_masks(self) -> bool:
        """Whether Transformers' own function makes them."""
        return self.make_masks is create_masks_for_generate

    @staticmethod
    def mask(made: Mapping[str, Any]) -> Any:
        """The one mask of a decoder that is ``alone``."""
        return next((mask for name, mask in made.items() if name in RECURRENT), None)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Have the known mixers traced for all lengths; with gradients they stay as they are."""
        mixers: dict[torch.nn.Module, Any] = {}
        if not torch.is_grad_enabled():
            found = ((m, _function(m)) for m in self.decoder.modules())
            mixers = {m: types.MethodType(_traced(f), m) for m, f in found if f is not None}
        own = self.decoder.__dict__.get("forward")
        try:
            for mixer, forward in mixers.items():
                mixer.__dict__["forward"] = forward
            if mixers and self.alone:
                self.decoder.__dict__["forward"] = _handing_mask(self.decoder.forward)
            yield
        finally:
            for mixer in mixers:
                mixer.__dict__.pop("forward", None)
            self.decoder.__dict__.pop("forward", None)
            if own is not None:
                self.decoder.__dict__["forward"] = own


def _own_masks(decoder: torch.nn.Module) -> Callable[..., Any] | None:
    """What the models round a decoder bring where its layers want other masks (GLM-5 next, Nemotron-H).

    One that asks for more than every call has, such as the kinds of its tokens, is none for a decoder alone.
    """
    for cls in vars(sys.modules[type(decoder).__module__]).values():
        own = vars(cls).get("create_masks_for_generate") if isinstance(cls, type) else None
        if isinstance(own, staticmethod):
            parameters = inspect.signature(own.__func__).parameters.values()
            known = {*_MASK_PARAMETERS, cache_parameter(own.__func__)}
            if {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} <= known:
                found: Callable[..., Any] = own.__func__
                return found
    return None


def _handing_mask(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The decoder without its own look at the padding mask, which depends on the number of tokens."""

    def traced(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return forward(*args, **kwargs)
        handed.mask = kwargs.pop("attention_mask", None)
        out = forward(*args, **kwargs)
        handed.mask = None
        return out

    return traced


def is_covered(module: torch.nn.Module) -> bool:
    """Whether the recipe knows this mixer."""
    return _function(module) is not None


def _function(module: torch.nn.Module) -> Callable[..., Any] | None:
    """The mixer's own code, with an operator in place of its rule; ``None`` for any other module."""
    if "forward" in module.__dict__:
        return None
    function = inspect.unwrap(type(module).forward)
    if not isinstance(function, types.FunctionType):
        return None
    names = frozenset(function.__code__.co_names)
    if names >= _CONVOLUTION and not names & _OTHER:
        recurrent = "get_recurrent_state" in names
    elif names >= _READING and not names & (_OTHER - _ASKS_AND_READS):
        recurrent = "recurrent_states" in names
    else:
        return None
    rule = rule_of(names, function.__globals__)
    if recurrent != (rule is not None):
        return None
    return _with_rule(function, rule)


def _with_rule(function: types.FunctionType, rule: Rule | None) -> types.FunctionType:
    """The same code in a namespace of its own."""
    names = dict(function.__globals__)
    if rule is not None:
        names[rule.chunks] = rule.substitute
    out = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    out.__kwdefaults__ = function.__kwdefaults__
    return out


def _traced(function: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():  # another thread
            return type(self).forward(self, *args, **kwargs)
        states = None
        for name, value in list(kwargs.items()):
            if isinstance(value, Cache):
                states = CoveredStates(value, getattr(self, "layer_idx", None))
                kwargs[name] = states
        if states is None and any(isinstance(a, Cache) for a in args):
            raise NotCompilable("a mixer is handed its cache by position")
        if handed.mask is not None and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = handed.mask
        handed.states = states
        handed.module = function.__module__
        out = function(self, *args, **kwargs)
        handed.states, handed.module = None, ""  # as before: what it holds is part of what an entry is found by
        if states is not None and states.recurrent is not None and (not states.taken or states.taken != states.wanted):
            raise NotCompilable("a mixer went on without the state that it asked for")
        return out

    return forward
