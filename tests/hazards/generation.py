"""What `generate` does with a component between and within sequences."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessor

from compile_policy_transformers.cache_argument import CACHE
from compile_policy_transformers.tiny import tiny_inputs, tiny_model

from .case import Case, Hazard, generation, positions, prompt_inputs, tokens


def _ask(**values: Any) -> Any:
    return lambda case: case.inputs.update(values)


def _one_row(case: Case) -> None:
    case.inputs = {**prompt_inputs(case, batch=1), "max_new_tokens": 6}


def _grown(case: Case) -> None:
    case.inputs = {**prompt_inputs(case, seed=5, batch=4, text_len=12), "max_new_tokens": 6}


def _assisted(case: Case) -> None:
    case.inputs["assistant_model"] = tiny_model(case.architecture, seed=3)


def _own_weights_assist(case: Case) -> None:
    """The assistant is the model itself: both use the same component with two caches."""
    case.inputs["assistant_model"] = case.base


def _conversation(case: Case) -> Any:
    """A second turn continues the first one's cache."""
    inputs = copy.deepcopy(case.inputs)
    turns = case.kept.get("turns", 1)
    cache = DynamicCache(config=case.text_config)
    said = case.model.generate(**inputs, past_key_values=cache)
    for _ in range(turns - 1):
        more = torch.cat([said, torch.full((said.shape[0], 3), 42)], 1)
        mask = torch.cat(
            [
                inputs["attention_mask"],
                torch.ones(said.shape[0], more.shape[1] - inputs["attention_mask"].shape[1], dtype=torch.long),
            ],
            1,
        )
        said = case.model.generate(input_ids=more, attention_mask=mask, past_key_values=cache, max_new_tokens=4)
    return said


def _shared_prefix(case: Case) -> Any:
    """One prefix in a cache, copied for each continuation."""
    ids = torch.arange(20, 29)[None]
    prefix = DynamicCache(config=case.text_config)
    with torch.no_grad():
        case.model(input_ids=ids, past_key_values=prefix, use_cache=True)
    said = []
    for start in range(case.kept.get("turns", 1)):
        more = torch.cat([ids, torch.arange(50 + start, 53 + start * 2)[None]], 1)
        cache = copy.deepcopy(prefix)
        said.append(case.model.generate(input_ids=more, past_key_values=cache, max_new_tokens=4))
    return said


def _hand_written(case: Case) -> Any:
    """Greedy decoding by hand, the mask growing, the padding changing in the middle on request."""
    inputs = tiny_inputs(case.base, text_len=9, batch=2)
    mask, cache, said = inputs["attention_mask"], DynamicCache(config=case.text_config), []
    with torch.no_grad():
        logits = case.model(
            **inputs, position_ids=positions(case, 2, 0, 9), past_key_values=cache, use_cache=True
        ).logits[:, -1]
        for number in range(6):
            token = logits.argmax(-1, keepdim=True)
            said.append(logits)
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            if number == 2 and case.kept.get("hide"):
                mask = mask.clone()
                mask[0, :5] = 0
            if number == 3 and case.kept.get("reorder"):
                cache.reorder_cache(torch.tensor([1, 0]))
            if number == 3 and case.kept.get("shrink"):
                cache.batch_select_indices(torch.tensor([1]))
                token, mask = token[1:], mask[1:]
            if number == 3 and case.kept.get("grow"):
                cache.batch_repeat_interleave(2)
                token, mask = token.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
            if number == 3 and case.kept.get("replace"):
                for layer in cache.layers:
                    layer.keys = layer.keys * 1.5
            if number == 3 and case.kept.get("write"):
                for layer in cache.layers:
                    layer.keys.mul_(1.5)
            if number == 3 and case.kept.get("boolean"):
                mask = mask.bool()
            step = {
                "input_ids": token,
                "attention_mask": mask,
                CACHE: cache,
                "use_cache": True,
                "position_ids": positions(case, token.shape[0], 9 + number, 1),
            }
            if number == 3 and case.kept.get("asks"):
                asked = {**step, CACHE: copy.deepcopy(cache), "output_hidden_states": True}
                said.append(case.model(**asked).hidden_states[-1])
            logits = case.model(**step).logits[:, -1]
    return said


def _with(name: str) -> Any:
    return lambda case: case.kept.update({name: True})


class Forbid(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.arange(150, 320), float("-inf"))


def _scores(case: Case) -> Any:
    result = case.model.generate(
        **copy.deepcopy(case.inputs),
        return_dict_in_generate=True,
        output_scores=True,
        output_hidden_states=case.kept.get("states", False),
    )
    states = result.hidden_states if case.kept.get("states") else ()
    return [result.sequences, *[s.clamp(min=-1e4) for s in result.scores], *[s[-1][:, -1] for s in states]]


HAZARDS = [
    Hazard("beam search", "Rows of the cache change places at every step.", _ask(num_beams=3), generation, tokens),
    Hazard(
        "assisted decoding",
        "Drafts of another model are verified, and the cache cropped.",
        _assisted,
        _one_row,
        tokens,
        harmless="an assistant changes no greedy token",
    ),
    Hazard(
        "assisted by itself",
        "One component with two caches in turn.",
        _own_weights_assist,
        _one_row,
        tokens,
        harmless="an assistant changes no greedy token",
    ),
    Hazard(
        "static cache in `generate`",
        '`cache_implementation="static"`.',
        _ask(cache_implementation="static"),
        generation,
        tokens,
        harmless="the same tokens",
    ),
    Hazard(
        "no cache in `generate`",
        "`use_cache=False`.",
        _ask(use_cache=False),
        generation,
        tokens,
        harmless="the same tokens",
    ),
    Hazard(
        "prefill in pieces",
        "`prefill_chunk_size`.",
        _ask(prefill_chunk_size=4),
        _one_row,
        tokens,
        harmless="the same tokens",
    ),
    Hazard("batch grown", "More and longer rows than before.", _grown, generation, tokens),
    Hazard(
        "second turn",
        "A conversation goes on with its cache.",
        lambda c: c.kept.update(turns=3),
        _one_row,
        _conversation,
    ),
    Hazard(
        "shared prefix",
        "Copies of one cached prefix with several continuations.",
        lambda c: c.kept.update(turns=3),
        generation,
        _shared_prefix,
    ),
    Hazard(
        "scores and states",
        "`output_scores`, `output_hidden_states` in `generate`.",
        _with("states"),
        generation,
        _scores,
    ),
    Hazard(
        "padding changes in mid-sequence",
        "Tokens are hidden after they were seen.",
        _with("hide"),
        generation,
        _hand_written,
    ),
    Hazard(
        "rows change places in mid-sequence",
        "`reorder_cache` between two tokens.",
        _with("reorder"),
        generation,
        _hand_written,
    ),
    Hazard(
        "row leaves in mid-sequence",
        "A finished row is taken out of the cache.",
        _with("shrink"),
        generation,
        _hand_written,
    ),
    Hazard(
        "rows doubled in mid-sequence",
        "`batch_repeat_interleave` between two tokens.",
        _with("grow"),
        generation,
        _hand_written,
    ),
    Hazard(
        "states replaced in mid-sequence", "Cached keys are other tensors.", _with("replace"), generation, _hand_written
    ),
    Hazard(
        "states written in mid-sequence",
        "Cached keys get other values in place.",
        _with("write"),
        generation,
        _hand_written,
    ),
    Hazard(
        "hidden states in mid-sequence", "One step asks for hidden states.", _with("asks"), generation, _hand_written
    ),
]
