"""What `explain` says is what happens: dims, reasons, what needs another graph, the line that cannot be compiled."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from falling import falls_back
from torch import nn
from transformers import AutoConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

import compile_policy as cp
from compile_policy.applied import regions
from compile_policy.cli import main
from compile_policy.decorators import support_torch_compile, use_config
from compile_policy.explain import ComponentExplained, Explanation, explain
from compile_policy.failure import Failure
from compile_policy.layers.replace import replace_layers_
from compile_policy.predicate import ShapeConditions
from compile_policy.region import Region, RegionOptions, SignatureBinder
from compile_policy.words import conditions_in_words
from compile_policy_transformers import find_components, tiny_inputs, tiny_model
from compile_policy_transformers.base import called_components
from compile_policy_transformers.cache_argument import CACHE
from compile_policy_transformers.components import RULES, meta_model

EAGER = cp.CompilationConfig(backend="eager")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cp.PolicyWarning)
        yield


def _component(found: Explanation, role: str = "decoder") -> ComponentExplained:
    [component] = [c for c in found.components if c.role == role]
    return component


def _generate(model: Any, **more: Any) -> torch.Tensor:
    sees = any(f.role == "encoder[image]" for f in find_components(model))
    inputs = tiny_inputs(model, text_len=8, images=[(64, 96)] * sees)
    tokens: torch.Tensor = model.generate(**inputs, max_new_tokens=3, do_sample=False, **more)
    return tokens


# -- dims -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma3", "qwen2_5_vl", "qwen3_vl", "glm4v"))],
)
def test_sizes_without_weights_are_those_of_a_run(name: str) -> None:
    """Tensors, labels and fixed sizes that the configuration tells are what `generate` brings, decoder and tower."""
    config = cp.CompilationConfig(backend="eager", compile_mm_encoder=name != "llama")
    before = explain(f"tiny:{name}", config=config)
    model = cp.apply(tiny_model(name), config)
    _generate(model)
    after = explain(model)
    assert after.ran and not before.ran
    compiled = [c for c in before.components if c.decision == "compile"]
    assert len(compiled) == (1 if name == "llama" else 2)
    for planned in compiled:
        ran = _component(after, planned.role)
        assert ran.fallback is None and ran.graphs == len(ran.entries) == 1 and ran.calls > 0
        assert planned.sizes == ran.sizes and planned.dims == ran.dims and planned.dims
        assert {dim.origin for dim in ran.dims} <= {"rule", "probe"}
        for dim in ran.dims:  # every label has a meaning of its own, unless two calls were compared
            assert dim.origin == "rule" or "." in dim.label


class Scaled(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor, k: int = 2) -> torch.Tensor:
        return x * self.weight * k


@pytest.mark.parametrize(
    ("dims", "override", "origin"),
    [
        (None, {}, "annotation"),
        ({"x": {0: "rows"}}, {}, "decorator"),
        (None, {"Annotated": {"x": {0: "rows"}}}, "configuration"),
    ],
)
def test_who_said_that_a_dim_varies(dims: Any, override: Any, origin: str) -> None:
    """Annotation, decorator and configuration are told apart, before and after the first call."""
    cls = support_torch_compile(dynamic_arg_dims=dims)(type("Annotated", (Scaled,), {}))
    with use_config(cp.CompilationConfig(backend="eager", dynamic_arg_dims=override)):
        module = cls()
    before = explain(module)
    module(torch.ones(3, 4))
    after = explain(module)
    for found in (before, after):
        [dim] = found.components[0].dims
        assert dim.origin == origin and dim.where == ("x dim 0",)
    assert not before.ran and after.ran


# -- another graph ----------------------------------------------------------------------------------------------------


def test_what_needs_another_graph_does() -> None:
    """Each row of the list, done, is one more graph with that reason; what varies is none."""
    cls = support_torch_compile(dynamic_arg_dims={"x": {0: "rows"}})(type("Listed", (Scaled,), {}))
    with use_config(cp.CompilationConfig(backend="eager", max_entries=16)):
        module = cls(1)
    region = cp.applied.regions(module)[0]
    with torch.no_grad():
        module(torch.ones(3, 4))
        listed = [another.what for another in explain(module).components[0].another]
        assert listed == [
            "another size of a fixed dim",
            "another dtype or device",
            "another mode of torch",
            "another structure",
            "at most max_entries=16 in all",
        ]
        module(torch.ones(7, 4))
        assert region.graphs == 1
        module(torch.ones(3, 5))
        module(torch.ones(3, 4, dtype=torch.float64))
        module(torch.ones(3, 4), 3)
    module(torch.ones(3, 4))
    module.weight = nn.Parameter(torch.zeros(1))
    with torch.no_grad():
        module(torch.ones(3, 4))
    [found] = explain(module).components
    assert region.graphs == len(found.entries) == 6
    because = [entry.because for entry in found.entries]
    assert because[0] == "" and "static sizes ['*', 5]" in because[1] and "float64" in because[2]
    assert because[3] == "argument k is 3, was not given" and because[4] == "grad mode is True, was False"
    assert because[5] == "parameter or buffer 'weight' of the component is another tensor"
    assert found.entries[3].key["arguments"] == {"k": "3"} and found.entries[4].key["modes"]["grad mode"] is True


def test_relations_of_sizes_in_words() -> None:
    """What labels and key say already is left out; the rest names the labels."""
    region = Region(Scaled(), role="c", binder=SignatureBinder({"x": {0: "rows"}}), options=RegionOptions("eager"))
    region.attach()
    region.module(torch.ones(6, 4))
    call = next(iter(region.entries.values()))[0].call
    known = ["s[0][1] == 4", "(s[0][0] == s[0][0])", "(0 <= s[0][0])"]
    told = ["((s[0][0] % 4) == 0)", "(2 <= s[0][0])", "((s[0][0] // 2) != 5)", "(nonsense(s[0][0]))"]
    said = ["rows is a multiple of 4", "2 is at most rows", "floor(rows/2) is not 5", "(nonsense(x.shape[0]))"]
    assert conditions_in_words(call, known + told) == said
    ShapeConditions(known + told[:3])  # they are in the form that graphs have them in


# -- failures ---------------------------------------------------------------------------------------------------------

torch.library.define("explained::opaque", "(Tensor x) -> Tensor")
torch.library.impl("explained::opaque", "cpu", lambda x: x + 1)


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x + 1
        return x


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Branch()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x * 2)  # type: ignore[no-any-return]


class Loop(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in x.nonzero():
            x = x + i.sum()
        return x


class Counts(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = int(x.sum())
        while n > 4:
            n -= 1
        return x + n


class Clock(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + time.time() * 0


class Says(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("called", file=sys.stderr)
        return x


class Opaque(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.explained.opaque(x)  # type: ignore[no-any-return]


class Misfit(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if not torch.compiler.is_compiling() else x @ torch.ones(5, 5)


@pytest.mark.parametrize(
    ("cls", "where", "code", "op", "cause", "remedy"),
    [
        (Branch, "Branch", "if x.sum() > 0:", "if", "the if depends on the values of a tensor", "torch.where"),
        (Inside, "Branch", "if x.sum() > 0:", "if", "the if depends on the values of a tensor", "replace Branch"),
        (Loop, "Loop", "for i in x.nonzero():", "for", "a loop runs as often as the values", "replace Loop"),
        (Counts, "Counts", "while n > 4:", "while", "the while depends on the values of a tensor", "torch.where"),
        (Clock, "Clock", "return x + time.time() * 0", "time.time", "time.time cannot be traced", "Keep time.time out"),
        (Says, "Says", 'print("called", file=sys.stderr)', "print", "print cannot be traced", "Keep print out"),
        (Opaque, "Opaque", "return torch.ops.explained.opaque(x)", "explained.opaque", "does not say", "register_fake"),
        (Misfit, "Misfit", "x @ torch.ones(5, 5)", "matmul", "matmul fails on the traced sizes: a and b must", ""),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_the_line_that_cannot_be_compiled(
    cls: type[nn.Module], where: str, code: str, op: str, cause: str, remedy: str
) -> None:
    """File, line, source text, class, operation, cause and remedy of what really failed; eager's result comes out."""
    binder, options = SignatureBinder({"x": {0: None}}), RegionOptions("eager")
    region = Region(cls(), role="decoder", binder=binder, options=options)
    region.attach()
    x = torch.ones(6)
    with falls_back(cause):
        assert torch.equal(region.module(x), region.module.forward(x))
    found = explain(region.module).components[0]
    assert found.eager_calls == found.calls == 1 and found.fallback is not None and found.entries == ()
    failure = found.failure
    assert isinstance(failure, Failure) and failure.file == __file__ and failure.cls == where
    lines = Path(__file__).read_text().splitlines()
    assert code in lines[failure.line - 1] and lines[failure.line - 1].strip() == failure.code
    assert (
        failure.op == op
        and cause in failure.cause
        and remedy in failure.remedy
        and bool(remedy) == bool(failure.remedy)
    )
    assert failure.data_dependent == (op in ("if", "for", "while"))
    assert found.fallback == f"compiling failed at {failure.place}: {failure.cause}"  # and not torch's first line


@pytest.mark.parametrize(
    ("name", "advice"), [("lighton_ocr", ""), ("qwen2_5_vl", ""), ("llava", "Bring the pictures to one size.")]
)
def test_advice_on_sizes_of_pictures(name: str, advice: str) -> None:
    """Only a tower that takes pictures of one size asks for it: padded stacks and packed patches do not."""
    found = explain(f"tiny:{name}", config=cp.CompilationConfig(compile_mm_encoder=True))
    tower = next(c for c in found.components if c.role == "encoder[image]" and c.decision == "compile")
    assert [a.remedy for a in tower.another if a.what == "another size of a fixed dim"] == ([advice] if advice else [])


# -- real architectures ----------------------------------------------------------------------------------------------


class FixedExperts(Step3p7Experts):
    """All experts on all tokens, weighted: no loop that reads a tensor."""

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
        chosen = torch.nn.functional.one_hot(top_k_index, self.num_experts).to(hidden_states.dtype)
        weights = (chosen * top_k_weights.unsqueeze(-1)).sum(1)
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            out = out + weights[:, expert : expert + 1] * self._expert(hidden_states, expert)
        return out

    def _expert(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        gate, up = nn.functional.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
        gate = self.act_fn(gate)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)
        return nn.functional.linear(gate * up, self.down_proj[expert])


@pytest.fixture
def looping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the policy's own recipe for experts that loop over data, step3p7 cannot be captured."""
    monkeypatch.setattr("compile_policy_transformers.recipes.looping_experts", lambda module: [])


@pytest.mark.usefixtures("looping")
def test_step3p7_fails_where_it_says_and_the_remedy_helps() -> None:
    """The loop over experts is named with its line; with the class replaced as advised, there is one graph."""
    planned = _component(explain("tiny:step3p7"))
    assert "modeling_step3p7.py" in planned.dims_unknown
    model: Any = cp.apply(tiny_model("step3p7"), EAGER)
    expected = _generate(model)
    found = _component(explain(model))
    assert found.eager_calls == found.calls == 3 and found.failure is not None
    assert found.failure.code == "for expert_idx in hit:" and found.failure.cls == "Step3p7Experts"
    assert found.failure.place.startswith("modeling_step3p7.py:") and found.failure.data_dependent
    assert "replace Step3p7Experts" in found.failure.remedy
    cp.remove(model)
    replace_layers_(model, {Step3p7Experts: FixedExperts})
    cp.apply(model, EAGER)
    assert torch.equal(_generate(model), expected)
    found = _component(explain(model))
    assert (found.graphs, found.eager_calls, found.fallback, found.failure) == (1, 0, None, None)


def test_florence2() -> None:
    """Rule, encoder-decoder, and what its calls do are told from the configuration, and are what happens."""
    planned = _component(explain("tiny:florence2"))
    assert planned.qualname == "model.language_model.decoder" and planned.cls == "BartDecoder"
    [rule] = [rule.why for rule in RULES if rule.model_type == "florence2"]
    assert f"rule for florence2: {rule}" in planned.facts
    assert any("encoder-decoder" in fact for fact in planned.facts)
    assert any(fact.startswith("get_decoder() answers BartModel (model.language_model)") for fact in planned.facts)
    model: Any = tiny_model("florence2")
    found = find_components(model)
    named = [f for f in found if f.role == "decoder"]
    inputs = tiny_inputs(model, text_len=8, images=[(64, 96)])
    assert called_components(model, named, inputs) == {"model.language_model.decoder"}
    called: list[int] = []
    model.get_decoder().register_forward_pre_hook(lambda *_: called.append(1))
    cp.apply(model, EAGER)
    _generate(model)
    ran = _component(explain(model))
    assert called == [] and ran.calls == 3 and ran.facts == planned.facts
    if ran.fallback is None:  # its cache is compiled: then sizes are known before the run as well
        assert ran.eager_calls == 0 and ran.entries
    else:
        assert ran.eager_calls == 3 and planned.dims_unknown.endswith(f"runs eager: {ran.fallback}")


def test_fuyu() -> None:
    """That there is no encoder to compile is said with what the model answers; the decoder is one graph."""
    found = explain("tiny:fuyu")
    assert found.facts == ("there is no image encoder to compile: get_encoder('image') answers the model itself",)
    model: Any = meta_model(AutoConfig.for_model("fuyu"))
    assert model.get_encoder(modality="image") is model
    assert not any(c.role.startswith("encoder") for c in found.components)
    with pytest.raises(cp.PolicyError, match="no separate"):
        cp.apply(tiny_model("fuyu"), cp.CompilationConfig(compile_mm_encoder=True))
    ran: Any = cp.apply(tiny_model("fuyu"), EAGER)
    _generate(ran)
    decoder = _component(explain(ran))
    assert (decoder.graphs, decoder.eager_calls, decoder.fallback) == (1, 0, None)
    assert decoder.sizes == _component(found).sizes


@pytest.mark.slow
def test_a_lora_wrapped_model() -> None:
    """Wrapped layers are part of the graph; switching adapters off is another graph with that reason, as said."""
    peft = pytest.importorskip("peft")
    model: Any = tiny_model("llama")
    options = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, options).eval()
    [fact] = explain(wrapped, config=EAGER).facts
    assert fact.startswith("4 layers are wrapped by peft (active: default)") and "needs another graph" in fact
    cp.apply(wrapped, EAGER)
    tuned = _generate(wrapped)
    with cp.eager(wrapped):
        assert torch.equal(_generate(wrapped), tuned)
    assert _component(explain(wrapped)).graphs == 1
    with wrapped.disable_adapter():
        assert "(switched off)" in explain(wrapped).facts[0]
        plain = _generate(wrapped)
        with cp.eager(wrapped):
            assert torch.equal(_generate(wrapped), plain)
    found = _component(explain(wrapped))
    assert found.graphs == len(found.entries) == 2 and found.eager_calls == 0
    assert "_disable_adapters" in found.entries[1].because
    assert not torch.equal(plain, tuned)
    _generate(wrapped)
    assert regions(wrapped)[0].graphs == 2


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_the_command_fits_the_terminal(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """No line is longer than the terminal, and every component, label and reason is there at either width."""
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["explain", "tiny:qwen2_5_vl", "--compile-mm-encoder"]) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= width
    flat = " ".join(out.split())
    for said in ("Qwen2_5_VLTextModel", f"{CACHE}.layers[0-1].keys", "batch x 1 x sequence x past+sequence"):
        assert said in flat
    for said in ("tokens in the cache (rule)", "two sets of pictures (probe)", f"another kind of {CACHE}"):
        assert said in flat
    assert "DynamicCache" in flat and "Use one kind" in flat


@pytest.mark.usefixtures("looping")
def test_a_run_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    """``--run --json`` is one object with what happened; ``--events`` has the same events as lines."""
    file = tmp_path / "events.jsonl"
    assert main(["explain", "tiny:step3p7", "--run", "--json", "--events", str(file), "-cc.backend=eager"]) == 0
    found = json.loads(capsys.readouterr().out)
    decoder = found["components"][0]
    assert found["ran"] and decoder["eager_calls"] == 4 and decoder["failure"]["cls"] == "Step3p7Experts"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(e["kind"], e["data"]) for e in lines] == [(e["kind"], e["data"]) for e in found["events"]]
    assert [e["kind"] for e in lines] == ["attached", "compile_start", "compile_failed", "fallback"]
    assert lines[3]["data"]["file"].endswith("modeling_step3p7.py")


@pytest.mark.slow
@pytest.mark.usefixtures("looping")
def test_a_run_that_fails_to_compile_shows_the_line(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """The model's line stands alone in the text, with class, cause, rule and remedy around it."""
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["explain", "tiny:step3p7", "--run", "-cc.backend=eager"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    at = lines.index("for expert_idx in hit:")
    assert lines[at - 1].startswith("modeling_step3p7.py:") and lines[at - 1].endswith("in Step3p7Experts.forward")
    assert lines[at + 1].startswith("cause:") and lines[at + 2].startswith("rule:")
    assert lines[at + 3].startswith("remedy:")


def test_mistakes_of_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    """Events without a run, and a file that cannot be written, are one line each."""
    assert main(["explain", "tiny:llama", "--events", str(tmp_path / "e")]) == 2
    assert "without --run" in capsys.readouterr().err
    assert main(["explain", "tiny:llama", "--run", "--events", str(tmp_path / "no" / "e")]) == 2
    err = capsys.readouterr().err
    assert "cannot write" in err and err.count("\n") == 1
