"""Replace layers of a Transformers model: where it is built, and in a model that exists; then take everything back."""

from __future__ import annotations

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from compile_policy.layers import ParallelLMHead, RMSNorm, registry_scope, replace_layers_
from compile_policy_transformers.layers import layer_scope, use_parallel_vocab_
from compile_policy_transformers.tiny import tiny_inputs, tiny_model


class LoudNorm(LlamaRMSNorm):
    """The same norm, which says that it is there."""

    def __init__(self, *args: int, **kwargs: float) -> None:
        super().__init__(*args, **kwargs)
        print(f"building {type(self).__name__}{args}")


def main() -> None:
    plain = tiny_model("llama")
    inputs = tiny_inputs(plain, text_len=8)
    wanted = plain.generate(**inputs, max_new_tokens=8)

    with layer_scope({LlamaRMSNorm: LoudNorm}) as scope:  # where the model is built
        model = tiny_model("llama")
    print(dict(scope.counts), torch.equal(model.generate(**inputs, max_new_tokens=8), wanted))

    with replace_layers_(plain, {LlamaRMSNorm: RMSNorm}) as done:  # in a model that exists
        print(done.counts, torch.equal(plain.generate(**inputs, max_new_tokens=8), wanted))

    with registry_scope():  # an installed plug-in would do this where it is imported

        @ParallelLMHead.register_oot
        class Only7(ParallelLMHead):
            def forward(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
                logits = super().forward(hidden_states)
                return (
                    None if logits is None else logits.index_add(-1, torch.tensor([7]), logits.abs().amax(-1, True) * 9)
                )

        with use_parallel_vocab_(plain):
            print(plain.generate(**inputs, max_new_tokens=8)[0, -8:].tolist())
    print(torch.equal(plain.generate(**inputs, max_new_tokens=8), wanted))


if __name__ == "__main__":
    main()
