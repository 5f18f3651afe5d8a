"""Workloads of the training loops that users have: Trainer, accelerate, TRL's supervised and online ones."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from compile_policy_transformers.workloads.batches import (
    Batch,
    batch,
    double_gradient,
    llama,
    sgd,
    text,
)
from compile_policy_transformers.workloads.workload import LOW_PRECISION, Trial, Workload

#: Tokens of the examples, in order: batches of two differ in length.
LENGTHS = (5, 9, 7, 4, 11, 6, 8, 10)
WORDS = 320


class _Watch(TrainerCallback):
    """Keeps gradients before each step, and some of what is logged."""

    def __init__(self, trial: Trial, *logged: str) -> None:
        self.trial = trial
        self.logged = logged

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trial.mistaken:
            double_gradient(kwargs["model"])
        self.trial.keep_gradients(kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name in self.logged:
            if name in (logs or {}):
                self.trial.keep(name, torch.tensor(float(logs[name])))


def examples() -> list[Batch]:
    rows = [text(1, n, seed)[0].tolist() for seed, n in enumerate(LENGTHS)]
    return [{"input_ids": row, "labels": list(row)} for row in rows]


def padded_on_the_right(rows: list[Batch]) -> Batch:
    """Rows of a batch to one length."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    return {
        "input_ids": torch.tensor([filled(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.tensor([filled([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([filled(row["labels"], -100) for row in rows]),
    }


def arguments(trial: Trial, **options: Any) -> Batch:
    """Arguments that every kind of trainer takes: three steps of SGD on the CPU, in order, quietly."""
    chosen = {
        "output_dir": str(trial.folder / "trainer"),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return {**chosen, **options}


def trainer(trial: Trial, collate: Any = padded_on_the_right, **options: Any) -> None:
    model = trial.compiled(llama())
    chosen = arguments(trial, eval_strategy="steps", eval_steps=2, **options)
    loop: Any = Trainer(
        model=model,
        args=TrainingArguments(**chosen),
        train_dataset=examples(),
        eval_dataset=examples()[:3],
        data_collator=collate,
        callbacks=[_Watch(trial, "loss", "eval_loss", "grad_norm")],
    )
    _quietly(loop)
    trial.keep_weights(model)


def _quietly(loop: Any) -> None:
    loop.remove_callback(PrinterCallback)
    loop.train()


def plain(trial: Trial) -> None:
    trainer(trial, gradient_accumulation_steps=2)


def compiling(trial: Trial) -> None:
    """Trainer compiles the whole model as well; the policy makes room for that."""
    trainer(trial, torch_compile=trial.way != "eager")


def in_bf16(trial: Trial) -> None:
    trainer(trial, bf16=True)


def checkpointed(trial: Trial) -> None:
    trainer(trial, gradient_checkpointing=True)


def padding_free(trial: Trial) -> None:
    trainer(trial, DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt"))


def accelerated(trial: Trial) -> None:
    """A loop by hand with accelerate, two batches a step."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    plain_model = trial.compiled(llama()).train()
    model, optimizer = accelerator.prepare(plain_model, sgd(plain_model))
    for seed in range(2):
        for one in (batch(2, 9, seed), batch(3, 14, seed)):
            with accelerator.accumulate(model):
                loss = model(**one).loss
                accelerator.backward(loss)
                trial.keep("losses", loss)
                if accelerator.sync_gradients and trial.mistaken:
                    double_gradient(model)
                if accelerator.sync_gradients:
                    trial.keep_gradients(model)
                optimizer.step()
                optimizer.zero_grad()
    trial.keep_weights(plain_model)


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of numbered words, one for each token of the tiny models."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def texts() -> list[str]:
    return [" ".join(f"w{i}" for i in text(1, n, seed)[0].tolist()) for seed, n in enumerate(LENGTHS)]


def supervised(trial: Trial, **options: Any) -> None:
    """TRL's SFTTrainer with its own defaults, checkpointing among them, but in float32."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = trial.compiled(llama())
    loop = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments(trial, bf16=False, **options)),
        train_dataset=Dataset.from_dict({"text": texts()}),
        processing_class=words(),
        callbacks=[_Watch(trial, "loss", "grad_norm")],
    )
    _quietly(loop)
    trial.keep_weights(model)


def online(trial: Trial) -> None:
    """TRL's GRPOTrainer: answers are drawn, rewarded, trained on, and drawn again by the new weights."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def variety(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(set(one.split()))) + len(one) / 100 for one in completions]

    model = trial.compiled(llama())
    chosen = arguments(trial, bf16=False, num_generations=2, max_completion_length=5)
    loop = GRPOTrainer(
        model=model,
        reward_funcs=variety,
        args=GRPOConfig(**chosen),
        train_dataset=Dataset.from_dict({"prompt": texts()[:4]}),
        processing_class=words(),
        callbacks=[_Watch(trial, "reward", "grad_norm")],  # the loss is rounding: its terms cancel
    )
    _quietly(loop)
    trial.keep_weights(model)


_DOUBLED = "a gradient is doubled"
_TRAINER = ("accelerate",)
_TRL = ("accelerate", "datasets", "trl")
WORKLOADS = (
    Workload("Trainer", "Accumulation, evaluation in between.", _DOUBLED, plain, needs=_TRAINER),
    Workload("Trainer, torch_compile", "torch_compile=True as well.", _DOUBLED, compiling, needs=_TRAINER),
    Workload("Trainer, bf16", "Products in bfloat16.", _DOUBLED, in_bf16, LOW_PRECISION, _TRAINER),
    Workload("Trainer, checkpointing", "gradient_checkpointing=True.", _DOUBLED, checkpointed, needs=_TRAINER),
    Workload("Trainer, padding-free", "Packed rows.", _DOUBLED, padding_free, needs=_TRAINER),
    Workload("accelerate", "A loop by hand, two batches a step.", _DOUBLED, accelerated, needs=_TRAINER),
    Workload("SFTTrainer", "TRL's defaults in float32.", _DOUBLED, supervised, needs=_TRL),
    Workload("GRPOTrainer", "Drawn, rewarded, trained on, drawn again.", _DOUBLED, online, needs=_TRL),
)
