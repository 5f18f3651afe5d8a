"""All recipes for code within a decoder's layers that cannot be traced as it is; each says why in a file of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from compile_policy_transformers.aligners import asking_layers, attending
from compile_policy_transformers.counted import counted_by_size
from compile_policy_transformers.experts import grouped, looping_experts
from compile_policy_transformers.indexers import selecting, selecting_indexers


@contextmanager
def traceable_layers(decoder: torch.nn.Module) -> Iterator[None]:
    """Give what is in ``decoder`` forwards that can be traced, where one is known."""
    experts, indexers, aligners = looping_experts(decoder), selecting_indexers(decoder), asking_layers(decoder)
    with grouped(experts), selecting(indexers), attending(aligners), counted_by_size(decoder):
        yield
