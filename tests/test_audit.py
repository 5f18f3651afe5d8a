"""Every guard is accounted for, and what is said to cover it does: after a change there is another graph."""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from falling import falls_back
from torch import nn

import compile_policy as cp
from compile_policy import audit, events, watched
from compile_policy.applied import regions
from compile_policy.audit import COVERS
from compile_policy.cover import lookup_tables
from compile_policy.entry import Entry
from compile_policy.fingerprint import Fingerprint
from compile_policy.region import Region, RegionOptions, SignatureBinder
from compile_policy.watched import Watched
from compile_policy_transformers.tiny import tiny_inputs, tiny_model

FACTOR = 2.0
COUNT = 3
WEIGHTS = [1.0, 2.0]
TABLE: dict[str, Any] = {"a": 2.0, "f": torch.relu}
NAMES = {"plus"}
SETTINGS = SimpleNamespace(scale=2.0, nested=SimpleNamespace(shift=1.0))
OFFSET = torch.tensor(1.0)


def helper(x: torch.Tensor, by: float = 2.0, *, plus: float = 1.0) -> torch.Tensor:
    return x * by + plus


def other(x: torch.Tensor, by: float = 5.0, *, plus: float = 0.5) -> torch.Tensor:
    return x * 7


def closing_over(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * factor

    return scaled


scaled = closing_over(2.0)


def _scale(x: torch.Tensor, by: float) -> torch.Tensor:
    return x * by


def _nested(levels: int, **values: Any) -> SimpleNamespace:
    """A namespace with ``values`` so many levels below it, each in the attribute ``below``."""
    found = SimpleNamespace(**values)
    for _ in range(levels):
        found = SimpleNamespace(below=found)
    return found


class Scale:
    """A callable with a state."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Config:
    """What properties and class attributes of a configuration do."""

    rank = 2

    def __init__(self) -> None:
        self._hidden = 2.0

    @property
    def hidden(self) -> float:
        return self._hidden


class Base(nn.Module):
    heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.config = Config()
        self.scale = Scale(2.0)
        self.partial = functools.partial(_scale, by=2.0)
        self.deep = SimpleNamespace(a=SimpleNamespace(b=SimpleNamespace(c=_nested(4, d=2.0))))
        self.unregistered = [nn.Linear(4, 4)]
        self.how = ""


class Block(Base):
    """Does what ``how`` says; each way reads something of another kind."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        how = self.how
        if how == "global":
            return x * FACTOR
        if how == "whole number":
            return x * COUNT
        if how == "list":
            return x * WEIGHTS[0] + len(WEIGHTS)
        if how == "table":
            return TABLE["f"](x) * TABLE["a"]
        if how == "key":
            return x * 2 if "late" in TABLE else x * 1
        if how == "member":
            return x * 2 if "plus" in NAMES else x * 1
        if how == "settings":
            return x * SETTINGS.scale + SETTINGS.nested.shift
        if how == "tensor":
            return x + OFFSET
        if how == "helper":
            return helper(x)
        if how == "closure":
            return scaled(x)
        if how == "torch":
            return F.silu(x)
        if how == "builtin":
            return x * max(1.0, 2.0)
        if how == "class count":
            return x * self.heads
        if how == "callable":
            return self.scale(x)
        if how == "partial":
            return self.partial(x)
        if how == "property":
            return x * self.config.hidden
        if how == "rank":
            return x * self.config.rank
        if how == "has":
            return x * 3 if hasattr(self.config, "late") else x * 1
        if how == "deep":
            return x * self.deep.a.b.c.below.below.below.below.d
        return self.unregistered[0](x)


class OtherScale(Scale):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.factor


Patch = pytest.MonkeyPatch
#: name -> (how the block computes, what is changed after the capture, the cover of a guard that has this in its name).
CASES: dict[str, tuple[str, Callable[[Block, Patch], Any], str, str]] = {
    "global float": ("global", lambda b, p: p.setitem(globals(), "FACTOR", 5.0), "check", "FACTOR"),
    "global int": ("whole number", lambda b, p: p.setitem(globals(), "COUNT", 4), "check", "COUNT"),
    "global tensor": ("tensor", lambda b, p: p.setitem(globals(), "OFFSET", torch.tensor(5.0)), "check", "OFFSET"),
    "list in place": ("list", lambda b, p: WEIGHTS.__setitem__(0, 9.0), "check", "WEIGHTS"),
    "list longer": ("list", lambda b, p: p.setitem(globals(), "WEIGHTS", [1.0, 2.0, 3.0]), "check", "WEIGHTS"),
    "dict item": ("table", lambda b, p: p.setitem(TABLE, "a", 9.0), "check", "TABLE"),
    "function in a registry": ("table", lambda b, p: p.setitem(TABLE, "f", torch.sigmoid), "check", "TABLE"),
    "key that was absent": ("key", lambda b, p: p.setitem(TABLE, "late", 1), "check", "TABLE"),
    "member of a set": ("member", lambda b, p: p.setitem(globals(), "NAMES", set()), "check", "NAMES"),
    "object in a global": ("settings", lambda b, p: p.setattr(SETTINGS, "scale", 9.0), "check", "SETTINGS"),
    "object below it": ("settings", lambda b, p: p.setattr(SETTINGS.nested, "shift", 9.0), "check", "SETTINGS"),
    "function replaced": ("helper", lambda b, p: p.setitem(globals(), "helper", other), "check", "helper"),
    "code replaced": ("helper", lambda b, p: p.setattr(helper, "__code__", other.__code__), "check", "helper"),
    "default": ("helper", lambda b, p: p.setattr(helper, "__defaults__", (5.0,)), "check", "__defaults__"),
    "keyword default": ("helper", lambda b, p: p.setattr(helper, "__kwdefaults__", {"plus": 7.0}), "check", "plus"),
    "cell": ("closure", lambda b, p: p.setattr(_cell(), "cell_contents", 9.0), "check", "cell_contents"),
    "function of torch": ("torch", lambda b, p: p.setattr(F, "silu", torch.relu), "check", "silu"),
    "built-in hidden": ("builtin", lambda b, p: p.setitem(globals(), "max", lambda a, b: 7.0), "check", "max"),
    "count on a class": ("class count", lambda b, p: p.setattr(Base, "heads", 5), "check", "heads"),
    "count on a subclass": ("class count", lambda b, p: p.setattr(Block, "heads", 5, raising=False), "check", "heads"),
    "state of a callable": ("callable", lambda b, p: p.setattr(b.scale, "factor", 9.0), "check", "factor"),
    "class of a callable": ("callable", lambda b, p: setattr(b.scale, "__class__", OtherScale), "check", "scale"),
    "method of a callable": (
        "callable",
        lambda b, p: p.setattr(Scale, "__call__", lambda s, x: x - 1),
        "check",
        "__call__",
    ),
    "keyword of a partial": ("partial", lambda b, p: p.setitem(b.partial.keywords, "by", 9.0), "check", "partial"),
    "partial": ("partial", lambda b, p: setattr(b, "partial", torch.relu), "fingerprint", "partial"),
    "value behind a property": ("property", lambda b, p: setattr(b.config, "_hidden", 9.0), "fingerprint", "_hidden"),
    "property": ("property", lambda b, p: p.setattr(Config, "hidden", property(lambda c: 9.0)), "check", "hidden"),
    "count of a configuration": ("rank", lambda b, p: p.setattr(Config, "rank", 9), "check", "rank"),
    "attribute that was absent": ("has", lambda b, p: setattr(b.config, "late", 1), "check", "config"),
    "deep object": ("deep", lambda b, p: setattr(b.deep.a.b.c.below.below.below.below, "d", 9.0), "check", "deep"),
    "module in a list": ("modules", lambda b, p: b.unregistered.__setitem__(0, nn.Linear(4, 4)), "fingerprint", "ed"),
    "weight of it": ("modules", lambda b, p: setattr(b.unregistered[0], "weight", _ones()), "check", "weight"),
}


def _cell() -> types.CellType:
    (cell,) = scaled.__closure__ or ()
    return cell


def _ones() -> nn.Parameter:
    return nn.Parameter(torch.ones(4, 4))


def region(module: nn.Module) -> Region:
    return Region(module, role="t", binder=SignatureBinder({"x": {0: None}}), options=RegionOptions("eager"))


@pytest.fixture(autouse=True)
def lists_as_before() -> Iterator[None]:
    kept = list(WEIGHTS)
    yield
    WEIGHTS[:] = kept


def entries(ours: Region) -> list[Entry]:
    return [entry for found in ours.entries.values() for entry in found]


@pytest.mark.parametrize("case", CASES)
def test_a_guard_is_covered_as_it_says(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard has the cover that its rule says; after the change the old graph would be wrong, and is not run."""
    how, change, cover, name = CASES[case]
    block = Block().eval()
    block.how = how
    ours, x = region(block), torch.rand(3, 4)
    assert torch.equal(ours(x), block.forward(x)) and ours.fallback is None
    (entry,) = entries(ours)
    assert all(guard.covered_by in COVERS and guard.rule for guard in entry.graph.guards)
    assert cover in {guard.covered_by for guard in entry.graph.guards if name in guard.name}
    told: list[Any] = []
    change(block, monkeypatch)
    with events.listening(told.append):
        got, want = ours(x), block.forward(x)
    if how != "torch":  # the eager backend looks functions of torch up when it runs
        assert not torch.equal(entry.graph.run([x])[0], want), "control: what changed does matter"
    assert torch.equal(got, want) and ours.graphs == 2 and ours.fallback is None
    (said,) = [e.data["difference"] for e in told if e.kind == "new_entry"]
    assert (
        name in said
        or cover == "fingerprint"
        or case in ("cell", "keyword default", "class of a callable", "count on a subclass", "built-in hidden")
    )


#: The walk sees that a subclass has got an attribute, and leaves the value of a whole number to the check.
CHECKED = [case for case, (_, _, cover, _) in CASES.items() if cover == "check" and case != "count on a subclass"]


@pytest.mark.parametrize("case", CHECKED)
def test_without_its_check_the_change_goes_unseen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: what is called a check is covered by nothing else. Without the watched values the number stays."""
    how, change, _, _ = CASES[case]
    block = Block().eval()
    block.how = how
    seen = Fingerprint(block)
    before = seen.current(look_again=True)
    if case == "attribute that was absent":  # of a class, so that the walk over the object does not see it
        monkeypatch.setattr(Config, "late", 1, raising=False)
    else:
        change(block, monkeypatch)
    assert seen.current(look_again=True) == before


def test_changing_back_finds_the_first_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watched value that is what it was before needs no new graph; each of its values has one."""
    block = Block().eval()
    block.how = "global"
    ours, x = region(block), torch.ones(2, 4)
    for factor in (2.0, 3.0, 2.0, 4.0, 3.0):
        monkeypatch.setitem(globals(), "FACTOR", factor)
        assert torch.equal(ours(x), x * factor)
    assert ours.graphs == 3


def test_a_value_that_the_capture_itself_changes_is_refused() -> None:
    """What no later look could find as the graph took it: the component runs eager, and the reason names it."""

    class Binder(SignatureBinder):
        def tracing(self, module: nn.Module) -> Any:
            patched = pytest.MonkeyPatch.context()

            class Patched:
                def __enter__(self) -> None:
                    patched.__enter__().setitem(globals(), "FACTOR", 9.0)

                def __exit__(self, *error: object) -> None:
                    patched.__exit__(None, None, None)

            return Patched()

    block = Block().eval()
    block.how = "global"
    ours = Region(block, role="t", binder=Binder({"x": {0: None}}), options=RegionOptions("eager"))
    x = torch.ones(2, 4)
    with falls_back("FACTOR changed while the component was compiled"):
        assert torch.equal(ours(x), x * 2.0)
    assert "FACTOR changed while the component was compiled" in str(ours.fallback)
    assert "test_audit.py" in str(ours.fallback) and ours.entry_count() == 0


def test_a_kind_of_guard_without_a_rule_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch with guards that this version does not know: eager, with the guard and the model's line as reason."""
    monkeypatch.setattr(audit, "_IDENTITY", audit._IDENTITY - {"CONSTANT_MATCH"})
    block = Block().eval()
    block.how = "global"
    ours, x = region(block), torch.ones(2, 4)
    with falls_back("guards of the kind CONSTANT_MATCH are unknown"):
        assert torch.equal(ours(x), x * 2.0) and ours.entry_count() == 0
    assert "nothing covers it: guards of the kind CONSTANT_MATCH are unknown" in str(ours.fallback)
    assert "test_audit.py:" in str(ours.fallback)


def test_modes_and_arguments_are_in_the_key() -> None:
    """Guards on modes, leaves and constants are covered by the key; sizes by conditions."""

    class Plain(nn.Module):
        def forward(self, x: torch.Tensor, by: float, shifts: list[float]) -> torch.Tensor:
            return x * by + shifts[0] + x.shape[0]

    ours = region(Plain())
    ours(torch.rand(3, 4), 2.0, [1.0])
    guards = entries(ours)[0].graph.guards
    covers = {(g.kind, g.covered_by) for g in guards}
    assert {("GRAD_MODE", "key"), ("SHAPE_ENV", "sizes"), ("TENSOR_MATCH", "key"), ("GLOBAL_STATE", "check")} <= covers
    assert {g.covered_by for g in guards if g.name.startswith("spec")} == {"key"}
    for args in [(3.0, [1.0]), (2.0, [5.0])]:
        x = torch.rand(3, 4)
        assert torch.equal(ours(x, *args), Plain()(x, *args))
    assert ours.graphs == 3


class ReadsGrad(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.grad is None else x + x.grad


class ReadsMark(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if hasattr(x, "mark") else x * 3


@pytest.mark.parametrize("module", [ReadsGrad(), ReadsMark()], ids=["grad", "own attribute"])
def test_what_hangs_on_an_argument_is_refused(module: nn.Module) -> None:
    """The key knows a tensor by its metadata; a forward that reads what was set on it runs eager, rightly each time."""
    ours = region(module)
    x = torch.rand(3, 4)
    with falls_back("an attribute of an argument"):
        assert torch.equal(ours(x), module(x)) and ours.entry_count() == 0
        x.grad, x.mark = torch.ones(3, 4), True  # type: ignore[attr-defined]
        assert torch.equal(ours(x), module(x))
    assert ours.eager_calls == 2


def test_a_property_that_fails_later_is_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a watched value never raises into the caller's call: what cannot be read is not what it was."""
    block = Block().eval()
    block.how = "settings"
    ours, x = region(block), torch.rand(3, 4)
    ours(x)
    (entry,) = entries(ours)

    class Fails:
        @property
        def scale(self) -> float:
            raise OSError("gone")

    broken = Fails()
    value = Watched("broken.scale", "attribute", broken, "scale", 2.0)
    assert not value.holds() and not value.again().holds()
    monkeypatch.delattr(SETTINGS, "scale")
    with pytest.raises(AttributeError, match="scale"):
        ours(x)
    assert not all(w.holds() for w in entry.graph.watched)


@pytest.mark.parametrize(
    ("was", "now", "same"),
    [
        (1, 1, True),
        (1, True, False),
        (1, 1.0, False),
        (0.0, -0.0, False),
        (float("nan"), float("nan"), True),
        ("a" * 3, "aaa", True),
        ((1, 2.0), (1, 2.0), True),
        ((1, 2), (1, True), False),
        ([1], [1], False),
        (frozenset((1,)), frozenset((1,)), True),
        (SETTINGS, SimpleNamespace(scale=2.0), False),
        (Block().forward, Block().forward, False),
        (len, len, True),
    ],
    ids=str,
)
def test_two_readings_of_a_value(was: Any, now: Any, same: bool) -> None:
    """Plain values by value and type, everything else by identity: two equal lists are two lists."""
    assert watched.same(was, now) is same


def test_a_table_that_is_looked_up_may_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A declared lookup table needs no new graph when it grows, and does when the item that was read changes."""
    monkeypatch.setitem(lookup_tables, (__name__, "TABLE"), "looked up by key")
    block = Block().eval()
    block.how = "table"
    ours, x = region(block), torch.rand(3, 4)
    ours(x)
    monkeypatch.setitem(TABLE, "unrelated", 1)
    assert torch.equal(ours(x), block.forward(x)) and ours.graphs == 1
    monkeypatch.setitem(TABLE, "a", 5.0)
    assert torch.equal(ours(x), block.forward(x)) and ours.graphs == 2


# -- models ------------------------------------------------------------------------------------------------------

MORE = ("gemma3", "exaone4_5", "mllama", "llava", "qwen3", "gemma2", "glm4v", "qwen3_vl")


@pytest.fixture
def applied(request: pytest.FixtureRequest) -> Iterator[tuple[Any, dict[str, Any]]]:
    torch._dynamo.reset()
    model = tiny_model(request.param)
    vision = hasattr(model.config, "vision_config")
    with pytest.warns(cp.PolicyWarning) if vision else nullcontext():
        cp.apply(model, cp.CompilationConfig(backend="eager", compile_mm_encoder=vision))
    pictures = {"images": [(56, 84)]} if vision else {}
    yield model, tiny_inputs(model, text_len=12, seed=1, **pictures)


@pytest.mark.parametrize(
    "applied", ["llama", "qwen2_5_vl", *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)], indirect=True
)
def test_no_guard_of_a_model_is_unaccounted(applied: tuple[Any, dict[str, Any]]) -> None:
    """Decoder and tower: every guard has a cover and a rule, the watched values hold, one graph for the generation."""
    model, inputs = applied
    for _ in range(2):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    found = regions(model)
    assert found and all(r.entry_count() == r.graphs == 1 for r in found)
    for ours in found:
        (entry,) = entries(ours)
        counts = Counter(guard.covered_by for guard in entry.graph.guards)
        assert set(counts) == set(COVERS) and counts.total() == len(entry.graph.guards) > 300
        assert all(guard.rule for guard in entry.graph.guards)
        assert all(w.holds() for w in entry.graph.watched)


@pytest.mark.parametrize("applied", ["llama"], indirect=True)
def test_a_helper_of_a_model_replaced(applied: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions, attention registries and configuration classes that people patch: another graph, eager's numbers."""
    from transformers.models.llama import configuration_llama, modeling_llama

    model, inputs = applied
    (ours,) = regions(model)

    def check(graphs: int) -> None:
        got = model(**inputs).logits
        with cp.eager(model):
            want = model(**inputs).logits
        assert torch.allclose(got, want, atol=1e-5) and ours.graphs == graphs and ours.fallback is None

    check(1)
    first = entries(ours)[0]
    stock = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda q, k, *a, **kw: tuple(2 * t for t in stock(q, k, *a, **kw))
    )
    check(2)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", stock)
    check(2)  # the first graph again
    names = {w.name for w in first.graph.watched}
    assert any("ALL_ATTENTION_FUNCTIONS" in name for name in names)
    monkeypatch.setitem(configuration_llama.LlamaConfig.attribute_map, "late", "hidden_size")
    check(2)  # a key that no guard asks for
    monkeypatch.setattr(F, "silu", torch.relu)
    check(3)
