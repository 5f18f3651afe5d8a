"""Made-up decoders on Llama's layers that call another model themselves, before their layers or among them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

PICTURE = 7  # token


def small_config(layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


class Eye(PreTrainedModel):
    """Patches of a picture; those that are dark are left out, so that their number is data."""

    config_class = LlamaConfig
    _supports_sdpa = True
    main_input_name = "pixel_values"
    _can_record_outputs: ClassVar = {"hidden_states": nn.Linear}

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.hidden_size, 4, stride=4)
        self.layers = nn.ModuleList([nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2)])
        self.post_init()

    @capture_outputs
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        bright = (pixel_values.mean(dim=(1, 2, 3)) > -1e3).nonzero().flatten()
        hidden = self.patches(pixel_values[bright]).flatten(2).transpose(1, 2)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return BaseModelOutput(last_hidden_state=hidden)


class CallsBefore(LlamaModel):
    """Scales its embeddings, puts pictures among them, and notes something of every layer."""

    notes = True

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.eye = Eye(config)
        self.scale = nn.Parameter(torch.tensor(1.5))

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,  # to Transformers 5.23
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,  # from 5.24
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        past_key_values = past_key_values if cache is None else cache
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if pixel_values is not None:
            features = self.eye(pixel_values).last_hidden_state.flatten(0, 1)
            places = input_ids == PICTURE
            if int(places.sum()) != len(features):
                raise ValueError("as many tokens as there are patches are needed")
            inputs_embeds = inputs_embeds.masked_scatter(places[..., None], features)
        inputs_embeds = inputs_embeds * self.scale
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
            position_ids = position_ids.unsqueeze(0)
        causal_mask = self._mask(inputs_embeds, attention_mask, past_key_values, position_ids)
        hidden_states = inputs_embeds
        rows = inputs_embeds.shape[0]
        norms = []
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
            )
            if self.notes:
                norms.append(hidden_states.norm(dim=-1))
        hidden_states = self.norm(hidden_states)
        assert len(norms) == len(self.layers) * self.notes
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states.view(rows, -1, self.config.hidden_size), past_key_values=past_key_values
        )

    def _mask(self, embeds: torch.Tensor, mask: Any, cache: Any, positions: torch.Tensor) -> Any:
        return create_causal_mask(self.config, embeds, mask, cache, position_ids=positions)


class WithoutNorms(CallsBefore):
    notes = False


class MasksItself(CallsBefore):
    def _mask(self, embeds: torch.Tensor, mask: Any, cache: Any, positions: torch.Tensor) -> Any:
        keys = embeds.shape[1] if cache is None else cache.get_mask_sizes(embeds.shape[1], 0)[0]
        seen = torch.arange(keys)[None, :] <= positions[0, :, None]
        padding = nn.functional.pad(mask.bool(), (0, keys - mask.shape[1]), value=False)
        closed = torch.finfo(embeds.dtype).min
        return torch.where(seen[None, None] & padding[:, None, None], 0.0, closed)


class CallsAmong(LlamaModel):
    """Looks at its picture again in every layer."""

    inner = Eye

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.eye = self.inner(config)

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        position_embeddings = self.rotary_emb(hidden_states, position_ids=positions)
        mask = create_causal_mask(self.config, hidden_states, attention_mask, None)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask, position_embeddings=position_embeddings)
            seen = torch.ones_like(hidden_states[:, :, 0]) if pixel_values is None else pixel_values
            hidden_states = hidden_states + self.eye(seen).last_hidden_state.mean(dim=1, keepdim=True)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states))


class Memory(PreTrainedModel):
    """A model inside that is no tower: it reads numbers, a row for each text."""

    config_class = LlamaConfig
    _supports_sdpa = True
    _can_record_outputs: ClassVar = {"hidden_states": LlamaDecoderLayer}

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.line = nn.Linear(1, config.hidden_size)
        self.post_init()

    @capture_outputs
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.line(input_ids[..., None].float()))


class RemembersAmong(CallsAmong):
    inner = Memory


def model_with(decoder: type[LlamaModel], layers: int = 2) -> LlamaForCausalLM:
    """A causal language model with such a decoder, random but reproducible."""
    torch.manual_seed(0)
    config = small_config(layers)
    model = LlamaForCausalLM(config)
    model.model = decoder(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()
