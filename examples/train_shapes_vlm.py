"""Train the small vision-language model that is embedded in this project, from nothing, on one CPU thread.

The model is a Qwen2.5-VL in miniature: an image tower that takes pictures of any size, and a language model. The
pictures and questions come from `shapes.py`, drawn anew for each step, so no picture is seen twice.

    python examples/train_shapes_vlm.py --out DIR --minutes 50

Training has two stages. First the image tower alone learns, through dense heads that are thrown away afterwards, to
say of each image token which shape and colour cover it and where their centre lies. (An earlier recipe, with patches
of 14 pixels and no such stage, learned colour and count and left shape at chance.) Then everything learns together:
eight questions behind each picture, at times behind two pictures. The saved weights are the running average, in
bfloat16.

The embedded weights took 4532 steps of 32 pictures, 50 minutes on one thread of a core shared with other work, with
restarts from the checkpoints at steps 3000 and 4000. The learning rate follows the clock, so another run gives other
weights. Run again with the same DIR, the script goes on from the last checkpoint.
Sizes in `UNSEEN` never occur in training; `benchmarks/shapes_accuracy.py` asks about them.
"""

import argparse
import copy
import functools
import itertools
import random
import time
from pathlib import Path

import numpy as np
import shapes
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    GenerationConfig,
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

PATCH, CELL = 8, 16  # pixels; a cell is 2 x 2 patches and becomes one image token
MIN_PIXELS, MAX_PIXELS = 64 * 64, 112 * 112
SIZES = [(c, r) for c in range(4, 9) for r in range(4, 9) if c * r <= 49]  # columns, rows
UNSEEN = [(7, 4), (4, 7), (6, 5), (5, 6), (7, 6), (6, 7), (8, 5), (5, 8)]
SEEN = [size for size in SIZES if size not in UNSEEN]

SPECIAL = ["<pad>", "<unk>", "<eos>", "<user>", "<assistant>", "<image>", "<video>", "<vision_start>", "<vision_end>"]
PAD, UNK, EOS, USER, ASSISTANT, IMAGE, VIDEO, VISION_START, VISION_END = range(9)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}
{%- if message.role == 'assistant' -%}<assistant>{%- else -%}<user>{%- endif -%}
{%- for part in parts if part.type == 'image' -%}<vision_start><image><vision_end>{%- endfor -%}
{%- for part in parts if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- if message.role == 'assistant' -%}<eos>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}"""

QUESTIONS = 8  # a sequence
BATCH = 32  # pictures
PAIRS = 0.35  # share of the steps with two pictures a sequence
TWO = "one of two pictures"
ASKED = (*shapes.KINDS, "count some", "position")  # the two that take longest to learn are asked twice as often


# The model and its processor


def build_processor() -> PaddleOCRVLProcessor:
    """A word-level tokenizer and the Qwen image processor. `PaddleOCRVLProcessor` joins the two without a video
    processor (which would need torchvision) and returns the `mm_token_type_ids` that the 2D positions rely on."""
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=2,
        temporal_patch_size=1,
        size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return PaddleOCRVLProcessor(images, build_tokenizer(), chat_template=CHAT_TEMPLATE)


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *sorted(vocabulary())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=512,
    )


def vocabulary() -> set[str]:
    """Every word of every question and answer, found by asking many of them."""
    rng = random.Random(0)
    words = set()
    for _ in range(4000):
        question = shapes.ask_any(rng, shapes.make_scene(rng, 5, 5))
        for text in (question.text, question.answer, shapes.in_picture(question, rng.randrange(2)).text):
            words |= set(text.replace("?", " ?").split())
    return words


def build_model(vocab_size: int) -> Qwen2_5_VLForConditionalGeneration:
    """About 1.5 million parameters. The small rotary bases suit grids of at most 16 patches a side."""
    vision = {
        "depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 128,
        "patch_size": PATCH, "temporal_patch_size": 1, "spatial_merge_size": 2, "window_size": 1024,
        "fullatt_block_indexes": [0, 1, 2, 3], "initializer_range": 0.06,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    }  # fmt: skip
    text = {
        "vocab_size": vocab_size, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.06,
        "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [4, 6, 6]},
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, do_sample=False)
    return model


# Pictures as the model sees them


def random_picture(rng: random.Random, scene: shapes.Scene) -> Image.Image:
    """The scene at the model's own resolution, or larger and not quite in proportion, as pictures of users are."""
    width, height = scene.columns * CELL, scene.rows * CELL
    if rng.random() < 0.5:
        return shapes.draw(scene, width, height)
    while True:
        scale = rng.uniform(1.0, 4.0)
        raw = [round(side * scale + rng.uniform(-8, 8)) for side in (width, height)]
        if smart_resize(raw[1], raw[0], CELL, MIN_PIXELS, MAX_PIXELS) == (height, width):
            return shapes.draw(scene, *raw)


def patches(picture: Image.Image, columns: int, rows: int) -> np.ndarray:
    """What the processor makes of a picture, without its checks; `check_patches` compares the two."""
    if picture.size != (columns * CELL, rows * CELL):
        picture = picture.resize((columns * CELL, rows * CELL), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture, dtype=np.float32) / 127.5 - 1.0
    grid = pixels.reshape(rows, 2, PATCH, columns, 2, PATCH, 3)
    return grid.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns * 4, -1)


def check_patches(processor) -> None:
    rng = random.Random(1)
    for columns, rows in SIZES:
        picture = random_picture(rng, shapes.make_scene(rng, columns, rows))
        truth = processor.image_processor(picture, return_tensors="np")
        assert truth["image_grid_thw"].tolist() == [[1, rows * 2, columns * 2]]
        np.testing.assert_allclose(patches(picture, columns, rows), truth["pixel_values"], atol=1e-5)


# What the dense heads are to say: for each patch and each cell, which thing covers it


def dense_targets(scene: shapes.Scene) -> dict[str, np.ndarray]:
    owners = np.asarray(shapes.draw_owners(scene, scene.columns * CELL, scene.rows * CELL))
    covered = owners[..., None] == np.arange(1, 5)
    by_patch = covered.reshape(scene.rows, 2, PATCH, scene.columns, 2, PATCH, 4).mean((2, 5)).transpose(0, 2, 1, 3, 4)
    by_cell = by_patch.mean((2, 3))
    table = np.zeros((5, 6), dtype=np.float32)  # row 0: no thing
    for i, thing in enumerate(scene.things):
        shape, colour = shapes.SHAPES.index(thing.shape), list(shapes.COLOURS).index(thing.colour)
        table[i + 1] = (shape + 1, colour + 1, thing.x, thing.y, thing.x / scene.columns, thing.y / scene.rows)
    cells, patch_things = table[owner(by_cell)].reshape(-1, 6), table[owner(by_patch)].reshape(-1, 6)
    row, column = np.divmod(np.arange(len(cells)), scene.columns)
    offset = cells[:, 2:4] - np.stack([column + 0.5, row + 0.5], 1)
    return {
        "patch_shape": patch_things[:, 0].astype(np.int64),
        "patch_colour": patch_things[:, 1].astype(np.int64),
        "shape": cells[:, 0].astype(np.int64),
        "colour": cells[:, 1].astype(np.int64),
        "centre": (np.abs(offset).max(1) < 0.5).astype(np.int64) * (cells[:, 0] > 0),
        "place": np.concatenate([offset, cells[:, 4:6] * 4 - 2], 1),
    }


def owner(coverage: np.ndarray) -> np.ndarray:
    return np.where(coverage.max(-1) > 0.12, coverage.argmax(-1) + 1, 0)


class DenseHeads(nn.Module):
    """Read-outs of the image tower, used in training alone."""

    def __init__(self, width: int):
        super().__init__()
        shape, colour = len(shapes.SHAPES) + 1, len(shapes.COLOURS) + 1
        self.patch = nn.ModuleDict({"patch_shape": nn.Linear(width, shape), "patch_colour": nn.Linear(width, colour)})
        self.cell = nn.ModuleDict(
            {"shape": nn.Linear(width, shape), "colour": nn.Linear(width, colour), "centre": nn.Linear(width, 2)}
        )
        self.place = nn.Linear(width, 4)
        self.norm = nn.RMSNorm(width)

    def forward(self, hidden, features, targets):
        """The loss, and the share of covered cells whose shape is right."""
        hidden = self.norm(hidden.float())
        scores = {n: head(hidden) for n, head in self.patch.items()} | {n: h(features) for n, h in self.cell.items()}
        loss = sum(F.cross_entropy(score.float(), targets[name]) for name, score in scores.items())
        covered = targets["shape"] > 0
        loss = loss + 4 * F.smooth_l1_loss(self.place(features).float()[covered], targets["place"][covered])
        right = (scores["shape"].argmax(-1) == targets["shape"])[covered]
        return loss, right.float().mean().item()


# A batch: sequences of one or two pictures, each followed by several questions that do not see each other


def make_batch(rng: random.Random, encode, pictures: int = 1) -> dict:
    """All first pictures of the sequences have one size, and so have all second ones."""
    sizes, count = tuple(rng.choice(SEEN) for _ in range(pictures)), BATCH // pictures
    scenes = [[shapes.make_scene(rng, *size) for _ in range(count)] for size in sizes]
    flat = list(itertools.chain(*scenes))
    targets = [dense_targets(scene) for scene in flat]
    asked = [[ask_about(rng, album) for _ in range(QUESTIONS)] for album in zip(*scenes, strict=True)]
    encoded = [encode(question.text, question.answer) for question in itertools.chain(*asked)]
    block = max(len(ids) for ids, _ in encoded)
    pixels = np.concatenate([patches(random_picture(rng, scene), scene.columns, scene.rows) for scene in flat])
    return {
        "sizes": sizes,
        "pixels": torch.from_numpy(pixels),
        "grid": torch.tensor([[1, scene.rows * 2, scene.columns * 2] for scene in flat]),
        "targets": {k: torch.from_numpy(np.concatenate([t[k] for t in targets])) for k in targets[0]},
        "tokens": torch.tensor([ids + [PAD] * (block - len(ids)) for ids, _ in encoded]).view(count, QUESTIONS, block),
        "labels": torch.tensor([ids + [-100] * (block - len(ids)) for _, ids in encoded]).view(count, QUESTIONS, block),
        "kinds": [question.kind if pictures == 1 else TWO for question in itertools.chain(*asked)],
    }


def ask_about(rng: random.Random, album: tuple[shapes.Scene, ...]) -> shapes.Question:
    """A question on the only picture, or on one of two that it names."""
    which = rng.randrange(len(album))
    question = shapes.ask_any(rng, album[which], ASKED)
    return shapes.in_picture(question, which) if len(album) > 1 else question


def make_encoder(tokenizer):
    """Question and answer -> token ids, and of each token what is to follow it, where that belongs to the answer."""

    @functools.cache
    def encode(question: str, answer: str) -> tuple[list[int], list[int]]:
        asked = [*tokenizer(question, add_special_tokens=False)["input_ids"], ASSISTANT]
        answered = [*tokenizer(answer, add_special_tokens=False)["input_ids"], EOS]
        assert UNK not in asked + answered, question
        return asked + answered, [-100] * (len(asked) - 1) + answered + [-100]

    return encode


@functools.cache
def layout(sizes: tuple[tuple[int, int], ...], block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Position ids and attention mask of: user, each picture between its two marks, then the question blocks.

    Each block counts on from the pictures as though it were the only one, and sees the pictures and itself.
    """
    parts, at = [torch.zeros(3, 1)], 1
    for columns, rows in sizes:
        grid = torch.stack(torch.meshgrid(torch.arange(1), torch.arange(rows), torch.arange(columns), indexing="ij"))
        end = at + 1 + max(columns, rows)
        parts += [torch.full((3, 1), at), at + 1 + grid.view(3, -1), torch.full((3, 1), end)]
        at = end + 1
    pictures = torch.zeros(sum(part.shape[1] for part in parts))
    whose = torch.cat([pictures, 1 + torch.arange(QUESTIONS).repeat_interleave(block)])
    parts.append((at + torch.arange(block)).repeat(QUESTIONS).expand(3, -1))
    visible = (whose[None, :] == 0) | (whose[None, :] == whose[:, None])
    mask = torch.zeros(visible.shape).masked_fill(~visible.tril(), -1e9).bfloat16()
    return torch.cat(parts, 1).long()[:, None], mask[None, None]


def answer_logits(model, features: torch.Tensor, batch: dict) -> torch.Tensor:
    """Logits for every token of every question block: (sequences, questions, block, vocabulary)."""
    count, embed = len(batch["tokens"]), model.model.language_model.embed_tokens
    user, start, end = embed(torch.tensor([USER, VISION_START, VISION_END])).expand(count, 1, -1, -1).unbind(2)
    cells = [count * columns * rows for columns, rows in batch["sizes"]]
    pictures = [part.float().unflatten(0, (count, -1)) for part in features.split(cells)]
    marked = [part for picture in pictures for part in (start, picture, end)]
    block = batch["tokens"].shape[-1]
    positions, mask = layout(batch["sizes"], block)
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([user, *marked, embed(batch["tokens"].flatten(1))], 1),
        attention_mask=mask.expand(count, -1, -1, -1),
        position_ids=positions.expand(-1, count, -1),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[:, -QUESTIONS * block :]).float().unflatten(1, (QUESTIONS, block))


# Training


class Trainer:
    """Weights, their running average, and the clock that the learning rate follows."""

    def __init__(self, minutes: float, peak: float, seed: int = 0):
        self.processor = build_processor()
        check_patches(self.processor)
        torch.manual_seed(seed)
        self.model = build_model(len(self.processor.tokenizer))
        self.model.set_attn_implementation("eager")  # in bfloat16 faster here than the fused kernels
        self.heads = DenseHeads(128)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.rng = random.Random(seed + 1)
        self.encode = make_encoder(self.processor.tokenizer)
        parameters = [*self.model.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
        self.seconds, self.peak = minutes * 60, peak
        self.spent, self.step, self.seen_shape, self.language = 0.0, 0, 0.0, False
        self.exact = dict.fromkeys((*shapes.KINDS, TWO), 0.0)

    def learning_rate(self) -> float:
        """Warm-up, a plateau, then straight down to zero at the end of the time."""
        left = max(0.0, 1.0 - self.spent / self.seconds)
        return self.peak * min(1.0, (self.step + 1) / 300) * min(1.0, left / 0.7)

    def train_step(self) -> float:
        batch = make_batch(self.rng, self.encode, 2 if self.language and self.rng.random() < PAIRS else 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen = self.model.model.visual(batch["pixels"], grid_thw=batch["grid"])
            loss, right = self.heads(seen.last_hidden_state, seen.pooler_output, batch["targets"])
            if self.language:
                logits = answer_logits(self.model, seen.pooler_output, batch)
                loss = 0.3 * loss + F.cross_entropy(logits.flatten(0, 2), batch["labels"].flatten())
                self.note(logits, batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.step += 1
        self.seen_shape += 0.02 * (right - self.seen_shape)
        self.update_average()
        return loss.item()

    @torch.no_grad()
    def update_average(self) -> None:
        decay = min(0.998, self.step / (self.step + 20))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    def note(self, logits, batch) -> None:
        """Running share of exact answers by kind. Every picture is new, so this is no recollection."""
        labels = batch["labels"]
        right = ((logits.argmax(-1) == labels) | (labels == -100)).all(-1).flatten().tolist()
        for kind, hit in zip(batch["kinds"], right, strict=True):
            self.exact[kind] += 0.002 * (hit - self.exact[kind])

    def run(self, out: Path, gate: float = 0.97) -> None:
        checkpoint = out / "checkpoint.pt"
        while self.spent < self.seconds:
            started = time.perf_counter()
            loss = self.train_step()
            if not self.language and (self.seen_shape > gate or self.spent > 0.4 * self.seconds):
                self.language = True
            self.spent += time.perf_counter() - started
            if self.step % 100 == 0:
                kinds = "  ".join(f"{kind} {share:.3f}" for kind, share in self.exact.items())
                print(
                    f"{self.spent:5.0f} s {self.step:5d}  {loss:.3f}  cells {self.seen_shape:.3f}  {kinds}", flush=True
                )
            if self.step % 1000 == 0:
                torch.save(self.state(), checkpoint)
        torch.save(self.state(), checkpoint)
        self.save(out)

    def state(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "heads", "average", "optimizer")}
        return parts | {name: getattr(self, name) for name in ("spent", "step", "seen_shape", "language", "exact")}

    def resume(self, state: dict) -> None:
        for name in ("model", "heads", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("spent", "step", "seen_shape", "language", "exact"):
            setattr(self, name, state[name])
        self.rng = random.Random(self.step)

    def save(self, out: Path) -> None:
        self.average.tie_weights()
        copy.deepcopy(self.average).to(torch.bfloat16).save_pretrained(out)
        self.processor.save_pretrained(out)
        shapes.draw_demo(shapes.DEMO, 56).save(out / "demo.png", optimize=True)
        shapes.draw_demo(shapes.DEMO2, 60).save(out / "demo2.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=50)
    parser.add_argument("--peak", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options.minutes, options.peak)
    if (options.out / "checkpoint.pt").exists():
        trainer.resume(torch.load(options.out / "checkpoint.pt"))
    trainer.run(options.out)


if __name__ == "__main__":
    main()
