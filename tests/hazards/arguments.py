"""What a caller hands over: arguments that come, go, change their kind, or are wrong."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache

from compile_policy_transformers.cache_argument import CACHE

from .case import BATCH, NEW, Case, Hazard, behind, chunk, forward, positions, prompt


def put(**values: Any) -> Any:
    """A change that gives arguments other values."""
    return lambda case: case.inputs.update(values)


def _without_mask(case: Case) -> None:
    chunk(case)
    case.kept["mask"] = case.inputs.pop("attention_mask")


def _without_cache(case: Case) -> None:
    prompt(case)
    case.kept["with cache"] = behind(case, DynamicCache(config=case.text_config))


def _embeddings(case: Case) -> None:
    chunk(case)
    _to_embeddings(case)


def _plain_positions(case: Case) -> None:
    """One row without a mask, as packed sequences are given, its positions not restarting yet."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 200, (1, 9), generator=generator)
    case.inputs = {"input_ids": ids, "position_ids": torch.arange(9)[None], "use_cache": False}


def _to_embeddings(case: Case) -> None:
    ids = case.inputs.pop("input_ids")
    case.inputs["inputs_embeds"] = case.base.get_input_embeddings()(ids).detach()


def _other_padding(case: Case) -> None:
    case.inputs["attention_mask"] = case.inputs["attention_mask"].clone()
    case.inputs["attention_mask"][0, :6] = 0


def _four_dims(case: Case, dtype: torch.dtype) -> None:
    """A mask that forbids every third key; one for all layers, so the window is not in it."""
    keys = case.inputs["attention_mask"].shape[1]
    allowed = torch.ones(BATCH, 1, NEW, keys, dtype=torch.bool).tril(keys - NEW)
    allowed[..., ::3] = False
    open_, closed = torch.tensor(0.0, dtype=torch.float32), torch.tensor(torch.finfo(torch.float32).min)
    case.inputs["attention_mask"] = allowed if dtype is torch.bool else torch.where(allowed, open_, closed)


def _by_position(case: Case) -> Any:
    names = ("input_ids", "attention_mask", "position_ids")
    if not case.kept.get("by position"):
        return forward(case)[0]
    with torch.no_grad():
        rest = {n: v for n, v in case.inputs.items() if n not in (*names, CACHE)}
        cache = _copied(case.inputs[CACHE])
        decoder_call = case.decoder(*[case.inputs[n] for n in names], cache, **rest)
        return case.base.get_output_embeddings()(decoder_call[0])


def _copied(cache: Any) -> Any:
    return copy.deepcopy(cache)


def _embedding_gradient(case: Case) -> Any:
    embeds = case.inputs["inputs_embeds"].detach().clone().requires_grad_(case.inputs["inputs_embeds"].requires_grad)
    inputs = {**case.inputs, "inputs_embeds": embeds, CACHE: _copied(case.inputs[CACHE])}
    loss = case.model(**inputs).logits.float().square().mean()
    loss.backward()
    return [loss, embeds.grad if embeds.grad is not None else torch.zeros(1)]


def _expand_embeddings(case: Case) -> None:
    embeds = case.inputs["inputs_embeds"]
    case.inputs["inputs_embeds"] = embeds.repeat_interleave(2, 2)[:, :, ::2].flip(0)


def _poison(case: Case, value: float) -> None:
    case.inputs["inputs_embeds"] = case.inputs["inputs_embeds"].clone()
    case.inputs["inputs_embeds"][1, 2, 3] = value


def _cache_gone(case: Case) -> None:
    mask = torch.ones(BATCH, NEW, dtype=torch.long)
    mask[1, :2] = 0
    case.inputs |= {CACHE: None, "use_cache": False, "attention_mask": mask}


def _text_row(case: Case) -> None:
    """Four rows of positions: those of the text before temporal, height and width."""
    ids = case.inputs["position_ids"]
    case.inputs["position_ids"] = torch.cat([ids[:1], ids + 1])


def _masks_by_layer(case: Case) -> None:
    """One mask per layer type, as `generate` prepares them, closed for every third key."""
    cache, keys = case.inputs[CACHE], case.inputs["attention_mask"].shape[1]
    kept = cache.layers[0].get_mask_sizes(NEW)[0]
    full = torch.ones(BATCH, 1, NEW, keys, dtype=torch.bool).tril(keys - NEW)
    full[..., ::3] = False
    case.inputs["attention_mask"] = {"full_attention": full, "sliding_attention": full[..., -kept:].clone()}


HAZARDS = [
    Hazard("mask left out", "No mask after calls with one.", put(attention_mask=None), chunk, forward),
    Hazard(
        "mask given",
        "A mask after calls without one.",
        lambda case: case.inputs.update(attention_mask=case.kept["mask"]),
        _without_mask,
        forward,
    ),
    Hazard("other padding", "The mask hides other tokens than before.", _other_padding, chunk, forward),
    Hazard(
        "mask of booleans",
        "The mask holds booleans instead of integers.",
        lambda case: case.inputs.update(attention_mask=case.inputs["attention_mask"].bool()),
        chunk,
        forward,
        harmless="says the same",
    ),
    Hazard(
        "4D mask of floats",
        "The same, to be added to the scores.",
        lambda c: _four_dims(c, torch.float),
        chunk,
        forward,
    ),
    Hazard(
        "masks by layer type",
        "A mapping from layer type to mask, as `generate` hands over.",
        _masks_by_layer,
        chunk,
        forward,
        only=("gemma3",),
    ),
    Hazard(
        "mask too short",
        "The mask misses the last two keys.",
        lambda case: case.inputs.update(attention_mask=case.inputs["attention_mask"][:, :-2]),
        chunk,
        forward,
    ),
    Hazard(
        "positions left out",
        "No positions after calls with them, which began elsewhere.",
        lambda case: case.inputs.update(position_ids=None),
        lambda case: (chunk(case), case.inputs.update(position_ids=case.inputs["position_ids"] * 2))[1],
        forward,
    ),
    Hazard(
        "positions of one row",
        "Positions of shape (1, sequence) for the whole batch, other ones than before.",
        lambda case: case.inputs.update(position_ids=case.inputs["position_ids"][..., :1, :] * 3),
        chunk,
        forward,
    ),
    Hazard(
        "positions shifted",
        "Tokens stand at other positions.",
        lambda case: case.inputs.update(position_ids=case.inputs["position_ids"] * 2 + 3),
        chunk,
        forward,
    ),
    Hazard(
        "packed sequences",
        "Positions restart in the middle of a row without a mask: Transformers takes that for two sequences.",
        lambda case: case.inputs.update(position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])),
        _plain_positions,
        forward,
    ),
    Hazard(
        "positions in two dims",
        "Positions of text where temporal, height and width were given.",
        lambda case: case.inputs.update(position_ids=positions(case, BATCH, 3, NEW)[2]),
        chunk,
        forward,
        only=("qwen2_5_vl",),
    ),
    Hazard(
        "positions with a text row",
        "Four rows of positions after three.",
        _text_row,
        chunk,
        forward,
        only=("qwen2_5_vl",),
    ),
    Hazard(
        "embeddings instead of ids",
        "The caller hands over embeddings, of other tokens.",
        lambda case: (case.inputs.update(input_ids=case.inputs["input_ids"].flip(1)), _to_embeddings(case)),
        chunk,
        forward,
    ),
    Hazard(
        "ids and embeddings",
        "Both at once, which the model refuses.",
        lambda case: case.inputs.update(input_ids=torch.ones(BATCH, NEW, dtype=torch.long)),
        _embeddings,
        forward,
    ),
    Hazard(
        "ids as int32",
        "Token ids of another dtype, other ones than before.",
        lambda case: case.inputs.update(input_ids=case.inputs["input_ids"].flip(1).int()),
        chunk,
        forward,
    ),
    Hazard(
        "id outside the vocabulary",
        "A mistake of the caller's, which the model refuses.",
        lambda case: case.inputs.update(input_ids=case.inputs["input_ids"] + 1000),
        chunk,
        forward,
    ),
    Hazard(
        "strided embeddings",
        "Embeddings that are not contiguous, of other tokens.",
        _expand_embeddings,
        _embeddings,
        forward,
    ),
    Hazard(
        "gradients of the input",
        "Embeddings that require a gradient after ones that do not.",
        lambda case: case.inputs["inputs_embeds"].requires_grad_(),
        _embeddings,
        _embedding_gradient,
    ),
    Hazard("NaN", "A NaN in one token's embedding.", lambda c: _poison(c, float("nan")), _embeddings, forward),
    Hazard("no cache after a cache", "A call without a cache.", _cache_gone, chunk, forward),
    Hazard(
        "cache after none",
        "A call with a cache after calls without one.",
        lambda case: case.inputs.update(case.kept["with cache"], **dict.fromkeys(set(case.inputs) - _CACHED)),
        _without_cache,
        forward,
    ),
    Hazard(
        "hidden states asked for",
        "`output_hidden_states=True` in a call.",
        put(output_hidden_states=True),
        chunk,
        forward,
    ),
    Hazard(
        "arguments by position",
        "The decoder's arguments without their names.",
        lambda case: case.kept.update({"by position": True}),
        chunk,
        _by_position,
        harmless="the same call",
    ),
    Hazard(
        "one tensor for two arguments",
        "The mask is also the positions.",
        lambda case: case.inputs.update(position_ids=case.inputs["attention_mask"]),
        prompt,
        forward,
    ),
]
_CACHED = {"input_ids", "attention_mask", "position_ids", CACHE, "use_cache"}
