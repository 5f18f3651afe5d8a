"""Structure: what a graph takes for granted about the module, noticed when it changes, ignored when it may."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from falling import falls_back
from torch import nn

from compile_policy import events
from compile_policy.fingerprint import Fingerprint, difference, fingerprint
from compile_policy.layers import PluggableLayer
from compile_policy.layers.registry import registry_scope
from compile_policy.region import Region, RegionOptions, SignatureBinder


class Block(nn.Module):
    """Reads what real layers read: numbers, flags, a configuration object, a function, a class attribute, buffers."""

    power = 1.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.eps = 0.5
        self.act = torch.relu
        self.config = SimpleNamespace(scale=2.0, nested=SimpleNamespace(shift=1.0))
        self.weights = [1.0, 2.0]
        self.table = {"a": 3.0}
        self.loose = torch.ones(4)
        self.register_buffer("offset", torch.ones(4))

    def helper(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.linear(x)) * self.config.scale + self.config.nested.shift + self.eps
        y = y * self.weights[0] + self.table["a"] + self.offset + self.loose
        return self.helper(y) * self.power


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


def _double(m: Any, args: Any, result: Any) -> Any:
    return result * 2


def _class_helper(m: Model) -> None:
    type(m.block).helper = lambda self, x: x - 1  # type: ignore[method-assign, assignment]


def _exchange_code(m: Model) -> None:
    type(m.block).helper.__code__ = (lambda self, x: x - 1).__code__


def _replace_parameter(m: Model) -> None:
    m.block.linear.weight = nn.Parameter(torch.full((4, 4), 0.25))


def _tie_other_buffer(m: Model) -> None:
    m.block.offset = torch.full((4,), 9.0)


CHANGES: dict[str, tuple[Callable[[Model], Any], str]] = {
    "hook": (lambda m: m.block.register_forward_hook(_double), "block has a hook"),
    "pre-hook": (lambda m: m.block.register_forward_pre_hook(lambda b, a: (a[0] + 1,)), "block has a hook"),
    "number": (lambda m: setattr(m.block, "eps", 3.0), "attribute 'eps' of block is 3.0, was 0.5"),
    "negative zero": (lambda m: setattr(m.block, "eps", 0.0) or setattr(m.block, "eps", -7.0), "attribute 'eps'"),
    "activation": (lambda m: setattr(m.block, "act", torch.sigmoid), "attribute 'act' of block"),
    "configuration": (lambda m: setattr(m.block.config, "scale", -4.0), "'config.scale' of block is -4.0, was 2.0"),
    "nested configuration": (
        lambda m: setattr(m.block.config.nested, "shift", 5.0),
        "'config.nested.shift' of block is 5.0, was 1.0",
    ),
    "list": (lambda m: m.block.weights.__setitem__(0, 7.0), "attribute 'weights[0]' of block is 7.0, was 1.0"),
    "dict": (lambda m: m.block.table.__setitem__("a", 7.0), "attribute \"table['a']\" of block is 7.0, was 3.0"),
    "forward of an instance": (lambda m: setattr(m.block, "forward", lambda x: x * 0), "attribute 'forward' of block"),
    "method of the class": (_class_helper, "class attribute 'helper' of block"),
    "code of a method": (_exchange_code, "class attribute 'helper' of block is another"),
    "class attribute": (lambda m: setattr(type(m.block), "power", 2.0), "class attribute 'power' of block"),
    "parameter": (_replace_parameter, "parameter or buffer 'weight' of block.linear is another tensor"),
    "buffer": (_tie_other_buffer, "parameter or buffer 'offset' of block is another tensor"),
    "loose tensor": (lambda m: setattr(m.block, "loose", torch.full((4,), 9.0)), "attribute 'loose' of block"),
    "sub-module": (lambda m: setattr(m.block, "linear", nn.Linear(4, 4).eval()), "'weight' of block.linear"),
    "sub-module of another class": (lambda m: setattr(m.block, "linear", nn.Identity()), "class of block.linear"),
    "sub-module added": (lambda m: m.block.add_module("extra", nn.Linear(1, 1)), "the module tree"),
    "training": (lambda m: m.block.train(), "training flag of block"),
    "requires_grad": (lambda m: m.block.linear.weight.requires_grad_(False), "of block.linear is False, was True"),
    "dtype": (lambda m: m.block.linear.double(), "of block.linear is torch.float64, was torch.float32"),
}
#: Changes that leave the numbers of the test call as they are: their control is the reason, not a wrong number.
SAME_NUMBERS = {"sub-module added", "training", "requires_grad", "dtype"}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr(Block, "power", Block.power)
    monkeypatch.setattr(Block, "helper", FunctionType(Block.helper.__code__, globals(), "helper"))
    return Model().eval()


def region(model: nn.Module) -> Region:
    return Region(model, role="t", binder=SignatureBinder({"x": {0: None}}), options=RegionOptions("eager"))


def _outcome(run: Callable[[], torch.Tensor]) -> Any:
    try:
        return run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_gives_the_right_result_and_its_name(change: str, model: Model) -> None:
    """After each change the result, or the error, is that of the changed module, and the event names what changed."""
    ours, x = region(model), torch.rand(3, 4)
    assert torch.equal(ours(x), model.forward(x)) and ours.graphs == 1
    make, name = CHANGES[change]
    heard: list[events.Event] = []
    make(model)
    with events.listening(heard.append), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        got, want = _outcome(lambda: ours(x)), _outcome(lambda: model.forward(x))
    assert type(got) is type(want) and (torch.equal(got, want) if isinstance(got, torch.Tensor) else got == want)
    (told,) = [e.message for e in heard if e.kind in ("new_entry", "fallback")]
    assert name in told and [str(w.message) for w in warned] == [
        f"{ours.name} {e.message}. {e.data['remedy']}" for e in heard if e.kind == "fallback"
    ]


@pytest.mark.parametrize("change", [c for c in CHANGES if c not in SAME_NUMBERS])
def test_ignoring_the_fingerprint_would_be_wrong(change: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: with the structure left out of the key, the first graph answers with numbers from before the change."""
    monkeypatch.setattr(Fingerprint, "current", lambda self, look_again: 0)
    monkeypatch.setattr(Fingerprint, "watch", lambda self, number, watched: None)
    ours, x = region(model), torch.rand(3, 4)
    ours(x)
    CHANGES[change][0](model)
    got, want = ours(x), _outcome(lambda: model.forward(x))
    assert not (isinstance(want, torch.Tensor) and got.dtype == want.dtype and torch.equal(got, want))
    assert ours.graphs == 1


def test_changing_back_finds_the_first_graph(model: Model) -> None:
    """A structure that was seen before needs no new graph: adapters may be switched on and off."""
    ours, x = region(model), torch.rand(3, 4)
    for eps in (0.5, 3.0, 0.5, 3.0):
        model.block.eps = eps
        assert torch.equal(ours(x), model.forward(x))
    handle = model.block.register_forward_hook(_double)
    with falls_back("block has a hook"):
        assert torch.equal(ours(x), model.forward(x))
    handle.remove()
    assert torch.equal(ours(x), model.forward(x)) and ours.graphs == 2


def test_new_values_of_weights_need_no_new_graph(model: Model) -> None:
    """In-place updates, ``load_state_dict``, ``.data`` and an optimiser step are seen by the same graph."""
    ours, x = region(model), torch.rand(3, 4)
    ours(x)
    updates: list[Callable[[], Any]] = [
        lambda: nn.init.ones_(model.block.linear.weight),
        lambda: model.load_state_dict({n: torch.rand_like(t) for n, t in model.state_dict().items()}),
        lambda: setattr(model.block.linear.weight, "data", torch.rand(4, 4)),
        lambda: model.block.loose.fill_(5.0),
        lambda: model.block.offset.fill_(5.0),
    ]
    for update in updates:
        before = ours(x)
        update()
        assert torch.equal(ours(x), model.forward(x)) and not torch.equal(ours(x), before)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    ours(x).sum().backward()
    optimiser.step()
    assert torch.equal(ours(x), model.forward(x)) and ours.graphs == 1 and ours.eager_calls == 0


def test_weights_in_another_layout_are_another_structure(model: Model) -> None:
    """Strides of a weight are compiled in: ``.data`` with other strides is noticed."""
    before = fingerprint(model)
    model.block.linear.weight.data = torch.rand(4, 4).t()
    told = difference(before, fingerprint(model))
    assert told == "strides of parameter or buffer 'weight' of block.linear is (1, 4), was (4, 1)"


def test_a_reused_address_is_not_the_same_object(model: Model) -> None:
    """A function at the address of a dead one is another function: identity does not rest on ``id`` alone."""
    numbers = Fingerprint(model)
    seen = set()
    for k in range(20):
        model.block.act = eval(f"lambda x: x * {k}")
        seen.add(numbers.current(look_again=True))
        model.block.act = None
    assert len(seen) == 20


def test_the_component_s_own_hooks_are_not_its_structure(model: Model) -> None:
    """Hooks on the component run round its graph, so they need no graph of their own; those below it do."""
    before = fingerprint(model)
    model.register_forward_hook(_double)
    assert fingerprint(model) == before
    model.block.register_forward_hook(_double)
    assert fingerprint(model) != before


def test_looking_again_is_asked_for(model: Model) -> None:
    """Between boundaries the number is kept; at the next boundary the change is seen."""
    numbers = Fingerprint(model)
    first = numbers.current(look_again=False)
    model.block.eps = 9.0
    assert numbers.current(look_again=False) == first == numbers.number
    second = numbers.current(look_again=True)
    assert second != first and "eps" in numbers.difference(first, second)


def test_a_module_that_holds_itself_ends(model: Model) -> None:
    """Objects that refer to each other in circles are walked once."""
    model.block.config.back = model.block.config
    assert fingerprint(model) == fingerprint(model)


class Counts(nn.Module):
    """Changes with every call: whatever a graph replays, this is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return x + self.seen


class Caches(nn.Module):
    """Builds a table in its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.arange(4.0)
        return x + self.table


def test_a_component_that_changes_itself_in_every_call_runs_eager() -> None:
    """Side effects in Python are not in a graph: counted on, eager, with the attribute named."""
    ours, plain = region(Counts()), Counts()
    with falls_back("sets seen of self"):
        for _ in range(4):
            assert torch.equal(ours(torch.zeros(2, 4)), plain(torch.zeros(2, 4)))
    assert ours.entry_count() == 0 and ours.eager_calls == 4
    assert "sets seen of self" in str(ours.fallback)


def test_a_table_built_in_the_first_call_is_no_obstacle() -> None:
    """What changes once and then stays is compiled: the call that builds it runs eager, and says so."""
    ours, x = region(Caches()), torch.rand(3, 4)
    with falls_back("sets table of self"):
        for _ in range(3):
            assert torch.equal(ours(x), Caches()(x))
    assert (ours.eager_calls, ours.graphs) == (1, 1)


def test_an_override_of_a_layer_makes_a_new_graph_and_is_named() -> None:
    """What is registered as replaced is part of the structure, even before an instance is replaced."""
    model = Model()
    region = Region(
        model, role="component", binder=SignatureBinder.inferred(Block), options=RegionOptions(backend="eager")
    )
    told: list[str] = []
    x = torch.randn(3, 4)
    with registry_scope(), region_attached(region), events.listening(lambda e: told.append(f"{e.kind} {e.message}")):
        want = model(x)

        class Layer(PluggableLayer):
            pass

        @Layer.register_oot
        class Faster(Layer):
            pass

        assert torch.equal(model(x), want)
        assert region.graphs == 2
        assert any(t.startswith("new_entry") and "registry of layers" in t for t in told)


@contextmanager
def region_attached(region: Region) -> Iterator[None]:
    region.attach()
    try:
        yield
    finally:
        region.detach()


# -- what else a forward reads --------------------------------------------------------------------------------------


def _adapted() -> Any:
    """A model whose linear layer has two LoRA adapters that do something."""
    peft = pytest.importorskip("peft")
    model = Model().eval()
    options = peft.LoraConfig(target_modules=["linear"], init_lora_weights=False, r=2)
    model = peft.inject_adapter_in_model(options, model, adapter_name="a")
    layer = model.block.linear
    layer.update_layer("b", r=2, lora_alpha=8, config=options)
    torch.nn.init.ones_(layer.lora_B["b"].weight)
    return model.eval()


ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "disabled": lambda layer: layer.enable_adapters(False),
    "another one": lambda layer: layer.set_adapter("b"),
    "both": lambda layer: layer.set_adapter(["a", "b"]),
    "scaled": lambda layer: layer.scaling.__setitem__("a", 5.0),
    "deleted": lambda layer: layer.delete_adapter("a"),
}


@pytest.mark.parametrize("change", ADAPTERS)
def test_an_adapter_that_is_switched(change: str) -> None:
    """Disabled, chosen, scaled and deleted adapters are flags, lists and dicts of a layer: each state has its graph."""
    model, x = _adapted(), torch.rand(3, 4)
    ours = region(model)
    before = ours(x)
    assert torch.equal(before, model.forward(x))
    ADAPTERS[change](model.block.linear)
    assert torch.equal(ours(x), model.forward(x)) and not torch.equal(ours(x), before)
    assert ours.graphs == 2 and ours.fallback is None


def test_an_adapter_merged_and_taken_out_again() -> None:
    """Merging writes the weights in place and sets a flag; the graph from before serves again after unmerging."""
    model, x = _adapted(), torch.rand(3, 4)
    ours, layer = region(model), model.block.linear
    first = ours(x)
    layer.merge()
    torch.testing.assert_close(ours(x), first)
    layer.unmerge()
    layer.lora_B["a"].weight.data.mul_(2.0)
    torch.testing.assert_close(ours(x), model.forward(x))
    assert not torch.allclose(ours(x), first) and ours.graphs == 2


class Wrapped(torch.Tensor):
    """A weight as quantizers keep it: numbers and a scale in a tensor that has neither."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, scale: torch.Tensor, kind: str) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=scale.dtype)

    def __init__(self, inner: torch.Tensor, scale: torch.Tensor, kind: str) -> None:
        self.inner, self.scale, self.kind = inner, scale, kind

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["inner", "scale"], {"kind": self.kind}

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    "change",
    [
        lambda w: setattr(w, "inner", w.inner.to(torch.int16)),
        lambda w: setattr(w, "scale", w.scale.clone()),
        lambda w: setattr(w, "kind", "int4"),
    ],
    ids=["dtype inside", "another scale", "kind"],
)
def test_what_is_inside_a_quantized_weight(change: Callable[[Any], Any]) -> None:
    """A tensor subclass is told by its class, its inner tensors and what it says of itself."""
    module = nn.Module()
    module.weight = Wrapped(torch.ones(4, 4, dtype=torch.int8), torch.ones(4), "int8")
    before = fingerprint(module)
    assert fingerprint(module) == before
    change(module.weight)
    assert fingerprint(module) != before


def test_another_class_of_weight_in_the_same_tensor() -> None:
    """``swap_tensors`` puts another weight, of another class too, into the parameter that a graph is bound to."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(4, 4))
    before, held = fingerprint(module), module.weight
    torch.utils.swap_tensors(held, torch.ones(4, 4))  # refuses a tensor that something refers to weakly
    assert module.weight is held and fingerprint(module) != before


def test_the_flags_of_a_hook_belong_to_it(model: Model) -> None:
    """The same function put back with other flags is another hook; put back as it was, the same."""

    def hook(*args: Any) -> None:
        return None

    def registered(**flags: bool) -> Any:
        handle = model.block.register_forward_hook(hook, **flags)
        seen = fingerprint(model)
        handle.remove()
        return seen

    assert registered() == registered()
    assert len({registered(), registered(with_kwargs=True), registered(always_call=True)}) == 3


def test_keys_that_look_alike_are_told_apart(model: Model) -> None:
    """``1`` and ``"1"`` are two keys of a dictionary, and ``0j`` and ``-0j`` two numbers."""
    model.block.table = {1: 2.0}
    by_number = fingerprint(model)
    model.block.table = {"1": 2.0}
    assert fingerprint(model) != by_number
    model.block.eps = 0j
    zero = fingerprint(model)
    model.block.eps = -0j
    assert fingerprint(model) != zero


def test_a_sub_module_that_is_none_has_a_place(model: Model) -> None:
    """``hasattr`` tells a registered ``None`` from nothing."""
    before = fingerprint(model)
    model.block.register_module("gate", None)
    assert fingerprint(model) != before and "module tree" in difference(before, fingerprint(model))


def test_a_configuration_changed_in_place_by_value(model: Model) -> None:
    """A list in a configuration is compared by what is in it, not by which list it is."""
    model.block.config.layer_types = ["full", "sliding"]
    before = fingerprint(model)
    model.block.config.layer_types = ["full", "sliding"]
    assert fingerprint(model) == before
    model.block.config.layer_types[1] = "full"
    assert fingerprint(model) != before
