"""Workloads of the kinds of caches, and of conversations that go on with one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from compile_policy_transformers.cache_argument import CACHE
from compile_policy_transformers.tiny import tiny_model
from compile_policy_transformers.workloads.batches import Batch, generate, llama, prompts, text
from compile_policy_transformers.workloads.workload import Trial, Workload


def asked(trial: Trial, model: Any, **options: Any) -> None:
    """Generate from two batches, the first padded; the mistake ignores its padding."""
    for inputs in prompts(model):
        if trial.mistaken:
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        generate(trial, model, inputs, **options)


def dynamic(trial: Trial) -> None:
    asked(trial, trial.compiled(llama()))


def static(trial: Trial) -> None:
    asked(trial, trial.compiled(llama()), cache_implementation="static")


def quantized(trial: Trial) -> None:
    """Transformers' own kind, which needs no other package."""
    asked(trial, trial.compiled(llama()), cache_implementation="quantized", cache_config={"backend": "fp8"})


def sliding(trial: Trial) -> None:
    """More tokens than the window holds."""
    model = tiny_model("gemma2")
    model.config.sliding_window = 4
    asked(trial, trial.compiled(model), tokens=8)


def sliding_static(trial: Trial) -> None:
    asked(trial, trial.compiled(tiny_model("gemma3")), cache_implementation="static")


def recurrent(trial: Trial) -> None:
    """A state space beside attention."""
    asked(trial, trial.compiled(tiny_model("jamba")))


def none(trial: Trial) -> None:
    asked(trial, trial.compiled(llama()), use_cache=False)


@torch.no_grad()
def continued(trial: Trial) -> None:
    """A conversation: the second question goes on with the cache of the first."""
    model = trial.compiled(llama())
    cache: Any = DynamicCache(config=model.config)
    ids = text(1, 7)
    for question in (text(1, 4, 1), text(1, 3, 2)):
        found = generate(trial, model, {"input_ids": ids}, **{CACHE: cache})
        if trial.mistaken:
            cache.layers[0].keys.zero_()
        ids = torch.cat([found.sequences, question], dim=1)


@torch.no_grad()
def cropped(trial: Trial) -> None:
    """Steps are taken back, as in speculative decoding by hand."""
    model = trial.compiled(llama())
    cache: Any = DynamicCache(config=model.config)
    trial.keep("logits", model(text(2, 9), **{CACHE: cache}).logits)
    for steps in (3, 2):
        cache.crop(-steps - trial.mistaken)
        trial.keep("logits", model(text(2, 4, steps), **{CACHE: cache}).logits[:, -1])


@torch.no_grad()
def chunked(trial: Trial) -> None:
    """A long prompt in three pieces, into a static cache."""
    model = trial.compiled(llama())
    for tokens in (12, 15):
        ids = text(1, tokens)
        cache = StaticCache(model.config, max_cache_len=32)
        seen = 0
        for piece in ids.tensor_split(3, dim=1)[trial.mistaken :]:
            places = torch.arange(seen, seen + piece.shape[1])[None]
            logits = model(piece, position_ids=places, **{CACHE: cache}).logits
            seen += piece.shape[1]
        trial.keep("logits", logits)


@torch.no_grad()
def shared_prefix(trial: Trial) -> None:
    """One cache of a system prompt is copied for each question."""
    model = trial.compiled(llama())
    prefix: Any = DynamicCache(config=model.config)
    head = text(1, 8)
    model(head, **{CACHE: prefix})
    for seed, tokens in enumerate((3, 5)):
        cache = prefix if trial.mistaken else copy.deepcopy(prefix)
        ids = torch.cat([head, text(1, tokens, seed)], dim=1)
        found: Batch = {"input_ids": ids, CACHE: cache}
        if trial.mistaken:
            cache.layers[0].values.mul_(0.5)
        generate(trial, model, found)


_PADDING = "padding is seen"
WORKLOADS = (
    Workload("dynamic cache", "generate, the default cache.", _PADDING, dynamic),
    Workload("static cache", 'generate, cache_implementation="static".', _PADDING, static),
    Workload("quantized cache", 'generate, cache_implementation="quantized" (fp8).', _PADDING, quantized),
    Workload("sliding windows", "A Gemma 2, longer than its window.", _PADDING, sliding),
    Workload("sliding windows, static", "A Gemma 3.", _PADDING, sliding_static),
    Workload("recurrent states", "A Jamba.", _PADDING, recurrent),
    Workload("no cache", "generate, use_cache=False.", _PADDING, none),
    Workload("conversation", "generate goes on with its cache.", "the cache is wiped", continued),
    Workload("cropped cache", "Steps are taken back.", "one more is taken", cropped),
    Workload("prompt in pieces", "A static cache is filled in three calls.", "a piece is left out", chunked),
    Workload("shared prefix", "Copies of one cache.", "it is not a copy", shared_prefix),
)
