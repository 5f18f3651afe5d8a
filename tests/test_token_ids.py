"""A decoder whose layers read the ids of tokens, as those do that route by them: one graph of ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calling_decoders import model_with, small_config
from falling import falls_back
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

import compile_policy as cp
from compile_policy_transformers.token_ids import layers_read_ids, more_than_embeddings


class RoutesByIds(LlamaModel):
    """After each layer a token's states are scaled by what a table has for its id; ``needs`` it or does without."""

    needs = True

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,  # to Transformers 5.23
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,  # from 5.24
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        past_key_values = past_key_values if cache is None else cache
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden.shape[1]) + seen)[None]
        mask = create_causal_mask(self.config, hidden, attention_mask, past_key_values, position_ids=position_ids)
        positions = self.rotary_emb(hidden, position_ids=position_ids)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, past_key_values=past_key_values, position_embeddings=positions)
            hidden = self.routed(hidden, input_ids)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)

    def routed(self, hidden: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        if ids is None and not self.needs:
            return hidden
        return hidden * (1 + torch.tanh(self.table(ids)))


class MayDoWithout(RoutesByIds):
    needs = False


@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
def test_one_graph_of_ids(cache: str) -> None:
    model: Any = model_with(RoutesByIds)
    options: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}

    def answer(ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        if cache == "none":
            return [model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]]
        options.update(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        options.update(output_logits=True, return_dict_in_generate=True)
        return list(model.generate(ids, attention_mask=mask, **options).logits)

    answers: list[list[list[torch.Tensor]]] = []
    with torch.no_grad():
        for compiled in (False, True):
            if compiled:
                cp.apply(model, cp.CompilationConfig(backend="eager"))
            generator = torch.Generator().manual_seed(0)
            answers.append([])
            for rows, length in ((1, 9), (2, 5), (3, 12)):
                ids = torch.randint(8, 60, (rows, length), generator=generator)
                mask = torch.ones_like(ids)
                mask[1:, :2] = 0
                answers[-1].append(answer(ids, mask))
    report = next(c for c in cp.report(model).components if c.role == "decoder")
    cp.remove(model)
    torch.testing.assert_close(answers[1], answers[0])
    assert (report.graphs, report.eager_calls) == (1, 0), report.fallback


def test_only_what_has_to_is_given_ids() -> None:
    """One that hands ids on and can do without is called with embeddings, as those around it call it."""
    needs, may = model_with(RoutesByIds), model_with(MayDoWithout)
    assert layers_read_ids(needs.model) and not layers_read_ids(may.model)
    assert not layers_read_ids(LlamaModel(small_config()))


class ScalesItsOwn(LlamaModel):
    """Makes other embeddings of ids than those that it is given (Falcon H1)."""

    factor = 3.0

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,  # to Transformers 5.23
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,  # from 5.24
        **kwargs: Any,
    ) -> Any:
        past_key_values = past_key_values if cache is None else cache
        inputs_embeds = self.embedded(input_ids, inputs_embeds)
        return super().forward(
            None, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs
        )

    def embedded(self, ids: torch.Tensor | None, embeds: torch.Tensor | None) -> torch.Tensor:
        return self.embed_tokens(ids) * self.factor if embeds is None else embeds


class ScalesByOne(ScalesItsOwn):
    factor = 1.0


def test_ids_and_embeddings_are_two_graphs_where_ids_are_more() -> None:
    """A call with either gives what eager gives, for every length; one graph is enough where they are the same."""
    model: Any = model_with(ScalesItsOwn)
    assert more_than_embeddings(model.model)
    for other in (model_with(ScalesByOne), model_with(LlamaModel)):
        assert not more_than_embeddings(other.model)
    with torch.no_grad():
        table = model.get_input_embeddings()
        calls: list[dict[str, Any]] = []
        for ids in (torch.tensor([[8, 9, 10]]), torch.tensor([[11, 12], [13, 14]]), torch.tensor([[7]])):
            calls += [{"input_ids": ids}, {"inputs_embeds": table(ids)}]
        want = [model(**call).logits for call in calls]
        texts = [model.generate(calls[0]["input_ids"], max_new_tokens=5, do_sample=False)]
        cp.apply(model, cp.CompilationConfig(backend="eager"))
        for call, logits in zip(calls, want, strict=True):
            torch.testing.assert_close(model(**call).logits, logits)
        texts.append(model.generate(calls[0]["input_ids"], max_new_tokens=5, do_sample=False))
    assert torch.equal(*texts)
    report = next(c for c in cp.report(model).components if c.role == "decoder")
    assert (report.graphs, report.eager_calls) == (2, 0), report.fallback


class LooksUp(ScalesItsOwn):
    """Wants to know which tokens embeddings are of (Gemma 4)."""

    def embedded(self, ids: torch.Tensor | None, embeds: torch.Tensor | None) -> torch.Tensor:
        if ids is None:
            assert embeds is not None
            found = (embeds[:, :, None, :] == self.embed_tokens.weight).all(dim=3)
            if not found.any(dim=2).all():
                raise ValueError("these are the embeddings of no tokens")
            ids = found.long().argmax(dim=2)
        return self.embed_tokens(ids) * (1 + torch.tanh(ids[..., None] / 9))


@pytest.mark.xfail(
    strict=True,
    reason="a decoder of the user's that branches on values cannot be traced, and is not run on made-up ids: eager",
)
def test_ids_of_a_decoder_that_looks_up_what_embeddings_are_of() -> None:
    """Made-up embeddings are none that it takes; a graph of ids needs none."""
    model: Any = model_with(LooksUp)
    assert more_than_embeddings(model.model)
    prompts = [torch.tensor([[8, 9, 10]]), torch.tensor([[11, 12], [13, 14]])]
    wish = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        want = [model.generate(ids, **wish).logits for ids in prompts]
        cp.apply(model, cp.CompilationConfig(backend="eager"))
        torch.testing.assert_close([model.generate(ids, **wish).logits for ids in prompts], want)
    report = next(c for c in cp.report(model).components if c.role == "decoder")
    assert (report.graphs, report.eager_calls) == (1, 0), report.fallback


class NoEmbeddings(LlamaModel):
    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        hidden = self.embed_tokens(input_ids).cumsum(dim=1)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def test_one_that_takes_ids_alone_says_so() -> None:
    model = model_with(NoEmbeddings)
    ids = torch.tensor([[8, 9, 10]])
    with torch.no_grad():
        want = model(ids).logits
        cp.apply(model, cp.CompilationConfig(backend="eager"))
        with falls_back("takes token ids and no embeddings of them"):
            assert torch.equal(model(ids).logits, want)
    report = next(c for c in cp.report(model).components if c.role == "decoder")
    assert report.fallback is not None
    assert "NoEmbeddings.forward (test_token_ids.py:" in report.fallback and "no embeddings" in report.fallback
