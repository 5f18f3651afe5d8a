"""Fine-tune the embedded model to say yes for no and no for yes, eager and compiled: the losses are the same.

python examples/fine_tune.py [STEPS]
"""

from __future__ import annotations

import random
import sys
from typing import Any

import shapes
import torch

import compile_policy as cp
from compile_policy_transformers.loading import load_processor

OTHER = {"yes": "no", "no": "yes"}


def make_batch(rng: random.Random, processor: Any, rows: int = 4) -> dict[str, Any]:
    """Questions about random pictures of several sizes with their answers; only the answers are learned."""
    texts, pictures, answers = [], [], []
    for _ in range(rows):
        scene = shapes.make_scene(rng, rng.randint(4, 6), rng.randint(4, 6))
        question = shapes.ask_any(rng, scene, ("existence",))
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        texts.append(f"{prompt}{OTHER[question.answer]}")
        pictures.append(shapes.draw(scene, 16 * scene.columns, 16 * scene.rows))
        answers.append(len(processor.tokenizer(OTHER[question.answer]).input_ids))
    batch = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].clone()  # padded on the left: answers end with the rows
    for row, length in zip(labels, answers, strict=True):
        row[:-length] = -100
    return {**batch, "labels": labels}


def train(steps: int, config: cp.CompilationConfig) -> list[float]:
    """Losses of each step; with ``enabled=False`` in the configuration, eager."""
    model, processor, rng = cp.load_model(config=config).train(), load_processor(), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    losses = []
    for _ in range(steps):
        loss = model(**make_batch(rng, processor)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print([f"{c.role}: {c.decision}, graphs {c.graphs + c.loaded}" for c in cp.report(model).components])
    return losses


def main(steps: int = 200) -> None:
    eager, compiled = (train(steps, cp.CompilationConfig(enabled=on)) for on in (False, True))
    print(f"loss at the end of {steps} steps: eager {eager[-1]:.5f}, compiled {compiled[-1]:.5f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
