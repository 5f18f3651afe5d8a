"""Several pictures of different sizes, one after the other and in one batch: still one graph each.

python examples/offline_inference/vision_language_multi_image.py
"""

from __future__ import annotations

from PIL import Image

import compile_policy as cp
from compile_policy_transformers.loading import EMBEDDED, load_processor

PICTURES = ("demo.png", "demo2.png")
QUESTION = "What shape is the red object?"


def main(backend: str = "inductor") -> list[str]:
    model = cp.load_model(config=cp.CompilationConfig(backend=backend, compile_mm_encoder=True))
    processor = load_processor()
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [Image.open(EMBEDDED / name).convert("RGB") for name in PICTURES]

    def ask(*chosen: Image.Image) -> list[str]:
        text = [prompt] * len(chosen)
        inputs = processor(images=list(chosen), text=text, padding=True, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=32)[:, inputs["input_ids"].shape[1] :]
        return [answer.strip() for answer in processor.batch_decode(tokens, skip_special_tokens=True)]

    answers = [answer for image in images for answer in ask(image)]
    print(f"{QUESTION} {answers}, in one batch: {ask(*images)}")
    for component in cp.report(model).components:
        print(f"  {component.role}: {component.decision}, graphs: {component.graphs}, calls: {component.calls}")
    return answers


if __name__ == "__main__":
    main()
