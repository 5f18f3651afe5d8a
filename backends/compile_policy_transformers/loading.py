"""`load_model`: from a name to a model whose component classes were decorated before it was built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from compile_policy.config import CompilationConfig
from compile_policy.errors import InputError, PolicyError
from compile_policy.layers.custom_op import CustomOps, use_custom_ops
from compile_policy.layers.plugins import load_plugins
from compile_policy.plan import Plan
from compile_policy_transformers.applying import decorated_for
from compile_policy_transformers.components import meta_model, model_class
from compile_policy_transformers.layer_scope import layer_scope
from compile_policy_transformers.planning import make_plan
from compile_policy_transformers.tiny import tiny_config, tiny_model

#: Folder of the embedded model: what a call without a name loads.
EMBEDDED = Path(__file__).parent / "embedded"
_TINY = "tiny:"


def load_model(name: str | None = None, *, config: CompilationConfig | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load a model in eval mode with its component classes decorated while it is built.

    Args:
        name: a local folder, a hub id, ``tiny:<model type>`` or nothing (the embedded model).
        config: the configuration; defaults where not given.
        kwargs: for ``from_pretrained``.

    Raises:
        InputError: no model is there, or it cannot be read; ``__cause__`` is what ``from_pretrained`` raised.
        PolicyError: the model cannot do what the configuration asks.
    """
    config = config or CompilationConfig()
    if name is not None and name.startswith(_TINY):
        model_type = name.removeprefix(_TINY)
        with _building(tiny_config(model_type), config):
            return tiny_model(model_type)
    place = str(EMBEDDED) if name is None else name
    model_config = kwargs.pop("model_config", None) or _read_config(place, _hub_arguments(kwargs))
    if name is None:
        kwargs.setdefault("dtype", torch.float32)
    with _building(model_config, config), _reading(place, OSError, ValueError, SafetensorError):
        model = model_class(model_config).from_pretrained(place, config=model_config, **kwargs)
    return cast(PreTrainedModel, model.eval())


def _read_config(place: str, arguments: dict[str, Any]) -> PreTrainedConfig:
    with _reading(place, OSError, ValueError, KeyError, TypeError, AttributeError):  # the last three: odd JSON
        return AutoConfig.from_pretrained(place, **arguments)  # type: ignore[no-any-return]


@contextmanager
def _reading(place: str, *errors: type[Exception]) -> Iterator[None]:
    """Errors of reading a model, with the place named: a library's own message often leaves it out."""
    try:
        yield
    except PolicyError:
        raise
    except errors as error:
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"{place!r} cannot be loaded: {why}",
            remedy="Give a folder with a complete checkpoint, a hub id that can be reached, or 'tiny:<model type>'.",
        ) from error


@contextmanager
def _building(model_config: PreTrainedConfig, config: CompilationConfig) -> Iterator[None]:
    """What holds while a model is built: layer plug-ins and overrides, custom operators, decorated components."""
    load_plugins(enabled=config.enabled)
    operators = CustomOps.of(config.custom_ops, mode=config.mode, backend=config.backend)
    with layer_scope(), use_custom_ops(operators), decorated_for(model_config, config):
        yield


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder")
    return {name: kwargs[name] for name in names if name in kwargs}


def load_processor(name: str | None = None) -> Any:
    """The processor of a model (the embedded one without a name): pictures and text to inputs, ids to text."""
    if name is not None:
        return AutoProcessor.from_pretrained(name)
    # Transformers remarks on how its own PaddleOCRVLProcessor is written; nobody who loads our model can act on it.
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return AutoProcessor.from_pretrained(str(EMBEDDED))
    finally:
        transformers_logging.set_verbosity(before)


def plan(model: Any = None, *, config: CompilationConfig | None = None) -> Plan:
    """The plan of a model, of a configuration, or of a name, without allocating weights."""
    config = config or CompilationConfig()
    if isinstance(model, torch.nn.Module):
        return make_plan(model, config)
    if not isinstance(model, PreTrainedConfig):
        model = config_of(model)
    return make_plan(meta_model(model), config)


def config_of(name: str | None) -> PreTrainedConfig:
    """The model configuration behind a name as `load_model` takes it."""
    if name is not None and name.startswith(_TINY):
        return tiny_config(name.removeprefix(_TINY))
    return cast(PreTrainedConfig, AutoConfig.from_pretrained(str(EMBEDDED) if name is None else name))
