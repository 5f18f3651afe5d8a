"""Ask a vision-language model about one picture, with its decoder compiled as one graph.

python examples/offline_inference/vision_language.py [MODEL]
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

import compile_policy as cp
from compile_policy_transformers.loading import EMBEDDED, load_processor


def main(
    name: str | None = None,
    picture: Path = EMBEDDED / "demo.png",
    question: str = "What shape is the red object?",
    backend: str = "inductor",
) -> str:
    model = cp.load_model(name, config=cp.CompilationConfig(backend=backend))
    processor = load_processor(name)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[Image.open(picture).convert("RGB")], text=[prompt], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=32)
    answer: str = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    print(f"{question} {answer}")
    for component in cp.report(model).components:
        print(f"  {component.role}: {component.decision}, graphs: {component.graphs}, calls: {component.calls}")
    return answer


if __name__ == "__main__":
    main(*sys.argv[1:2])
