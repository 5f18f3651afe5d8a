"""The tools for authors of models pass what is one graph, and name the argument or the line otherwise."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compile_policy as cp
from compile_policy.applied import regions
from compile_policy.decorators import support_torch_compile, use_config
from compile_policy.testing import assert_compiles_once, capture, limited
from compile_policy_transformers import tiny_inputs, tiny_model
from compile_policy_transformers.cache_argument import CACHE

pytest_plugins = "pytester"
ROOT = Path(__file__).resolve().parents[1]
EAGER = cp.CompilationConfig(backend="eager")


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, k: int = 2) -> torch.Tensor:
        if k == 5:
            x = x if x.sum() > 1 else -x
        return self.linear(x) * k  # type: ignore[no-any-return]


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled()
        self.idle = Scaled()

    def forward(self, x: torch.Tensor, k: int = 2) -> torch.Tensor:
        return self.inner(x, k) + 1  # type: ignore[no-any-return]


@pytest.fixture
def decorated() -> Iterator[nn.Module]:
    cls = support_torch_compile(type("Decorated", (Scaled,), {}))
    with use_config(EAGER):
        holder = Holds()
        holder.inner = cls()
    yield holder


# -- assert_compiles_once ---------------------------------------------------------------------------------------------


def test_one_graph_passes_and_leaves_no_trace() -> None:
    """Calls as mappings, tuples and single arguments; afterwards the module is what it was."""
    module = Scaled()
    before = dict(vars(module))
    assert_compiles_once(module, [torch.ones(2, 4), (torch.ones(3, 4),), {"x": torch.ones(7, 4)}])
    assert vars(module) == before and regions(module) == []


def test_another_constant_names_the_argument() -> None:
    """Two values of one argument are two graphs; the message says which argument and which values."""
    with pytest.raises(AssertionError, match=r"needed 2 graphs\. graph 1: argument k is 4, was 3"):
        assert_compiles_once(Scaled(), [(torch.ones(2, 4), 3), (torch.ones(2, 4), 4)])


def test_another_fixed_size_names_the_argument() -> None:
    """A size that was not said to vary is named with its argument; said to vary, it is one graph."""
    calls = [torch.ones(2, 3, 4), torch.ones(2, 5, 4)]
    with pytest.raises(AssertionError, match=r"graph 1: x: .*static sizes \['\*', 5, 4\].*was .*\['\*', 3, 4\]"):
        assert_compiles_once(Scaled(), calls)
    assert_compiles_once(Scaled(), calls, dynamic_arg_dims={"x": {0: "rows", 1: "tokens"}})


def test_a_line_that_cannot_be_compiled_is_named() -> None:
    """File, line, source text, cause and remedy are in the message."""
    with pytest.raises(AssertionError) as caught:
        assert_compiles_once(Scaled(), (torch.ones(2, 4), 5))
    message = str(caught.value)
    line = Path(__file__).read_text().splitlines().index("            x = x if x.sum() > 1 else -x") + 1
    assert f"{__file__}:{line}: `x = x if x.sum() > 1 else -x`" in message
    assert "component Scaled ran eager: " in message and "values of a tensor" in message and "torch.where" in message


def test_a_part_of_a_plain_module() -> None:
    """`component` is a path; one that is not there, and one that is never called, are told."""
    assert_compiles_once(Holds(), torch.ones(2, 4), component="inner")
    with pytest.raises(AssertionError, match="Holds has no part 'innr'"):
        assert_compiles_once(Holds(), torch.ones(2, 4), component="innr")
    with pytest.raises(AssertionError, match="component idle was never called"):
        assert_compiles_once(Holds(), torch.ones(2, 4), component="idle")


def test_a_decorated_class_inside_a_module(decorated: nn.Module) -> None:
    """Regions that are there are used, by path and by class, and stay."""
    assert_compiles_once(decorated, [torch.ones(2, 4), torch.ones(5, 4)])
    assert_compiles_once(decorated, torch.ones(3, 4), component="inner")
    assert_compiles_once(decorated, torch.ones(3, 4), component="Decorated")
    assert [region.graphs for region in regions(decorated)] == [1]
    with pytest.raises(
        AssertionError, match=r"no compiled component 'decoder'\. Components: component inner \(Decorated\)"
    ):
        assert_compiles_once(decorated, torch.ones(3, 4), component="decoder")
    with pytest.raises(AssertionError, match=r"component inner needed 2 graphs\. graph 1: argument k is 3, was"):
        assert_compiles_once(decorated, {"x": torch.ones(3, 4), "k": 3})


def _generate(model: Any, inputs: dict[str, Any]) -> Any:
    return model.generate(**inputs, max_new_tokens=3, do_sample=False)


def test_a_model_of_transformers() -> None:
    """`generate` is one graph of the decoder; a component that the plan leaves eager is told with its reason."""
    model = tiny_model("llama")
    calls = [tiny_inputs(model, text_len=n, images=[]) for n in (4, 9)]
    assert_compiles_once(model, calls, component="decoder", call=_generate)
    assert regions(model) == [] and cp.report(model).components == ()
    with pytest.raises(AssertionError, match=r"no compiled component 'head'.*head lm_head \(Linear\): skip, never"):
        assert_compiles_once(model, calls, component="head", call=_generate)
    cp.apply(model, EAGER)
    with pytest.raises(AssertionError, match=rf"needed 2 graphs.*{CACHE}"):
        assert_compiles_once(
            model,
            ["dynamic", "static"],
            call=lambda m, kind: m.generate(**calls[0], max_new_tokens=3, cache_implementation=kind),
        )
    assert [region.graphs for region in regions(model)] == [2]


# -- capture ----------------------------------------------------------------------------------------------------------


def test_capture() -> None:
    """Operations with the model's lines, sizes with their labels, conditions in words, and text that parses."""
    found = capture(Scaled(), torch.ones(3, 4))
    assert [op.rpartition(".")[2] for op in found.ops] == ["linear", "mul"]
    assert all("return self.linear(x) * k" in line for line in found.lines) and len(found.lines) == 2
    assert found.lines[0].startswith("test_testing_plugin.py:")
    assert list(found.sizes) == ["x"] and found.sizes["x"][1] == 4 and isinstance(found.sizes["x"][0], str)
    assert found.conditions == () and found.entry.road == "jit"
    ast.parse(re.sub(r"^.*\x1b.*$", "", found.code, flags=re.M).strip() or "x")
    with pytest.raises(AssertionError, match="needed 2 graphs"):
        capture(Scaled(), [(torch.ones(2, 4), 3), (torch.ones(2, 4), 4)])


# -- the marker -------------------------------------------------------------------------------------------------------

_SUITE = """
import torch, pytest
from torch import nn
import compile_policy as cp

@cp.support_torch_compile(config=cp.CompilationConfig(backend="eager"))
class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, k: int = 2) -> torch.Tensor:
        if k == 5:
            x = x if x.sum() > 1 else -x
        return x * k

@pytest.mark.max_graphs(1)
def test_fits():
    module = Scaled()
    for n in (2, 3):
        module(torch.ones(n))

@pytest.mark.max_graphs(1)
def test_too_many():
    module = Scaled()
    module(torch.ones(2)), module(torch.ones(2), 3)

@pytest.mark.max_graphs(2)
def test_eager():
    Scaled()(torch.ones(2), 5)

@pytest.mark.max_graphs(2, eager=True)
def test_eager_is_wanted():
    Scaled()(torch.ones(2), 5)

@pytest.mark.max_graphs(0, component="decoder")
def test_another_component():
    Scaled()(torch.ones(2))

@pytest.mark.max_graphs(0)
def test_fails_by_itself():
    Scaled()(torch.ones(2))
    assert 1 == 2

@pytest.mark.max_graphs
def test_without_a_number():
    pass

def test_events(policy_events):
    Scaled()(torch.ones(2))
    assert [event.kind for event in policy_events] == ["attached", "compile_start", "compile_end"]
"""


def test_the_marker_in_a_suite(pytester: pytest.Pytester) -> None:
    """Too many graphs, and eager runs, fail with argument and line; a test's own failure stays what it is."""
    pytester.makepyfile(test_suite=_SUITE)
    result = pytester.runpytest_inprocess("-p", "pytest_compile_policy", "--strict-markers")
    result.assert_outcomes(passed=4, failed=4)
    text = result.stdout.str()
    assert "2 graphs were compiled, at most 1 may be" in text
    assert "component: another graph is needed: argument k is 3, was" in text
    assert "test_suite.py:9: `x = x if x.sum() > 1 else -x`" in text and "torch.where" in text
    assert "assert 1 == 2" in text and text.count("at most 0 may be") == 0
    assert "max_graphs needs a number" in text


def test_limited_counts_what_is_inside_only() -> None:
    """A graph from before does not count, and one more than allowed does."""
    cls = support_torch_compile(type("Limited", (Scaled,), {}))
    with use_config(EAGER):
        module = cls()
    module(torch.ones(2, 4))
    with limited(0):
        module(torch.ones(3, 4))
    with pytest.raises(AssertionError, match="1 graphs were compiled, at most 0"), limited(0):
        module(torch.ones(3, 4), 7)


def test_the_plugin_is_light() -> None:
    """Loading the plug-in, as every run of pytest does where the package is installed, loads no torch."""
    code = (
        "import sys, pytest_compile_policy; print([m for m in ('torch', 'compile_policy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "backends")}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_the_example(pytester: pytest.Pytester, capsys: pytest.CaptureFixture[str]) -> None:
    """The example's tests pass, and its message names the loop."""
    example = ROOT / "examples" / "test_one_graph.py"
    result = pytester.runpytest_inprocess("-p", "pytest_compile_policy", "--rootdir", str(pytester.path), str(example))
    result.assert_outcomes(passed=3)
    module: dict[str, Any] = {"__name__": "example"}
    exec(compile(example.read_text(), str(example), "exec"), module)
    capsys.readouterr()
    module["main"]()
    out = capsys.readouterr().out
    assert "`while self.loops and x.norm() > 1:`" in out and "the while depends on the values of a tensor" in out
