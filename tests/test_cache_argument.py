"""A cache is recognised by its value or its annotation, whatever the argument is called."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.cache_utils import Cache, DynamicCache

import compile_policy as cp
from compile_policy_transformers import releases
from compile_policy_transformers.cache_argument import CACHE, cache_in, cache_name, cache_parameter, name_cache
from compile_policy_transformers.known_code import fingerprint
from compile_policy_transformers.tiny import tiny_model


def _annotated(x: Any, memory: Cache | None = None) -> None: ...
def _subclass(x: Any, memory: DynamicCache | None = None) -> None: ...
def _in_words(x: Any, memory: "DynamicCache | None" = None) -> None: ...  # noqa: UP037
def _known_wins(encoder_cache: Cache, past_key_values: Any = None) -> None: ...
def _no_cache(x: torch.Tensor, cached: int = 0, **kwargs: Any) -> None: ...


_in_types: Any = lambda x, memory=None: None  # noqa: E731
_in_types.__annotations__ = {"memory": DynamicCache | None}


@pytest.mark.parametrize("function", [_annotated, _subclass, _in_words, _in_types])
def test_an_annotation_names_it(function: Any) -> None:
    """A class below `Cache`, optional or not, as a type or in words."""
    assert cache_parameter(function) == cache_name(function) == "memory"


def test_names_are_the_last_resort() -> None:
    """A known name wins over another annotated one; without either it is what this release says."""
    assert cache_parameter(_known_wins) == "past_key_values"
    assert cache_parameter(_no_cache) is None
    assert cache_name(_no_cache) == CACHE == cache_parameter(LlamaModel.forward)
    assert ("cache" if releases.RELEASE >= (5, 24) else "past_key_values") == CACHE


def test_a_cache_moves_to_the_name_of_the_parameter() -> None:
    """By its value, or by a deprecated name; nothing else moves."""
    cache, x = DynamicCache(), torch.ones(1)
    for given in ("layer_memory", "past_key_values", "cache_params", "cache"):
        values: dict[str, Any] = {"x": x, given: cache}
        assert cache_in(values) is cache
        name_cache(values, "memory", {"x": None, "memory": None})
        assert values == {"x": x, "memory": cache}
    both: dict[str, Any] = {"encoder_cache": cache, "past_key_values": None}
    name_cache(both, "cache", {"encoder_cache": None, "cache": None})
    assert both == {"encoder_cache": cache, "cache": None}


def test_a_digest_does_not_depend_on_the_name() -> None:
    """Code that differs in the name of its cache alone is the same code."""

    def old(self: Any, past_key_values: Cache | None = None) -> Any:
        return self.inner(past_key_values=past_key_values)

    def new(self: Any, cache: Cache | None = None) -> Any:
        return self.inner(cache=cache)

    def other(self: Any, cache: Cache | None = None) -> Any:
        return self.inner(kept=cache)

    assert fingerprint(old) == fingerprint(new) != fingerprint(other)


class _Renamed(LlamaModel):
    """A decoder of a release to come: its cache is called otherwise."""

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        memory: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        named = {"inputs_embeds": inputs_embeds, CACHE: memory, "use_cache": use_cache, **kwargs}
        return super().forward(input_ids, attention_mask, position_ids, **named)


class _RenamedForCausalLM(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = _Renamed(config)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["memory", "by position", "past_key_values"])
@torch.no_grad()
def test_a_decoder_of_another_release(name: str) -> None:
    """One graph for every length, equal to eager, and the caller's cache is filled; also by a deprecated name."""
    model: Any = tiny_model("llama")
    config = model.config
    if name != "past_key_values":  # which only the decorators of a stock decoder know
        model = _RenamedForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    pieces = [torch.randn(2, n, config.hidden_size, generator=generator) for n in (5, 1, 1, 3)]

    def run() -> tuple[list[torch.Tensor], int]:
        cache, out = DynamicCache(config=config), []
        for embeds in pieces:
            if name == "by position":
                result = model.model(None, None, None, cache, embeds)
            else:
                result = model.model(inputs_embeds=embeds, **{name: cache})
            out.append(result.last_hidden_state)
        return out, int(cache.get_seq_length())

    cp.apply(model, cp.CompilationConfig(backend="eager", cache_dir=False))
    with cp.eager(model):
        want, held = run()
    got, mine = run()
    assert mine == held == 10
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))
    (row,) = [c for c in cp.report(model).components if c.role == "decoder"]
    assert (row.graphs, row.calls, row.eager_calls) == (1, 4, 0)


@torch.no_grad()
def test_recomputing_decoders_keep_their_cache_as_eager_does() -> None:
    """Without gradients, a decoder that recomputes its layers has a cache or none, as the release has it."""
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable()
    ids = torch.tensor([[3, 4, 5]])
    want = model.model(ids).get(CACHE)
    cp.apply(model, cp.CompilationConfig(backend="eager", cache_dir=False))
    got = model.model(ids).get(CACHE)
    assert type(got) is type(want)


def test_names_that_a_release_lacks_are_imported_in_one_place() -> None:
    """A missing name is no ImportError: `releases` has something in its place, which nothing is an instance of."""
    folder = Path(releases.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "transformers":
                names = {alias.name for alias in node.names}
                assert "DummyLayer" not in names, f"{path.name}: import it from releases"
    assert isinstance(releases.DummyLayer, type)
