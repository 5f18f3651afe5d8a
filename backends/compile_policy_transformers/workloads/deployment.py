"""Workloads around a model: threads, offload, export, copies, pickles, weights that are exchanged."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from compile_policy_transformers.workloads.batches import generate, llama, prompts, text
from compile_policy_transformers.workloads.caches import asked
from compile_policy_transformers.workloads.workload import Trial, Workload


def threads(trial: Trial) -> None:
    """Two threads ask one model at the same time, three times each; the first calls compile."""
    model = trial.compiled(llama())
    asks = [prompts(model)[number % 2] for number in range(6)]

    def one(inputs: Any) -> torch.Tensor:
        mask = torch.ones_like(inputs["attention_mask"]) if trial.mistaken else inputs["attention_mask"]
        with torch.no_grad():
            found: torch.Tensor = model.generate(input_ids=inputs["input_ids"], attention_mask=mask, max_new_tokens=8)
        return found

    with ThreadPoolExecutor(2) as pool:
        trial.keep("tokens", *pool.map(one, asks))


def offloaded(trial: Trial) -> None:
    """accelerate keeps the layers on disk and brings each one in for its call."""
    from accelerate import dispatch_model

    model = llama()
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    parts |= {f"model.layers.{i}": "disk" for i in range(len(model.model.layers))}
    dispatch_model(model, parts, main_device="cpu", offload_dir=str(trial.folder))
    asked(trial, trial.compiled(model))


def exported(trial: Trial) -> None:
    """`torch.export` of a model that the policy is on; the exported program is what is run."""
    model = trial.compiled(llama())
    ids = text(2, 9)
    with torch.no_grad():
        trial.keep("logits", model(ids, use_cache=False).logits)
        tokens = torch.export.Dim("tokens", min=2, max=64)
        program: Any = torch.export.export(
            model, (ids,), {"use_cache": False}, dynamic_shapes={"input_ids": {1: tokens}, "use_cache": None}
        )
        for length in (9, 14):
            given = text(2, length).flip(1) if trial.mistaken else text(2, length)
            trial.keep("logits", program.module()(given, use_cache=False).logits)


def copied(trial: Trial) -> None:
    """A deep copy, trained no further; the model itself is changed after it."""
    model = trial.compiled(llama())
    asked(trial, model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(0.5)
    asked(trial, other if not trial.mistaken else model)
    asked(trial, model)


def pickled(trial: Trial) -> None:
    """Pickled after its first calls, and read again."""
    model = trial.compiled(llama())
    asked(trial, model)
    other = pickle.loads(pickle.dumps(model))
    if trial.mistaken:
        other.model.layers[0].self_attn.q_proj.weight.data.mul_(0.5)
    asked(trial, other)


def reloaded(trial: Trial) -> None:
    """`save_pretrained`, `from_pretrained`, and the policy again."""
    model = trial.compiled(llama())
    asked(trial, model)
    model.save_pretrained(trial.folder)
    other = AutoModelForCausalLM.from_pretrained(trial.folder, dtype=torch.float32).eval()
    other.generation_config = copy.deepcopy(model.generation_config)
    if trial.mistaken:
        other.model.layers[0].self_attn.q_proj.weight.data.mul_(0.5)
    asked(trial, trial.compiled(other))


def exchanged(trial: Trial) -> None:
    """`load_state_dict` between two answers: other weights in the same tensors, and in others (``assign``)."""
    model = trial.compiled(llama())
    asked(trial, model)
    for seed in (1, 2):
        weights = llama(seed=0 if trial.mistaken else seed).state_dict()
        model.load_state_dict(weights, assign=seed == 2)
        asked(trial, model)


def resized(trial: Trial) -> None:
    """New tokens come between two answers."""
    model = trial.compiled(llama())
    asked(trial, model)
    torch.manual_seed(0)
    model.resize_token_embeddings(model.config.vocab_size + (0 if trial.mistaken else 8))
    generate(trial, model, {"input_ids": text(2, 9)})


def moved(trial: Trial) -> None:
    """Another dtype after the first answer, and back."""
    model = trial.compiled(llama())
    asked(trial, model)
    model.to(torch.float64)
    asked(trial, model)
    if trial.mistaken:
        model.to(torch.bfloat16)
    model.to(torch.float32)
    asked(trial, model)


_PADDING = "padding is seen"
_HALVED = "a weight is halved"
WORKLOADS = (
    Workload("two threads", "Both ask one model at once.", _PADDING, threads),
    Workload("offload", "accelerate: layers on disk.", _PADDING, offloaded, needs=("accelerate",)),
    Workload("torch.export", "Exported with the policy on, run for two lengths.", "the prompt is reversed", exported),
    Workload("deepcopy", "Of a model in use.", "it is no copy", copied),
    Workload("pickle", "Of a model in use.", _HALVED, pickled),
    Workload("save_pretrained", "Saved, loaded, compiled again.", _HALVED, reloaded),
    Workload("load_state_dict", "Other weights, in place and assigned.", "the old weights", exchanged),
    Workload("new tokens", "resize_token_embeddings between answers.", "none are added", resized),
    Workload("another dtype", "float64 and back between answers.", "through bfloat16", moved),
)
