"""A short test of a decoder under the policy, for releases of Transformers that the tests have not run on.

A decoder of random weights is compiled with the backend ``eager``: what is tested is how its calls, its cache and its
masks are bound, not a compiler. The random state is left as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, StaticCache

from compile_policy.config import CompilationConfig
from compile_policy.errors import PolicyWarning, first_line
from compile_policy.region import Region, region_of
from compile_policy.self_test import Result
from compile_policy_transformers.applying import apply, remove
from compile_policy_transformers.cache_argument import CACHE
from compile_policy_transformers.tiny import tiny_model

_MODEL, _TOKENS, _SLOTS = "llama", 5, 16


class _Trial:
    """A decoder under the policy, asked the same as eager."""

    def __init__(self) -> None:
        self.model: Any = tiny_model(_MODEL)
        apply(self.model, CompilationConfig(backend="eager", cache_dir=False))
        region = region_of(self.model.model)
        if region is None:
            raise LookupError(f"no decoder was found in {type(self.model).__name__}")
        self.region: Region = region

    def sequence(self, *, padded: bool = False, static: bool = False) -> str:
        """What differs from eager in a prompt and a token behind it; empty where nothing does."""
        before = self.region.eager_calls
        got = self._logits(padded, static)
        if self.region.eager_calls != before:
            return f"ran eager: {self.region.fallback}"
        with self.region.pause():
            want = self._logits(padded, static)
        if not torch.allclose(got, want, atol=1e-4):
            return f"differs from eager by {(got - want).abs().max().item():.2g}"
        return ""

    def _logits(self, padded: bool, static: bool) -> torch.Tensor:
        ids = torch.arange(3, 3 + _TOKENS).repeat(2, 1)
        mask = torch.ones(2, _TOKENS + 1, dtype=torch.long)
        mask[0, : 2 * padded] = 0
        config = self.model.config
        cache: Any = StaticCache(config, max_cache_len=_SLOTS) if static else DynamicCache(config=config)
        given: dict[str, Any] = {CACHE: cache, "use_cache": True}
        first = self.model(input_ids=ids, attention_mask=mask[:, :-1], **given).logits
        second = self.model(input_ids=ids[:, :1], attention_mask=mask, **given).logits
        seen = mask.bool()
        return torch.cat([first, second], dim=1)[seen]


def self_test() -> list[Result]:
    """Run each check: (name, passed, what was seen)."""
    checks: dict[str, Callable[[], str]] = {
        "decoder: attribute change": _attribute_change,
        "decoder: mask change": _mask_change,
        "decoder: recompile": _recompile,
    }
    return [_run(name, check) for name, check in checks.items()]


def _run(name: str, check: Callable[[], str]) -> Result:
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
            warnings.simplefilter("ignore", PolicyWarning)
            wrong = check()
    except Exception as error:
        wrong = first_line(error)
    return name, not wrong, wrong or "as eager"


def _attribute_change() -> str:
    """The scale of an attention is written between two sequences."""
    trial = _Trial()
    wrong = trial.sequence()
    trial.model.model.layers[0].self_attn.scaling = 3.0
    return wrong or trial.sequence()


def _mask_change() -> str:
    """The second sequence has padding."""
    trial = _Trial()
    return trial.sequence() or trial.sequence(padded=True)


def _recompile() -> str:
    """One graph for a dynamic cache, a second one for a static cache; none stays after the policy is taken off."""
    trial = _Trial()
    wrong = trial.sequence() or trial.sequence(static=True)
    if not wrong and trial.region.graphs != 2:
        return f"{trial.region.graphs} graphs for a dynamic and a static cache"
    remove(trial.model)
    return wrong
