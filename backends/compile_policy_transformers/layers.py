"""Layers of Transformers models replaced: where a model is built (`layer_scope`), and in a model that exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from compile_policy.errors import UnsupportedModelError
from compile_policy.layers import ParallelLMHead, Replacements, VocabParallelEmbedding, replace_layers_
from compile_policy_transformers.components import meta_model
from compile_policy_transformers.layer_scope import LayerScope as LayerScope
from compile_policy_transformers.layer_scope import layer_scope as layer_scope
from compile_policy_transformers.loading import config_of


def count_layers(name: str | None = None) -> None:
    """Build a model without memory, so that `layer_rows` tells how many of its layers registered overrides replace.

    Args:
        name: as `load_model` takes it.

    Raises:
        LayerError: overrides that conflict.
    """
    with layer_scope():
        model = meta_model(config_of(name))
    del model  # alive until here: the scope counts what is alive when it ends


def use_parallel_vocab_(
    model: PreTrainedModel, *, group: dist.ProcessGroup | None = None, padding_size: int = 1
) -> Replacements:
    """Replace the model's input embedding and head by `VocabParallelEmbedding` and `ParallelLMHead`, or their
    overrides.

    On one rank, without padding, they use the model's own parameters: tied weights stay tied, ``state_dict`` stays as
    it is. On more ranks each keeps its rows, and every rank gets the whole logits.

    Args:
        model: a model whose head is an ``nn.Linear`` and whose embedding is an ``nn.Embedding``, exactly.
        group: ranks that share the vocabulary.
        padding_size: the vocabulary is padded to a multiple of this.

    Returns:
        What was replaced, with ``restore_()``; with a group, all ranks restore together.

    Raises:
        UnsupportedModelError: the embedding or the head is of another class, which does more than look up or multiply.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for layer, cls in ((embedding, nn.Embedding), (head, nn.Linear)):
        if type(layer) is not cls:
            raise UnsupportedModelError(
                f"{type(model).__name__} has a {type(layer).__name__} where a plain {cls.__name__} is needed.",
                remedy="Write a layer of your own for it and use replace_layers_.",
            )
    rows = VocabParallelEmbedding.from_layer(cast(nn.Embedding, embedding), group=group, padding_size=padding_size)
    logits = ParallelLMHead.from_layer(cast(nn.Linear, head), group=group, padding_size=padding_size)
    if head.weight is embedding.weight:
        logits.tie_weights(rows)
    made: dict[type, Callable[[nn.Module], nn.Module]] = {nn.Embedding: lambda _: rows, nn.Linear: lambda _: logits}
    return replace_layers_(model, made, lambda layer, _: layer is embedding or layer is head)
