"""What differs between releases of Transformers by name or by code, each with the releases that it holds for.

Everything else asks: a cache is recognised by its value or annotation (`cache_argument`), a class by what it does. When
a new release renames something that cannot be asked for, or changes code that a recipe replaces, this is the file to
change. What is unknown here is not compiled, and said so.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import cache_utils

from compile_policy.versions import release_of

#: Major and minor number of the installed release.
RELEASE = release_of(transformers.__version__) or (0, 0)

#: Names of the argument that a decoder's cache comes in, for forwards without annotations and for old callers.
CACHE_NAMES = (
    "cache",  # from 5.24
    "past_key_values",  # to 5.23; accepted as a deprecated keyword since
    "cache_params",  # to 5.23, state spaces and linear attention; accepted as a deprecated keyword since
)

#: Decorators of a forward that do nothing for a call without collected outputs, tuples or deprecated keywords.
IDLE_DECORATORS = frozenset(
    (
        "auto_docstring",
        "can_return_tuple",
        "capture_outputs",
        "deprecate_kwarg",  # from 5.24, on every forward that takes a cache
        "replace_return_docstrings",
    )
)


def is_idle(decorator: str) -> bool:
    """True if the source text of a decorator calls or names one of `IDLE_DECORATORS`."""
    return decorator.partition("(")[0].rpartition(".")[2] in IDLE_DECORATORS


def recomputes(module: Any) -> bool:
    """True if a forward recomputes its layers in the backward, for which Transformers runs it without a cache."""
    checkpointed = module.training and getattr(module, "gradient_checkpointing", False)
    asks_for_gradients = RELEASE >= (5, 24)  # earlier ones drop the cache without gradients, too
    return bool(checkpointed) and (torch.is_grad_enabled() or not asks_for_gradients)


class _NoSuchLayer:
    """Takes the place of a class that this release does not have: nothing is an instance of it."""


#: A layer of a cache that holds nothing; from 5.23.
DummyLayer: Any = getattr(cache_utils, "DummyLayer", _NoSuchLayer)

# Digests of code that a recipe replaces while tracing (`known_code.fingerprint`, `size_twins.digest`). A release whose
# code has another digest is traced as it is, which fails at a named line, so that the component runs eager.

EVOLLA_ALIGNER = "e3901d1c7696664e"  # 5.17 to 5.24
QWEN4_INDEXER = "b6f873f3e3b170a5"  # from 5.23
QWEN4_INDEXER_ADDITIVE = "2f190f0f18c650ea"  # to 5.22: numbers to add, where the mask is of numbers
QWEN4_NORM = ("ad768ef8d8dc2a72", "e83601fb69b88c36")
QWEN4_ROTARY = ("ba40b142193a24a8", "6e63eb9bd9df112e")
PICTURE_CONVOLUTION = "263f7b1ae3ffa93d"
GRANITE_ATTENTION = "b89af05362d32ed5"
PHI4_STREAMING_MASK = "03b987a6d8c5b6ad"
PHI4_ENCODER_MASK = "22981a364528fcf4"
