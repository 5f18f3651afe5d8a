"""How often is the embedded model right? Exact answers on 500 pictures that it has never seen.

Half the pictures have one of the sizes of the training, half a size that never occurred in it ("size" is what the
processor makes of a picture: the grid of image tokens). Each picture gets one question of every kind that it admits,
through the processor and `generate`, as a user would ask it, and one more question is put on it and another picture
together, about one of the two.

    python benchmarks/shapes_accuracy.py            # prints a table
    python benchmarks/shapes_accuracy.py --write    # and puts it in benchmarks/RESULTS.md
"""

import argparse
import random
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import shapes  # noqa: E402
from results import write_section  # noqa: E402
from train_shapes_vlm import SEEN, UNSEEN, random_picture  # noqa: E402

MODEL = ROOT / "backends" / "compile_policy_transformers" / "embedded"
TWO = "one of two pictures"


def held_out(pictures: int):
    """(of a seen size or not, pictures, question) triples. The generator's seed is a word, those of the training are
    numbers, so the two never draw the same sequence."""
    rng = random.Random("held out")
    drawn = []
    for index in range(pictures):
        seen = index % 2 == 0
        scene = shapes.make_scene(rng, *rng.choice(SEEN if seen else UNSEEN))
        drawn.append((scene, random_picture(rng, scene)))
        for kind in shapes.KINDS:
            if question := shapes.ask(rng, scene, kind):
                yield seen, [drawn[-1][1]], question
        album = [drawn[index - 2 if index > 1 else index], drawn[index]]
        which = rng.randrange(2)
        question = shapes.in_picture(shapes.ask_any(rng, album[which][0]), which)
        yield seen, [picture for _, picture in album], replace(question, kind=TWO)


def conversation(pictures: list, text: str) -> list[dict]:
    images = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


@torch.inference_mode()
def answers(model, processor, asked: list[tuple], batch: int) -> list[str]:
    """One answer for each (seen, pictures, question), `batch` of them at a time, padded on the left."""
    said = []
    for start in range(0, len(asked), batch):
        chats = [conversation(pictures, question.text) for _, pictures, question in asked[start : start + batch]]
        inputs = processor.apply_chat_template(
            chats,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        said += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def table(asked: list[tuple], said: list[str]) -> str:
    hits = defaultdict(list)
    for (seen, _, question), answer in zip(asked, said, strict=True):
        for kind in (question.kind, "all"):
            hits[kind, seen].append(answer == question.answer)
    lines = ["| question | sizes seen in training | sizes not seen |", "|---|---|---|"]
    for kind in (*shapes.KINDS, TWO, "all"):
        lines.append(f"| {kind} | {share(hits[kind, True])} | {share(hits[kind, False])} |")
    return "\n".join(lines)


def share(hits: list[bool]) -> str:
    return f"{100 * sum(hits) / len(hits):.1f}% of {len(hits)}" if hits else "none asked"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--write", action="store_true", help="put the table in benchmarks/RESULTS.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    processor = AutoProcessor.from_pretrained(options.model)
    asked = list(held_out(options.pictures))
    text = table(asked, answers(model, processor, asked, options.batch))
    print(text)
    if options.write:
        about = f"Exact answers on {options.pictures} held-out pictures, {options.dtype}, greedy decoding"
        rerun = "`python benchmarks/shapes_accuracy.py --write`"
        write_section("shapes_accuracy", "Does the embedded model answer right?", f"{about} ({rerun}).\n\n{text}")


if __name__ == "__main__":
    main()
