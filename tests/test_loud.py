"""A call of a component that runs eager though it was to be compiled is told: once a reason, where the user called."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from falling import falls_back
from torch import nn

import compile_policy as cp
from compile_policy import caller, fallbacks
from compile_policy.errors import BudgetExceeded, CompileFault, PolicyWarning
from compile_policy.region import Region, RegionOptions, SignatureBinder
from compile_policy_transformers import tiny_inputs, tiny_model


class Net(nn.Module):
    """A layer, and everything that a call can bring along."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, extra: Any = None, k: int = 1) -> Any:
        y = self.layer(x) * k
        return (y, 3) if extra == "object" else y


def region(**options: Any) -> Region:
    module = Net().eval()
    made = Region(
        module,
        role="component",
        qualname="net",
        binder=SignatureBinder({"x": {0: None}}),
        options=RegionOptions("eager", **options),
    )
    made.attach()
    return made


class Sub(torch.Tensor):
    """A tensor with rules of its own, as a DTensor is."""


def unreturnable(ours: Region) -> Any:
    return ours.module(torch.ones(2, 4), "object")


def subclass(ours: Region) -> Any:
    return ours.module(torch.ones(2, 4).as_subclass(Sub))


def no_adapter(ours: Region) -> Any:
    return ours.module(torch.ones(2, 4), threading)


def sparse(ours: Region) -> Any:
    return ours.module(torch.ones(2, 4).to_sparse())


def hooked(ours: Region) -> Any:
    with ours.module.register_full_backward_hook(lambda *_: None):
        return ours.module(torch.ones(2, 4))


def hooked_inside(ours: Region) -> Any:
    with ours.module.layer.register_forward_hook(lambda *_: None):  # type: ignore[union-attr]
        return ours.module(torch.ones(2, 4))


def in_a_mode(ours: Region) -> Any:
    with torch.overrides.BaseTorchFunctionMode():
        return ours.module(torch.ones(2, 4))


def over_budget(ours: Region) -> Any:
    ours.options = RegionOptions("eager", max_entries=1, on_budget="eager", on_fault=ours.options.on_fault)
    for k in (1, 2):
        result = ours.module(torch.ones(2, 4), None, k)
    return result


CAUSES: dict[str, tuple[Callable[[Region], Any], str]] = {
    "what no graph returns": (unreturnable, "returns a int"),
    "a tensor subclass": (subclass, "a tensor subclass with its own rules"),
    "an argument without an adapter": (no_adapter, "cannot be passed to a graph"),
    "a layout": (sparse, "only strided tensors are compiled"),
    "a hook on the component": (hooked, "has a backward hook"),
    "a hook inside": (hooked_inside, "layer has a hook"),
    "a mode of torch": (in_a_mode, "TorchFunctionMode"),
    "the budget": (over_budget, "max_entries=1"),
}


def _line_of(function: Callable[..., Any]) -> range:
    first = function.__code__.co_firstlineno
    return range(first, first + 8)


@pytest.mark.parametrize("cause", CAUSES)
def test_every_cause_is_told_where_the_user_called(cause: str) -> None:
    """One warning for all calls, at the line that called, with reason and remedy; all calls are counted."""
    call, reason = CAUSES[cause]
    ours = region()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            call(ours)
    (told,) = caught
    assert issubclass(told.category, PolicyWarning) and told.filename == __file__ and told.lineno in _line_of(call)
    text = str(told.message)
    assert text.startswith("component net runs eager: ") and reason in text
    assert text.endswith(".") and ours.remedy and text.endswith(ours.remedy)
    row = ours.report()
    assert row.state == "fell back" and list(row.fallbacks.values()) == [row.eager_calls] and row.eager_calls == 3
    assert row.remedy == ours.remedy


@pytest.mark.parametrize("cause", CAUSES)
def test_each_is_raised_where_asked(cause: str) -> None:
    """``on_fault="error"``: every call raises with component, reason and remedy, and nothing is warned of."""
    call, reason = CAUSES[cause]
    ours = region(on_fault="error")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PolicyWarning)
        for _ in range(2):
            with pytest.raises(CompileFault) as raised:
                call(ours)
            assert reason in str(raised.value) and str(raised.value).startswith("component net: ")


def test_the_users_own_mistake_stays_the_users() -> None:
    """A bad shape or dtype raises what eager raises, under either way of treating faults, and is no fallback."""
    for options in ({}, {"on_fault": "error"}):
        ours = region(**options)
        for bad in (torch.ones(2, 5), torch.ones(2, 4, dtype=torch.int64)):
            with pytest.raises(RuntimeError) as wanted:
                ours.module.forward(bad)
            with pytest.raises(RuntimeError) as found:
                ours.module(bad)
            assert str(found.value) == str(wanted.value) and not isinstance(found.value, CompileFault)
        assert ours.report().state == "idle" and not ours.report().fallbacks
        ours.module(torch.ones(2, 4))
        assert ours.report().state == "compiled"


def test_what_is_meant_to_run_eager_is_no_fallback() -> None:
    """Paused, switched off, or inside the user's own compile: not a word, and nothing is counted."""
    ours = region(on_fault="error")
    x = torch.ones(2, 4)
    with ours.pause():
        ours.module(x, "object")
    torch.compile(lambda: ours.module(x), backend="eager", fullgraph=True)()
    assert ours.report().calls == 0
    model = tiny_model("llama")
    cp.apply(model, cp.CompilationConfig(enabled=False, on_fault="error"))
    with torch.no_grad():
        model(**tiny_inputs(model, text_len=4))
    assert {row.state for row in cp.report(model).components} == {"eager"}


def test_a_budget_that_raises_is_no_fallback_either() -> None:
    """``on_budget="error"`` raises before anything runs."""
    ours = region(max_entries=1, on_budget="error")
    ours.module(torch.ones(2, 4))
    with pytest.raises(BudgetExceeded):
        ours.module(torch.ones(2, 4), None, 2)
    assert (ours.report().state, ours.report().eager_calls) == ("compiled", 0)


def test_reasons_that_differ_in_numbers_are_one() -> None:
    """Errors and sizes change from call to call; the reason is the same. Endless reasons are counted together."""
    told = fallbacks.Fallbacks()
    assert [told.add(r) for r in ("differs by 1.5e-3", "differs by 2", "is a Bag")] == [True, False, True]
    assert told.counts() == {"differs by 1.5e-3": 2, "is a Bag": 1}
    letters = [chr(ord("a") + i % 26) * (1 + i // 26) for i in range(2 * fallbacks.MOST)]
    assert sum(told.add(letter) for letter in letters) == fallbacks.MOST - 2 + 1
    assert len(told.counts()) == fallbacks.MOST + 1 and len(told) == 3 + len(letters)


# -- the user's line --------------------------------------------------------------------------------------------------


def _generated(model: Any) -> None:
    inputs = tiny_inputs(model, text_len=5)
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)


@pytest.fixture
def hooked_model() -> Iterator[Any]:
    model = tiny_model("llama")
    cp.apply(model, cp.CompilationConfig(backend="eager"))
    with model.model.layers[0].register_forward_hook(lambda *_: None):
        yield model


def test_through_generate(hooked_model: Any) -> None:
    """Many frames of Transformers and torch between: the line is the one that called ``generate``."""
    with pytest.warns(PolicyWarning, match="has a hook") as caught:
        _generated(hooked_model)
    (told,) = caught
    assert told.filename == __file__ and "model.generate(" in Path(__file__).read_text().splitlines()[told.lineno - 1]


def test_from_a_thread_of_a_library(hooked_model: Any) -> None:
    """A streamer's way of generating has no line of the user's: the one that applied the policy is named."""
    inputs = tiny_inputs(hooked_model, text_len=5)
    options = {**inputs, "max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread = threading.Thread(target=hooked_model.generate, kwargs=options)
        thread.start()
        thread.join()
    (told,) = [w for w in caught if issubclass(w.category, PolicyWarning)]
    assert told.filename == __file__ and "cp.apply(" in Path(__file__).read_text().splitlines()[told.lineno - 1]


def test_filters_do_what_they_say(hooked_model: Any) -> None:
    """By the user's module: silent, or an error at the call; a filter for this package changes nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=PolicyWarning)
        warnings.filterwarnings("ignore", module=__name__)
        _generated(hooked_model)
    cp.apply(hooked_model, cp.CompilationConfig(backend="eager"))
    with warnings.catch_warnings(), pytest.raises(PolicyWarning, match="has a hook"):
        warnings.filterwarnings("ignore", module="compile_policy")
        warnings.filterwarnings("error", module=__name__)
        _generated(hooked_model)


def test_every_other_warning_is_at_the_users_line_too() -> None:
    """Of `apply`, `load_model` and a configuration."""
    model = tiny_model("qwen2_5_vl")
    with pytest.warns(PolicyWarning) as caught:
        cp.apply(model, cp.CompilationConfig(compile_mm_encoder=True, splitting_ops=["aten::mm"]))
        cp.load_model("tiny:qwen2_5_vl", config=cp.CompilationConfig(compile_mm_encoder=True))
        cp.CompilationConfig.from_sources(environ={"COMPILE_POLICY_MODEE": "1"})
    ours = [w for w in caught if issubclass(w.category, PolicyWarning)]
    assert len(ours) == 4 and {w.filename for w in ours} == {__file__}
    lines = Path(__file__).read_text().splitlines()
    assert [lines[w.lineno - 1].strip()[:6] for w in ours] == ["cp.app", "cp.app", "cp.loa", "cp.Com"]


def test_without_a_frame_of_the_users() -> None:
    """Only libraries in the stack: the given place, else the outermost frame; never this package's."""
    names = {"__name__": "transformers.fake", "warn": caller.warn_user}
    namespace: dict[str, Any] = dict(names)
    exec("def run(**options):\n    warn('here', **options)", namespace)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread = threading.Thread(target=namespace["run"])
        thread.start()
        thread.join()
        place = caller.Place("/somewhere/mine.py", 7, "mine")
        thread = threading.Thread(target=namespace["run"], kwargs={"otherwise": place})
        thread.start()
        thread.join()
    assert [(Path(w.filename).name, w.lineno) for w in caught][1] == ("mine.py", 7)
    assert caught[0].filename == threading.__file__ and "compile_policy" not in caught[0].filename


# -- the report -------------------------------------------------------------------------------------------------------


def test_the_report_says_what_happened(hooked_model: Any) -> None:
    """Idle, then fallen back: as data, and as a table with reason, count and remedy; never one line of a dataclass."""
    head, *_ = [row for row in cp.report(hooked_model).components if row.role == "head"]
    assert head.state == "eager"
    before = str(cp.report(hooked_model))
    assert "idle" in before and "fell back" not in before
    with falls_back("has a hook"):
        hooked_model(**tiny_inputs(hooked_model, text_len=5))
        hooked_model(**tiny_inputs(hooked_model, text_len=6))
    text = str(cp.report(hooked_model))
    lines = text.splitlines()
    assert lines[0].split() == [
        "component",
        "path",
        "class",
        "state",
        "calls",
        "eager",
        "graphs",
        "loaded",
        "compile",
        "s",
    ]
    assert lines[1].startswith("decoder") and "fell back" in lines[1] and lines[1].split()[-5:-3] == ["2", "2"]
    assert "decoder model fell back in 2 of 2 calls: layers.0 has a hook" in text and "Remove the hook" in text
    row = cp.report(hooked_model).to_dict()["components"][0]
    assert (row["state"], row["fallbacks"]) == ("fell back", {"layers.0 has a hook": 2})
    assert max(map(len, lines[:3])) < 120 and "ComponentReport" not in text


def test_a_part_of_the_calls_is_said_so() -> None:
    """Compiled calls before and after a fallback: the state is that one fell back, and how many."""
    ours = region()
    for n in (2, 3, 4):
        ours.module(torch.ones(n, 4))
    with falls_back("tensor subclass"):
        subclass(ours)
    row = ours.report()
    assert (row.state, row.calls, row.eager_calls) == ("fell back", 4, 1)
    assert row.told()[0].startswith("component net fell back in 1 of 4 calls: argument x is a Sub")


def test_the_stack_is_not_walked_by_calls_that_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user called is looked up for a warning alone."""
    ours = region()
    ours.module(torch.ones(2, 4))

    def walked() -> None:
        raise AssertionError("looked for the user's line")

    monkeypatch.setattr(caller, "_users_frame", walked)
    ours.module(torch.ones(3, 4))
    assert ours.report().state == "compiled"
