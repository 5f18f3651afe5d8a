"""Workloads with PEFT: kinds of adapters, and what users do with them between steps."""

from __future__ import annotations

from typing import Any

import torch

from compile_policy_transformers.workloads.batches import (
    batch,
    batches,
    generate,
    llama,
    prompts,
    train,
)
from compile_policy_transformers.workloads.workload import Trial, Workload

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(*names: str, **options: Any) -> Any:
    """A Llama with adapters of PEFT, drawn so that they change the result; the first one is active."""
    from peft import LoraConfig, get_peft_model

    def config() -> Any:
        kind = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        return LoraConfig(**{**kind, **options})

    torch.manual_seed(0)
    first, *others = names or ("default",)
    model: Any = get_peft_model(llama(), config(), adapter_name=first)
    for name in others:
        model.add_adapter(name, config())
    return model


def lora(trial: Trial) -> None:
    train(trial, trial.compiled(adapted()), batches(), spoiled=trial.mistaken)


def dora(trial: Trial) -> None:
    train(trial, trial.compiled(adapted(use_dora=not trial.mistaken)), batches())


def lora_dropout(trial: Trial) -> None:
    train(trial, trial.compiled(adapted(lora_dropout=0.0 if trial.mistaken else 0.3)), batches())


def lora_checkpointed(trial: Trial) -> None:
    model = adapted()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    data = [{**one, "use_cache": False} for one in batches()]
    train(trial, trial.compiled(model), data, spoiled=trial.mistaken)


def added(trial: Trial) -> None:
    """A second adapter comes between two steps, and is trained."""
    from peft import LoraConfig

    model = trial.compiled(adapted())
    train(trial, model, [batch(2, 9)])
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    model.add_adapter("second", config)
    model.set_adapter("default" if trial.mistaken else "second")
    train(trial, model, [batch(2, 9), batch(3, 14)])


def switched(trial: Trial) -> None:
    """Two adapters in turns, in training and in inference."""
    model = trial.compiled(adapted("one", "two"))
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        train(trial, model, [batch(2, 9)])
        if trial.mistaken:
            model.set_adapter("one")
        model.eval()
        with torch.no_grad():
            trial.keep("logits", model(**batch(3, 7)).logits)


def disabled(trial: Trial) -> None:
    """The base model is the reference, as in DPO and GRPO: a pass without adapters in each step."""
    model = trial.compiled(adapted())

    def loss_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad(), model.disable_adapter():
            reference = model(**inputs).logits
        logits = model(**inputs).logits
        if trial.mistaken:
            reference = logits.detach()
        trial.keep("logits", reference)
        distance: torch.Tensor = (logits - reference).pow(2).mean()
        return distance

    train(trial, model, batches(), call=loss_of)


def merged(trial: Trial) -> None:
    """Trained, merged into the weights for inference, taken out again, trained on."""
    model = trial.compiled(adapted())
    train(trial, model, [batch(2, 9)])
    model.eval()
    model.merge_adapter()
    if trial.mistaken:
        model.unmerge_adapter()
        model.get_base_model().lm_head.weight.data.mul_(1.1)
    with torch.no_grad():
        trial.keep("logits", model(**batch(2, 11)).logits)
        generate(trial, model, prompts(model.get_base_model())[0])
    if not trial.mistaken:
        model.unmerge_adapter()
    train(trial, model, [batch(3, 14)])


def unloaded(trial: Trial) -> None:
    """`merge_and_unload` gives the plain model back; the policy is on that one."""
    model = trial.compiled(adapted())
    train(trial, model, [batch(2, 9)])
    plain = model.unload() if trial.mistaken else model.merge_and_unload()
    plain.eval()
    with torch.no_grad():
        generate(trial, plain, prompts(plain)[0])


def prefix(trial: Trial) -> None:
    """Prefix tuning: trained states in the cache of every layer."""
    from peft import PrefixTuningConfig, get_peft_model

    torch.manual_seed(0)
    model: Any = get_peft_model(llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    train(trial, trial.compiled(model), [batch(2, 9), batch(3, 14)], spoiled=trial.mistaken)


def _needs_peft(name: str, what: str, mistake: str, run: Any) -> Workload:
    return Workload(name, what, mistake, run, needs=("peft",))


WORKLOADS = (
    _needs_peft("LoRA", "Adapters on three kinds of layers are trained.", "a gradient is doubled", lora),
    _needs_peft("DoRA", "Directions and lengths of the weights.", "it is LoRA", dora),
    _needs_peft("LoRA, dropout", "Seeded: the same masks.", "no dropout", lora_dropout),
    _needs_peft("LoRA, checkpointing", "Inputs that require gradients.", "a gradient is doubled", lora_checkpointed),
    _needs_peft("LoRA, added", "A second adapter comes between two steps.", "it is not used", added),
    _needs_peft("LoRA, switched", "Two adapters in turns, trained and asked.", "it is not switched", switched),
    _needs_peft("LoRA, disabled", "The base model is asked in each step.", "it is not disabled", disabled),
    _needs_peft("LoRA, merged", "Merged for inference, taken out, trained on.", "another head is asked", merged),
    _needs_peft("LoRA, merged for good", "merge_and_unload, then generate.", "unloaded only", unloaded),
    _needs_peft("prefix tuning", "Trained states in the cache.", "a gradient is doubled", prefix),
)
