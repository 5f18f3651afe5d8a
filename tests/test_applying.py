"""The policy on a model that lives: applied, removed, copied, saved, retrained, and used by other libraries."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM, PreTrainedModel, pipeline
from transformers.models.llama.modeling_llama import LlamaModel

import compile_policy as cp
from compile_policy.applied import regions
from compile_policy.errors import PolicyWarning, UnsupportedModelError
from compile_policy.events import listening
from compile_policy.plan import ComponentReport
from compile_policy.region import region_of
from compile_policy_transformers import applying
from compile_policy_transformers.tiny import tiny_config, tiny_inputs, tiny_model

EAGER = cp.CompilationConfig(backend="eager")
WITH_ENCODER = cp.CompilationConfig(backend="eager", compile_mm_encoder=True)


def _decoder(model: nn.Module) -> ComponentReport:
    return next(c for c in cp.report(model).components if c.role == "decoder")


def _tokens(model: Any, **kwargs: Any) -> torch.Tensor:
    inputs = tiny_inputs(getattr(model, "base_model", model) if hasattr(model, "peft_config") else model, text_len=9)
    return model.generate(**inputs, max_new_tokens=6, **kwargs)  # type: ignore[no-any-return]


def _regions(model: nn.Module) -> list[str]:
    return [r.role for r in regions(model)]


def test_apply_report_remove() -> None:
    """`apply` compiles, `eager` pauses, `remove` leaves the model as it was; each can be repeated."""
    model = tiny_model("llama")
    before, attributes = _tokens(model), {n: set(m.__dict__) for n, m in model.named_modules()}
    assert cp.apply(model, EAGER) is model and _regions(model) == ["decoder"]
    assert torch.equal(_tokens(model), before) and _decoder(model).graphs == 1
    calls = _decoder(model).calls
    with cp.eager(model):
        assert torch.equal(_tokens(model), before) and _decoder(model).calls == calls
    cp.apply(model, EAGER)
    assert _decoder(model).graphs == 0, "a second apply starts anew"
    for _ in range(2):
        assert cp.remove(model) is model
        assert _regions(model) == [] and cp.report(model).components == ()
    assert torch.equal(_tokens(model), before)
    left = {n: set(m.__dict__) - attributes[n] for n, m in model.named_modules()}
    assert not any(left.values()), left


def test_events_name_the_component() -> None:
    """Role and path, as in the report: the region of a decorated class is made before its path is known."""
    told: list[str] = []
    with listening(lambda event: told.append(event.component)):
        model = tiny_model("llama")
        cp.apply(model, EAGER)
        with torch.no_grad():
            model(**tiny_inputs(model, text_len=4))
    assert set(told) - {"decoder"} == {"decoder model"}  # attached before it had a path


def test_other_instances_are_untouched() -> None:
    """Only the model that was asked for is compiled; its class and other instances know nothing of it."""
    model, other = tiny_model("llama"), tiny_model("llama")
    init, call, forward = LlamaModel.__init__, LlamaModel.__call__, LlamaModel.forward
    cp.apply(model, EAGER)
    assert _regions(other) == [] and _regions(tiny_model("llama")) == []
    assert (LlamaModel.__init__, LlamaModel.__call__, LlamaModel.forward) == (init, call, forward)
    assert type(model) is LlamaForCausalLM and type(model.model) is LlamaModel


@pytest.mark.parametrize("model_type", ["llama", "qwen2_5_vl"])
def test_head_is_never_compiled(model_type: str) -> None:
    """No region stands in front of the head or of anything that holds it, with and without encoders."""
    model = tiny_model(model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PolicyWarning)
        cp.apply(model, EAGER if model_type == "llama" else WITH_ENCODER)
    head = model.get_output_embeddings()
    assert all(head not in set(r.module.modules()) for r in regions(model))
    row = next(c for c in cp.report(model).components if c.role == "head")
    assert row.decision == "skip" and "never compiled" in row.reason


def test_encoder_gate() -> None:
    """Encoders get a region with the flag only, and the flag warns that it is experimental."""
    model = tiny_model("qwen2_5_vl")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PolicyWarning)
        cp.apply(model, EAGER)
    assert _regions(model) == ["decoder"]
    with pytest.warns(PolicyWarning, match="experimental"):
        cp.apply(model, WITH_ENCODER)
    assert sorted(_regions(model)) == ["decoder", "encoder[image]"]
    with pytest.warns(PolicyWarning, match="experimental"):
        loaded = cp.load_model("tiny:qwen2_5_vl", config=WITH_ENCODER)
    assert sorted(_regions(loaded)) == ["decoder", "encoder[image]"]
    assert _regions(cp.load_model("tiny:qwen2_5_vl", config=EAGER)) == ["decoder"]


def test_encoder_asked_and_not_found() -> None:
    """A wish that cannot be granted is an error that says what to do, and leaves the model alone."""
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match=r"no separate image.*compile_mm_encoder=False"):
        cp.apply(model, WITH_ENCODER)
    assert _regions(model) == []
    with pytest.raises(UnsupportedModelError):
        cp.load_model("tiny:llama", config=WITH_ENCODER)
    assert "__init__" in LlamaModel.__dict__ and not hasattr(LlamaModel.__init__, "__wrapped__")


# -- before init ------------------------------------------------------------------------------------------------------


def test_classes_are_decorated_before_init_and_restored() -> None:
    """The region is there when construction ends, and the class has its own constructor back."""
    init = LlamaModel.__init__
    with applying.decorated_for(tiny_config("llama"), EAGER):
        assert LlamaModel.__init__ is not init
        inside = tiny_model("llama")
    assert _regions(inside) == ["decoder"]
    assert LlamaModel.__init__ is init and _regions(tiny_model("llama")) == []


def test_classes_are_restored_when_construction_fails() -> None:
    """An error in a constructor passes through, and the classes are as before."""
    init = LlamaModel.__init__
    config = tiny_config("llama")
    with pytest.raises(ZeroDivisionError), applying.decorated_for(config, EAGER):
        config.hidden_size, config.num_attention_heads, config.head_dim = 1, 0, None
        LlamaForCausalLM(config)
        raise ZeroDivisionError  # some versions of the class survive such a configuration
    assert LlamaModel.__init__ is init and _regions(tiny_model("llama")) == []


# -- generate's own compile -------------------------------------------------------------------------------------------


def test_generates_own_compile_is_off_while_applied() -> None:
    """Also with a generation config of the caller's own; `remove` gives the decision back."""
    model = tiny_model("llama")
    question = {"cache_implementation": "static", "max_new_tokens": 4, "do_sample": False}
    mine = GenerationConfig(**question)
    want = _tokens(model)[:, :-2]
    cp.apply(model, EAGER)
    assert any("auto-compile" in note for note in cp.report(model).notes)
    inputs = tiny_inputs(model, text_len=9)
    assert torch.equal(model.generate(**inputs, generation_config=mine), want)
    asked = model._valid_auto_compile_criteria
    assert asked({}, mine) is False
    cp.remove(model)
    assert model._valid_auto_compile_criteria.__func__ is type(model)._valid_auto_compile_criteria


# -- copies and files -------------------------------------------------------------------------------------------------


def test_deepcopy() -> None:
    """A copy is a model without policy, and the original keeps its own."""
    model = cp.apply(tiny_model("llama"), EAGER)
    want = _tokens(model)
    other = copy.deepcopy(model)
    assert _regions(other) == [] and _regions(model) == ["decoder"]
    assert cp.report(other).components == ()
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(-1)
    assert torch.equal(_tokens(model), want) and not torch.equal(_tokens(other), want)
    assert torch.equal(_tokens(cp.apply(other, EAGER)), _tokens(cp.remove(other)))


def test_pickle_and_save(tmp_path: Path) -> None:
    """`torch.save` of the model and `save_pretrained` write what they write without the policy."""
    model = cp.apply(tiny_model("llama"), EAGER)
    want = _tokens(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(_tokens(torch.load(buffer, weights_only=False)), want)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys() and _regions(loaded) == []
    assert torch.equal(_tokens(loaded), want)
    again = cp.load_model(str(tmp_path), config=EAGER)
    assert torch.equal(_tokens(again), want) and _decoder(again).graphs == 1


# -- a model that changes ---------------------------------------------------------------------------------------------


def test_other_weights() -> None:
    """`load_state_dict` and an optimiser's step are seen by the next call, without another graph."""
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    cp.apply(model, EAGER)
    assert not torch.equal(_tokens(model), _tokens(other))
    model.load_state_dict(other.state_dict())
    assert torch.equal(_tokens(model), _tokens(other)) and _decoder(model).graphs == 1


def test_other_dtype() -> None:
    """`.to(bfloat16)` is another graph, and eager's result in that precision."""
    model = cp.apply(tiny_model("llama"), EAGER)
    _tokens(model)
    model.to(torch.bfloat16)
    inputs = tiny_inputs(model, text_len=9)
    with torch.no_grad():
        got = model(**inputs).logits
        with cp.eager(model):
            want = model(**inputs).logits
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.1)
    assert (_decoder(model).graphs, _decoder(model).eager_calls) == (2, 0)


def test_adapters() -> None:
    """LoRA added, switched off, on and merged after `apply`: the tokens are eager's at every step."""
    model = cp.apply(tiny_model("llama"), EAGER)
    inputs = tiny_inputs(model, text_len=9)
    seen: list[torch.Tensor] = []

    def check(used: Any) -> None:
        got = used.generate(**inputs, max_new_tokens=6)
        with cp.eager(model):
            assert torch.equal(used.generate(**inputs, max_new_tokens=6), got)
        seen.append(got)

    check(model)
    torch.manual_seed(0)
    with_lora: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    with_lora.eval()
    with torch.no_grad():
        for name, parameter in with_lora.named_parameters():
            if "lora_" in name:
                parameter.mul_(4)
    check(with_lora)
    with with_lora.disable_adapter():
        check(with_lora)
    check(with_lora)
    check(with_lora.merge_and_unload())
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3]) and torch.equal(seen[1], seen[4])
    assert not torch.equal(seen[0], seen[1]), "the adapter makes no difference"
    assert _decoder(model).eager_calls == 0


def test_training_step() -> None:
    """Loss and gradients of ``model(**inputs, labels=...)`` equal eager's."""
    model = tiny_model("llama")
    inputs = tiny_inputs(model, text_len=9, batch=2)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, gradients = step()
    cp.apply(model, cp.CompilationConfig(backend="aot_eager"))
    got_loss, got = step()
    torch.testing.assert_close(got_loss, loss)
    assert got.keys() == gradients.keys() and len(got) > 5
    for name, gradient in gradients.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


# -- other libraries --------------------------------------------------------------------------------------------------


def test_device_map() -> None:
    """A model that accelerate has put on one device compiles like any other."""
    model = cp.load_model(config=EAGER, device_map="cpu")
    assert _regions(model) == ["decoder"]


def test_offloaded_weights() -> None:
    """Offloaded weights run eager with a warning that says why, and give the right tokens."""
    model = tiny_model("llama")
    want = _tokens(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.warns(PolicyWarning, match="weights are offloaded"):
        cp.apply(model, EAGER)
    assert _regions(model) == [] and _decoder(model).decision == "eager"
    assert torch.equal(_tokens(model), want)


def test_outer_compile_passes_through() -> None:
    """Inside somebody's `torch.compile` the policy stands back."""
    model = cp.apply(tiny_model("llama"), EAGER)
    inputs = tiny_inputs(model, text_len=9)
    with torch.no_grad():
        want = model(**inputs, use_cache=False).logits
        calls = _decoder(model).calls
        compiled = torch.compile(lambda **kw: model(**kw, use_cache=False).logits, backend="eager")
        torch.testing.assert_close(compiled(**inputs), want, atol=1e-4, rtol=1e-3)
    assert _decoder(model).calls == calls


def test_pipeline() -> None:
    """The image-text-to-text pipeline of Transformers runs on the embedded model under the policy."""
    from PIL import Image

    from compile_policy_transformers.loading import EMBEDDED, load_processor

    processor = load_processor()
    model: PreTrainedModel = cp.load_model(config=EAGER)
    ask = pipeline(
        "image-text-to-text",
        model=model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        processor=processor,
    )
    picture = {"type": "image", "image": Image.open(EMBEDDED / "demo.png")}
    question = {"type": "text", "text": "What shape is the red object?"}
    messages = [{"role": "user", "content": [picture, question]}]
    got = ask(text=messages, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
    row = _decoder(model)
    assert row.graphs == 1 and row.eager_calls == 0 and row.calls > 0
    with cp.eager(model):
        assert ask(text=messages, max_new_tokens=8, return_full_text=False)[0]["generated_text"] == got
    assert region_of(model.get_submodule(row.qualname)) is not None


def test_what_the_user_decorated_stays() -> None:
    """A tower decorated by hand below a model: compiled and reported before, with and after the policy."""

    @cp.support_torch_compile(dynamic_arg_dims={"x": {0: "b"}})
    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).relu()

    model = tiny_model("llama")
    with cp.use_config(EAGER):
        model.tower = Tower().eval()

    def tower() -> Any:
        (row,) = [row for row in cp.report(model).components if row.qualname == "tower"]
        return row

    x = torch.randn(3, 8)
    for expected in (1, 2, 3):
        want = model.tower.forward(x)
        assert torch.equal(model.tower(x), want)
        row = tower()
        assert (row.state, row.graphs, row.calls, row.decision) == ("compiled", 1, expected, "compile")
        assert row.reason == "its class is decorated with support_torch_compile"
        assert (cp.remove(model) if expected == 2 else cp.apply(model, EAGER)) is model
    roles = {row.role for row in cp.plan(model).components if row.decision == "compile"}
    assert roles == {"decoder", "projector"}
    cp.remove(model)
    assert [row.qualname for row in cp.report(model).components] == ["tower"]
