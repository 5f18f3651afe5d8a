"""What the user names on the command line, checked before anything heavy starts: a model, pictures, a question."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compile_policy.cli.session import TINY
from compile_policy.errors import InputError

if TYPE_CHECKING:
    from PIL import Image


class Picture(NamedTuple):
    """A picture and the name of its file."""

    name: str
    image: Image.Image


@dataclass(frozen=True)
class Question:
    """What is asked of a model: pictures in order, then text."""

    pictures: tuple[Picture, ...]
    prompt: str


def check_model(name: str | None) -> None:
    """Refuse a folder that is missing or damaged. A hub id, a tiny model and the embedded one pass."""
    if name is None or name.startswith(TINY):
        return
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder)
    elif folder.exists():
        raise InputError(f"{name} is a file, not a model folder.", remedy="Name the folder that holds config.json.")
    elif not name.strip() or name[0] in "./~" or name.count("/") > 1 or name.endswith("/"):
        raise InputError(f"there is no model folder {name!r}.", remedy="Check the path; a hub id reads owner/name.")


def _check_folder(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"{folder} has no config.json.", remedy="Name a folder that save_pretrained wrote.")
    for path in sorted(folder.glob("*.json")):
        _check_json(path)
    for weights in sorted(folder.glob("*.safetensors")):
        _check_weights(weights)


def _check_json(path: Path) -> None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}.", remedy="Restore it or fetch the model again.") from None
    if path.name == "config.json" and not isinstance(values, dict):
        raise InputError(f"{path} is not a model's configuration.", remedy="Fetch the model again.")


def _check_weights(path: Path) -> None:
    """A safetensors file is a length, a JSON header of that length, and the data that the header describes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0) == size
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise InputError(f"{path} is damaged or incomplete.", remedy="Fetch the model again.")


def open_picture(name: str) -> Picture:
    """One picture in RGB, whole; whatever is wrong with the file is said in one sentence."""
    from PIL import Image, UnidentifiedImageError

    path = Path(name).expanduser()
    remedy = "Give a picture that opens in an image viewer, such as a PNG or JPEG file."
    try:
        if path.stat().st_size == 0:
            raise InputError(f"the picture {name} is empty (0 bytes).", remedy=remedy)
        with Image.open(path) as image:
            return Picture(path.name, image.convert("RGB"))
    except FileNotFoundError:
        raise InputError(f"there is no picture {name}.", remedy="Check the path; pictures are local files.") from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is not a picture that can be read.", remedy=remedy) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(f"the picture {name} cannot be read: {why}.", remedy=remedy) from None


def question_for(name: str | None, pictures: Sequence[Picture], prompt: str | None, embedded: Path) -> Question:
    """What to ask: what the user gave, and the demo's picture and question where the embedded model is asked."""
    demo = read_demo(embedded) if name is None else {}
    if not pictures and "image" in demo:
        pictures = [open_picture(os.fspath(embedded / demo["image"]))]
    if prompt is None:
        prompt = demo.get("prompt") or ("Describe the picture." if pictures else None)
    if prompt is None and not (name or "").startswith(TINY):
        raise InputError("there is nothing to ask.", remedy="Add --prompt TEXT.")
    return Question(tuple(pictures), prompt or "")


def read_demo(embedded: Path) -> dict[str, Any]:
    """Picture, question and answer that the embedded model comes with; empty without it."""
    path = embedded / "demo.json"
    if not path.is_file():
        return {}
    values = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values


def encode(processor: Any, question: Question) -> dict[str, Any]:
    """The question as a model's inputs, through its chat template where it has one."""
    pictures = [picture.image for picture in question.pictures]
    if pictures and getattr(processor, "image_processor", None) is None:
        raise InputError("this model takes no pictures.", remedy="Leave --image out, or name a vision-language model.")
    tokenizer = getattr(processor, "tokenizer", processor)
    if getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None):
        text = {"type": "text", "text": question.prompt}
        parts = [{"type": "image", "image": picture} for picture in pictures] + [text]
        # A plain tokenizer's template wants a string, a processor's wants parts.
        content = question.prompt if processor is tokenizer else parts
        chat = [{"role": "user", "content": content}]
        return dict(
            processor.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        )
    if not pictures:
        return dict(tokenizer(question.prompt, return_tensors="pt"))
    marks = getattr(processor, "image_token", "") * len(pictures)
    return dict(processor(text=marks + question.prompt, images=pictures, return_tensors="pt"))
