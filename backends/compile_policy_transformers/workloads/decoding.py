"""Workloads of `generate`: how tokens are chosen, and what else it is asked for."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from compile_policy_transformers.tiny import tiny_model
from compile_policy_transformers.workloads.batches import generate, llama, prompts, text
from compile_policy_transformers.workloads.caches import asked
from compile_policy_transformers.workloads.workload import Trial, Workload


def beams(trial: Trial) -> None:
    asked(trial, trial.compiled(llama()), num_beams=3)


def sampled(trial: Trial) -> None:
    """Three answers to each prompt, drawn with a seed."""
    asked(trial, trial.compiled(llama()), do_sample=True, temperature=0.8, top_k=20, num_return_sequences=3)


def guided(trial: Trial) -> None:
    """A second call without the prompt in each step."""
    asked(trial, trial.compiled(llama()), guidance_scale=1.5)


def looked_up(trial: Trial) -> None:
    """Tokens are guessed from the prompt and checked, several at once."""
    model = trial.compiled(llama())
    for seed, tokens in enumerate((5, 8)):
        ids = text(1, tokens, seed).repeat(1, 2)
        _speculate(trial, model, ids, prompt_lookup_num_tokens=3)


def assisted(trial: Trial) -> None:
    """A smaller model guesses; both are compiled."""
    model, assistant = trial.compiled(llama()), trial.compiled(llama(seed=1))
    for seed, tokens in enumerate((5, 8)):
        _speculate(trial, model, text(1, tokens, seed), assistant_model=assistant)


def assisted_sliding(trial: Trial) -> None:
    """The same with layers that remember a window."""
    model, assistant = trial.compiled(tiny_model("gemma2")), tiny_model("gemma2", seed=1)
    for seed, tokens in enumerate((5, 8)):
        _speculate(trial, model, text(1, tokens, seed), assistant_model=assistant)


def _speculate(trial: Trial, model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> None:
    if trial.mistaken:
        ids = ids.flip(1)
    generate(trial, model, {"input_ids": ids}, tokens=12, **options)


def watched(trial: Trial) -> None:
    """Hidden states of every step."""
    model = trial.compiled(llama())
    for inputs in prompts(model):
        found = generate(trial, model, inputs, output_hidden_states=True)
        for step in found.hidden_states:
            trial.keep("hidden states", *(step[:-1] if trial.mistaken else step))


def attentive(trial: Trial) -> None:
    """Attention weights, which need attention written out."""
    model = llama()
    model.set_attn_implementation("eager")
    trial.compiled(model)
    for inputs in prompts(model):
        found = generate(trial, model, inputs, output_attentions=True)
        for step in found.attentions:
            trial.keep("attention weights", *(step[:-1] if trial.mistaken else step))


class _Odd(LogitsProcessor):
    """Lets odd tokens through alone."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        even = torch.arange(scores.shape[-1]) % 2 == 0
        return scores.masked_fill(even, float("-inf"))


class _Sixth(StoppingCriteria):
    """Ends where six tokens more than at its first question are there."""

    def __init__(self) -> None:
        self.first = 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.first = self.first or input_ids.shape[1]
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.first + 5)


def controlled(trial: Trial) -> None:
    """Processors and criteria of the user's, with state."""
    model = trial.compiled(llama())
    for inputs in prompts(model):
        processors = LogitsProcessorList([] if trial.mistaken else [_Odd()])
        criteria = StoppingCriteriaList([_Sixth()])
        generate(trial, model, inputs, tokens=8, logits_processor=processors, stopping_criteria=criteria)


def embedded(trial: Trial) -> None:
    """Embeddings instead of tokens."""
    model = trial.compiled(llama())
    for inputs in prompts(model):
        ids = inputs.pop("input_ids")
        embeddings = model.get_input_embeddings()(ids).detach() * (0.5 if trial.mistaken else 1.0)
        generate(trial, model, {**inputs, "inputs_embeds": embeddings})


@torch.no_grad()
def scored(trial: Trial) -> None:
    """Log probabilities of given answers, the last positions alone, as reward models and rankers ask for them."""
    model = trial.compiled(llama())
    for inputs in prompts(model):
        if trial.mistaken:
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        logits = model(**inputs, logits_to_keep=3).logits
        trial.keep("log probabilities", logits.log_softmax(-1))


_PADDING = "padding is seen"
WORKLOADS = (
    Workload("beam search", "Three beams; caches are reordered.", _PADDING, beams),
    Workload("sampling", "Three seeded answers to each prompt.", _PADDING, sampled),
    Workload("guidance", "guidance_scale: two calls a step.", _PADDING, guided),
    Workload("prompt lookup", "Guesses from the prompt are checked.", "the prompt is reversed", looked_up),
    Workload("assisted decoding", "A second model guesses; both compiled.", "the prompt is reversed", assisted),
    Workload(
        "assisted decoding, sliding windows", "A Gemma 2 checks guesses.", "the prompt is reversed", assisted_sliding
    ),
    Workload("hidden states", "output_hidden_states of every step.", "one is left out", watched),
    Workload("attention weights", "output_attentions of every step.", "one is left out", attentive),
    Workload("processors and criteria", "Objects of the user's choose and stop.", "none chooses", controlled),
    Workload("embeddings", "generate from inputs_embeds.", "they are halved", embedded),
    Workload("scoring", "logits_to_keep; no tokens are made.", _PADDING, scored),
)
