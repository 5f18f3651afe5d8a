"""Layers of Transformers models replaced where they are built, and in models that exist; always with a way back."""

from __future__ import annotations

import copy
import runpy
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.exaone4.modeling_exaone4 import Exaone4RMSNorm
from transformers.models.exaone4_5.modeling_exaone4_5 import Exaone4_5_RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm
from transformers.monkey_patching import clear_patch_mapping, get_patch_mapping, register_patch_mapping

import compile_policy
from compile_policy.config import CompilationConfig
from compile_policy.errors import PolicyWarning, UnsupportedModelError
from compile_policy.layers import (
    LayerError,
    ParallelLMHead,
    RMSNorm,
    VocabParallelEmbedding,
    check_claims,
    layer_rows,
    override,
    registry_scope,
    registry_state,
    replace_layers_,
)
from compile_policy_transformers.layers import layer_scope, use_parallel_vocab_
from compile_policy_transformers.tiny import tiny_config, tiny_inputs, tiny_model

NORMS: dict[str, tuple[type[nn.Module], ...]] = {
    "llama": (LlamaRMSNorm,),
    "qwen2_5_vl": (Qwen2_5_VLRMSNorm,),
    "exaone4_5": (Exaone4_5_RMSNorm, Exaone4RMSNorm),
}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Nothing that a test does outlives it: no class, no mapping, no claim."""
    before = {name: vars(modeling_llama)[name] for name in ("LlamaRMSNorm", "LlamaMLP", "LlamaDecoderLayer")}
    with registry_scope():
        yield
    assert get_patch_mapping() == {}
    assert {name: vars(modeling_llama)[name] for name in before} == before


# Not on the class: a class whose attributes change with every call is compiled anew, or not at all.
CALLS: Counter[type] = Counter()


def counting(cls: type[nn.Module]) -> Any:
    """A subclass that counts its calls."""

    class Counting(cls):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                CALLS[type(self)] += 1
            return super().forward(*args, **kwargs)

    return Counting


class Shifted(LlamaRMSNorm):
    """A replacement that can be told from the original by its result."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + 1


def instances(model: nn.Module, *classes: type) -> int:
    return sum(type(module) in classes for module in model.modules())


def inputs_for(model: Any) -> dict[str, Any]:
    images = {} if model.config.model_type == "llama" else {"images": [(56, 56)]}
    return dict(tiny_inputs(model, text_len=6, **images))


def tokens(model: Any) -> torch.Tensor:
    return model.generate(**inputs_for(model), max_new_tokens=5)


# -- where a model is built -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", list(NORMS))
def test_counting_norms(model_type: str) -> None:
    """As many replaced as there are instances, equal tokens, every one of them called; without the scope none."""
    plain = tiny_model(model_type)
    replacements = {cls: counting(cls) for cls in NORMS[model_type]}
    with layer_scope(replacements, strict=True) as scope:
        model = tiny_model(model_type)
    expected = instances(plain, *NORMS[model_type])
    assert expected >= 5
    assert sum(scope.counts.values()) == instances(model, *replacements.values()) == expected
    assert torch.equal(tokens(model), tokens(plain))
    assert all(CALLS[cls] > 0 for cls in replacements.values())
    assert instances(tiny_model(model_type), *NORMS[model_type]) == expected


def decoder_of(model: Any) -> dict[str, Any]:
    return next(row for row in compile_policy.report(model).to_dict()["components"] if row["role"] == "decoder")


@pytest.mark.parametrize("model_type", list(NORMS))
def test_replaced_norms_are_in_one_graph(model_type: str) -> None:
    """Under the policy the decoder with replaced norms is one graph for prefill and decode; the tokens are equal."""
    wanted = tokens(tiny_model(model_type))
    with layer_scope({cls: counting(cls) for cls in NORMS[model_type]}, strict=True):
        model = tiny_model(model_type)
    compile_policy.apply(model, config=CompilationConfig(backend="eager"))
    assert torch.equal(tokens(model), wanted)
    row = decoder_of(model)
    assert (row["graphs"], row["calls"], row["eager_calls"], row["fallback"]) == (1, 5, 0, None)


def test_a_model_loaded_by_the_policy() -> None:
    """`load_model` looks at a model without memory first: the count is that of the model that came out."""
    norm = counting(LlamaRMSNorm)
    with layer_scope({LlamaRMSNorm: norm}, strict=True) as scope:
        model = compile_policy.load_model("tiny:llama", config=CompilationConfig(backend="eager"))
    assert sum(scope.counts.values()) == instances(model, norm) == 5
    assert torch.equal(tokens(model), tokens(tiny_model("llama")))
    assert decoder_of(model)["graphs"] == 1


def test_only_living_models_count() -> None:
    """A model that is dropped inside the scope doesn't count, also when it holds itself alive."""
    with layer_scope({LlamaRMSNorm: counting(LlamaRMSNorm)}, strict=True) as scope:
        dropped = tiny_model("llama")
        dropped.circle = [dropped]
        dropped = tiny_model("llama")
    assert sum(scope.counts.values()) == 5
    assert dropped is not None


def test_replacing_after_compile_makes_a_new_entry() -> None:
    """A compiled decoder whose norms are replaced gives the tokens of its new layers, and the old once restored."""
    model = tiny_model("llama")
    plain = tokens(model)
    with replace_layers_(model, {LlamaRMSNorm: Shifted}):
        shifted = tokens(model)
    assert not torch.equal(plain, shifted)
    compile_policy.apply(model, config=CompilationConfig(backend="eager"))
    assert torch.equal(tokens(model), plain)
    with replace_layers_(model, {LlamaRMSNorm: Shifted}):
        assert torch.equal(tokens(model), shifted)
        assert decoder_of(model)["graphs"] == 2
    assert torch.equal(tokens(model), plain)
    assert (decoder_of(model)["graphs"], decoder_of(model)["eager_calls"]) == (2, 0)


def test_direct_construction_is_covered() -> None:
    """Transformers' mapping alone reaches ``from_config`` and ``from_pretrained``, but not ``Model(config)``."""
    config = tiny_config("llama")
    norm = counting(LlamaRMSNorm)
    register_patch_mapping({"LlamaRMSNorm": norm})
    try:
        assert instances(LlamaForCausalLM(config), norm) == 0, "covered upstream now: the scope need not apply patches"
    finally:
        clear_patch_mapping()
    with layer_scope({LlamaRMSNorm: norm}):
        assert instances(LlamaForCausalLM(config), norm) == 5


def test_from_pretrained_loads_the_checkpoint(tmp_path: Any) -> None:
    """Replaced layers take their weights from an ordinary checkpoint."""
    plain = tiny_model("llama")
    plain.save_pretrained(tmp_path)
    with layer_scope({LlamaRMSNorm: counting(LlamaRMSNorm)}, strict=True) as scope:
        model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert sum(scope.counts.values()) == 5
    assert torch.equal(tokens(model), tokens(plain))


@pytest.mark.parametrize("how", ["from_config", "direct"])
def test_an_error_in_init_restores_everything(how: str) -> None:
    """A replacement whose ``__init__`` raises leaves no class patched (Transformers' own patching does)."""

    class Broken(LlamaRMSNorm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("no kernel here")

    build = {"from_config": lambda: tiny_model("llama"), "direct": lambda: LlamaForCausalLM(tiny_config("llama"))}
    with pytest.raises(RuntimeError, match="no kernel here"), layer_scope({LlamaRMSNorm: Broken}):
        build[how]()
    assert modeling_llama.LlamaRMSNorm is LlamaRMSNorm
    assert instances(tiny_model("llama"), LlamaRMSNorm) == 5


def test_a_module_imported_inside_is_restored_too() -> None:
    """A module that takes a replaced class over while the scope is on would keep it for ever."""
    norm = counting(LlamaRMSNorm)
    late = types.ModuleType("transformers.models.late_import_of_a_test")
    try:
        with layer_scope({LlamaRMSNorm: norm}):
            exec("from transformers.models.llama.modeling_llama import LlamaRMSNorm", vars(late))
            assert vars(late)["LlamaRMSNorm"] is norm
            sys.modules[late.__name__] = late
            tiny_model("llama")
        assert vars(late)["LlamaRMSNorm"] is LlamaRMSNorm
    finally:
        sys.modules.pop(late.__name__, None)


def test_output_recorders_are_restored() -> None:
    """Transformers notes replaced classes in class-level tables for good; later models must still record outputs."""
    wanted = hidden_states(tiny_model("llama"))
    with layer_scope({LlamaDecoderLayer: counting(LlamaDecoderLayer)}):
        inside = tiny_model("llama")
    for model in (inside, tiny_model("llama")):
        got = hidden_states(model)
        assert len(got) == len(wanted) == 3
        assert all(map(torch.equal, got, wanted))


def hidden_states(model: Any) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return tuple(model(**inputs_for(model), output_hidden_states=True).hidden_states)


def test_claims_are_checked_before_anything_changes() -> None:
    """Two claims on one class, no subclass, a class that nobody would call, a target that isn't there: all at once."""
    override(LlamaRMSNorm)(type("First", (LlamaRMSNorm,), {}))
    override("transformers.models.llama.modeling_llama:LlamaRMSNorm")(type("Second", (LlamaRMSNorm,), {}))

    class Dispatching(LlamaMLP):
        def forward_oot(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(LayerError) as caught, layer_scope({LlamaMLP: Dispatching, LlamaDecoderLayer: nn.Linear}):
        raise AssertionError("entered")
    message = str(caught.value)
    assert "First" in message and "and by" in message and "Second" in message
    assert "forward_oot, which nobody calls" in message
    assert "Linear" in message and "no subclass" in message
    override("transformers.models.llama.modeling_llama:LlamaNothing")(LlamaMLP)
    with pytest.raises(LayerError, match="LlamaNothing', which is not there"), layer_scope():
        raise AssertionError("entered")
    with pytest.raises(LayerError, match="Write module:Class"):
        override("LlamaRMSNorm")


def test_registered_overrides_apply_and_are_counted() -> None:
    """An override made anywhere, by class or by name, reaches models in a scope; the list of layers counts it."""
    norm = counting(LlamaRMSNorm)
    override("transformers.models.llama.modeling_llama:LlamaRMSNorm")(norm)
    assert instances(tiny_model("llama"), norm) == 0
    with layer_scope(plugins=False):
        assert instances(tiny_model("llama"), norm) == 0
    with layer_scope(strict=True):
        model = tiny_model("llama")
    assert instances(model, norm) == 5
    row = next(row for row in layer_rows() if row.kind == "model")
    assert (row.name.partition(":")[2], row.count) == ("LlamaRMSNorm", 5)
    check_claims(strict=True)


def test_a_dead_replacement_is_told() -> None:
    """A class that the model doesn't have: a warning, or an error in strict mode."""
    replacements = {MistralRMSNorm: counting(MistralRMSNorm)}
    with pytest.warns(PolicyWarning, match="MistralRMSNorm and replaced 0 instances"), layer_scope(replacements):
        tiny_model("llama")
    with pytest.raises(LayerError, match="replaced 0 instances"), layer_scope(replacements, strict=True):
        tiny_model("llama")


def test_a_name_that_two_classes_share_is_refused() -> None:
    """Transformers replaces by name: where another class of that name is loaded, it would be hit as well."""
    namesake = types.ModuleType("transformers.models.namesake_of_a_test")
    vars(namesake)["LlamaMLP"] = type("LlamaMLP", (nn.Module,), {"__module__": namesake.__name__})
    sys.modules[namesake.__name__] = namesake
    try:
        message = r"shares its name with .*namesake_of_a_test:LlamaMLP.*replace_layers_"
        with pytest.raises(LayerError, match=message), layer_scope({LlamaMLP: counting(LlamaMLP)}):
            raise AssertionError("entered")
    finally:
        del sys.modules[namesake.__name__]


def test_somebody_elses_patch_is_a_conflict() -> None:
    """A mapping that the user registered with Transformers is neither lost nor overruled."""
    theirs = counting(LlamaRMSNorm)
    register_patch_mapping({"LlamaRMSNorm": theirs})
    try:
        with (
            pytest.raises(LayerError, match="already replaced by"),
            layer_scope({LlamaRMSNorm: counting(LlamaRMSNorm)}),
        ):
            raise AssertionError("entered")
        assert get_patch_mapping() == {"LlamaRMSNorm": theirs}
    finally:
        clear_patch_mapping()


def test_a_compatible_class_is_proven_on_the_model() -> None:
    """A class that is no subclass is compared, parameter by parameter, with the model built without it."""

    class Fits(nn.Module):
        def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
            super().__init__()
            self.inner = LlamaRMSNorm(hidden_size, eps)
            self.weight = self.inner.weight
            del self.inner.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.inner.variance_epsilon)

    class Misfits(Fits):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.scale = nn.Parameter(torch.ones(1))

    with registry_scope():
        override(LlamaRMSNorm, state_dict_compatible=True)(Fits)
        with layer_scope(strict=True):
            model = tiny_model("llama")
        assert torch.equal(tokens(model), tokens(tiny_model("llama")))
    override(LlamaRMSNorm, state_dict_compatible=True)(Misfits)
    with pytest.raises(LayerError, match=r"scale: absent became \(1,\)"), layer_scope():
        model = tiny_model("llama")


def test_a_recorded_class_needs_a_subclass() -> None:
    """Hidden states are recorded by class: a stand-in that is no subclass would silently drop them."""
    override(LlamaDecoderLayer, state_dict_compatible=True)(nn.Linear)
    with pytest.raises(LayerError, match=r"records outputs of .*LlamaDecoderLayer by its class"), layer_scope():
        raise AssertionError("entered")


# -- in a model that exists -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", list(NORMS))
def test_replace_and_restore(model_type: str) -> None:
    """Replaced in place by a subclass that takes over what the instance holds: equal tokens and state; and back."""
    model = tiny_model(model_type)
    wanted, keys = tokens(model), list(model.state_dict())
    before = dict(model.named_modules())
    replacements = {cls: counting(cls) for cls in NORMS[model_type]}
    done = replace_layers_(model, replacements)
    assert sum(done.counts.values()) == instances(model, *replacements.values()) >= 5
    assert torch.equal(tokens(model), wanted)
    assert all(CALLS[cls] > 0 for cls in replacements.values())
    assert list(model.state_dict()) == keys
    done.restore_()
    assert all(module is before[name] for name, module in model.named_modules())
    assert torch.equal(tokens(model), wanted)


def test_the_package_norm_takes_the_place_of_llamas() -> None:
    """Our RMSNorm operator in the place of the model's, with the model's parameters: equal tokens."""
    model = tiny_model("llama")
    wanted = tokens(model)
    with replace_layers_(model, {LlamaRMSNorm: RMSNorm}):
        assert instances(model, RMSNorm) == 5
        assert not any(module.training for module in model.modules())
        assert torch.equal(tokens(model), wanted)
    assert instances(model, LlamaRMSNorm) == 5


def test_the_filter_and_exact_classes() -> None:
    """Only what the filter lets pass, by name; a subclass of a given class is not replaced."""
    model = tiny_model("llama")
    done = replace_layers_(
        model, {LlamaRMSNorm: counting(LlamaRMSNorm)}, lambda _, name: name.endswith("input_layernorm")
    )
    assert [one.places[0][2] for one in done.replaced] == [f"model.layers.{i}.input_layernorm" for i in (0, 1)]
    again = replace_layers_(model, {LlamaRMSNorm: counting(LlamaRMSNorm)})
    assert sum(again.counts.values()) == 3


def test_a_shared_layer_stays_shared() -> None:
    """One instance in two places is replaced by one instance in two places."""
    norm = LlamaRMSNorm(4)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
    done = replace_layers_(model, {LlamaRMSNorm: counting(LlamaRMSNorm)})
    assert model["a"] is model["b"][0]
    done.restore_()
    assert model["a"] is model["b"][0] is norm


def test_nothing_changes_when_one_cannot_be_built() -> None:
    """A failure in the middle leaves the model as it was."""
    model = tiny_model("llama")
    made: list[nn.Module] = []

    def third_fails(layer: nn.Module) -> nn.Module:
        made.append(layer)
        if len(made) == 3:
            raise RuntimeError("no kernel here")
        return copy.deepcopy(layer)

    with pytest.raises(RuntimeError, match="no kernel here"):
        replace_layers_(model, {LlamaRMSNorm: third_fails})
    assert instances(model, LlamaRMSNorm) == 5 and not any(m is x for m in model.modules() for x in made[3:])


def test_what_cannot_be_replaced_says_why() -> None:
    """No instance, an ``__init__`` that would be skipped, no module, the same module: each says what to do."""

    class WithInit(LlamaRMSNorm):
        def __init__(self, hidden_size: int) -> None:
            super().__init__(hidden_size)
            self.extra = 1

    model = tiny_model("llama")
    for replacements, message in (
        ({nn.Conv2d: nn.Conv2d}, "no instance of torch.nn.modules.conv:Conv2d"),
        ({LlamaRMSNorm: WithInit}, r"from_layer\(layer\)"),
        ({LlamaRMSNorm: nn.Linear}, r"cannot be built from an instance"),
        ({LlamaRMSNorm: lambda layer: None}, "is a NoneType, no module"),
        ({LlamaRMSNorm: lambda layer: layer}, "is the old layer itself"),
    ):
        with pytest.raises(LayerError, match=message):
            replace_layers_(model, replacements)  # type: ignore[arg-type]


def test_restoring_keeps_what_happened_since() -> None:
    """Training, a change of dtype, a mode and a hook since the replacement are there after restoring."""
    model = nn.Sequential(LlamaRMSNorm(4), nn.BatchNorm1d(4))
    batch_norm = type("Same", (nn.BatchNorm1d,), {})
    done = replace_layers_(model, {LlamaRMSNorm: RMSNorm, nn.BatchNorm1d: batch_norm})
    with torch.no_grad():
        model[0].weight.fill_(3.0)
    model.to(torch.float64).eval()
    model[1].running_mean = torch.full((4,), 7.0, dtype=torch.float64)
    done.restore_()
    assert [type(layer) for layer in model] == [LlamaRMSNorm, nn.BatchNorm1d]
    assert not any(layer.training for layer in model)
    assert model[0].weight.dtype == torch.float64 and model[0].weight[0] == 3
    assert model[1].running_mean[0] == 7
    done.restore_()  # a second call does nothing


def test_restoring_over_another_replacement_is_refused() -> None:
    """Replacements are undone in reverse order; any other order is an error, not a lost layer."""
    model = nn.Sequential(LlamaRMSNorm(4))
    first = replace_layers_(model, {LlamaRMSNorm: RMSNorm})
    second = replace_layers_(model, {RMSNorm: counting(RMSNorm)})
    with pytest.raises(LayerError, match="replaced again since"):
        first.restore_()
    second.restore_()
    first.restore_()
    assert type(model[0]) is LlamaRMSNorm


def test_model_overrides_are_in_the_state() -> None:
    """What stands in keys changes when an override of a model's class is registered."""
    before = registry_state()
    override(LlamaRMSNorm)(Shifted)
    assert registry_state() != before
    assert "LlamaRMSNorm" in str(registry_state())


# -- embedding and head -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", list(NORMS))
@pytest.mark.parametrize("padding", [1, 100])
def test_parallel_vocabulary_keeps_tokens(model_type: str, padding: int) -> None:
    """The pluggable embedding and head in a model: equal tokens and an ordinary state dict, padded or not."""
    model = tiny_model(model_type)
    wanted, state = tokens(model), {k: v.clone() for k, v in model.state_dict().items()}
    done = use_parallel_vocab_(model, padding_size=padding)
    assert type(model.get_input_embeddings()) is VocabParallelEmbedding
    assert type(model.get_output_embeddings()) is ParallelLMHead
    assert torch.equal(tokens(model), wanted)
    assert all(map(torch.equal, model.state_dict().values(), state.values()))
    assert model.state_dict().keys() == state.keys()
    done.restore_()
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert torch.equal(tokens(model), wanted)


def test_training_since_the_replacement_is_kept() -> None:
    """Padded layers have parameters of their own: what they learned is in the originals after restoring."""
    model = tiny_model("llama")
    before = tokens(model)
    done = use_parallel_vocab_(model, padding_size=100)
    assert model.get_input_embeddings().weight.shape[0] == 400
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight.copy_(layer.weight.flip(1))
    changed = tokens(model)
    done.restore_()
    assert not torch.equal(changed, before)
    assert torch.equal(tokens(model), changed)


def test_an_override_of_the_head_reaches_the_model() -> None:
    """The head that is built in the model is the override, and its word counts."""

    @ParallelLMHead.register_oot
    class Always7(ParallelLMHead):
        def forward(self, hidden_states: torch.Tensor) -> Any:
            logits = super().forward(hidden_states)
            return torch.nn.functional.one_hot(torch.full(logits.shape[:-1], 7), logits.shape[-1]).to(logits.dtype)

    model = tiny_model("llama")
    use_parallel_vocab_(model)
    assert (tokens(model)[:, -5:] == 7).all()


def test_an_embedding_that_does_more_is_refused() -> None:
    """Gemma's embedding rescales its rows: it is refused by name, and the model stays as it was."""
    model = tiny_model("gemma3_text")
    with pytest.raises(UnsupportedModelError, match="ScaledWordEmbedding where a plain Embedding is needed"):
        use_parallel_vocab_(model)
    assert type(model.get_output_embeddings()) is nn.Linear


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    """What the example prints is what its comments promise."""
    path = Path(__file__).resolve().parents[1] / "examples" / "pluggable_layer.py"
    runpy.run_path(str(path), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == ["building LoudNorm(64,)"] * 5
    assert [line.endswith("LlamaRMSNorm': 5} True") for line in lines[5:7]] == [True, True]
    assert lines[7:] == [str([7] * 8), "True"]
