"""Layers that are replaced as a whole where they are built, and every way in which that could go wrong in silence."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compile_policy.errors import PolicyWarning
from compile_policy.layers import (
    CustomOp,
    LayerError,
    PluggableLayer,
    check_claims,
    layer_notes,
    layer_rows,
    registry_scope,
    registry_state,
)
from compile_policy.layers.identity import qualified
from compile_policy.layers.registry import count_of, dead_claims


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    with registry_scope():
        yield


class Gated(PluggableLayer):
    """A layer that composes modules and owns parameters."""

    def __init__(self, width: int, bias: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.up(x).chunk(2, -1)
        return a * torch.sigmoid(b)


class Wider(Gated):
    """A subclass of its own right, which a model asks for by itself."""


def row_of(name: str) -> Any:
    return next(row for row in layer_rows() if row.name == name)


def test_the_override_is_built_and_initialised() -> None:
    """Where the layer is asked for, the override is built with its own ``__init__``; the list says how often."""
    PluggableLayer.register("gated")(Gated)

    @Gated.register_oot
    class Louder(Gated):
        def __init__(self, width: int, bias: bool = False) -> None:
            super().__init__(width, bias)
            self.gain = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.gain

    layer, _ = Gated(4), Gated(4)
    assert type(layer) is Louder
    assert layer.gain.item() == 2.0
    assert layer(torch.ones(1, 4)).shape == (1, 4)
    row = row_of("gated")
    assert (row.kind, row.count, row.override) == ("pluggable", 2, qualified(Louder))
    assert layer_notes() == (f"{qualified(Gated)} is replaced by {qualified(Louder)} (from {Louder.__module__}).",)


def test_no_subclass_is_refused() -> None:
    """An unrelated class cannot take a layer's place without declaring that its state fits."""
    with pytest.raises(LayerError, match=r"no subclass.*state_dict_compatible"):

        @Gated.register_oot
        class Other(nn.Module):
            pass

    assert type(Gated(2)) is Gated


def test_a_compatible_class_is_initialised_and_proven() -> None:
    """A class that is no subclass is built like any other (not handed out without ``__init__``) when its state fits."""

    @Gated.register_oot(state_dict_compatible=True)
    class Other(nn.Module):
        def __init__(self, width: int, bias: bool = False) -> None:
            super().__init__()
            self.up = nn.Linear(width, 2 * width, bias=bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x).chunk(2, -1)[0]

    layer: nn.Module = Gated(4)
    assert type(layer) is Other
    assert layer(torch.ones(1, 4)).shape == (1, 4)


def test_a_false_declaration_is_found() -> None:
    """The declared state is compared with the layer's own, for the very arguments of each construction."""

    @Gated.register_oot(state_dict_compatible=True)
    class Other(nn.Module):
        def __init__(self, width: int, bias: bool = False) -> None:
            super().__init__()
            self.up = nn.Linear(width, 2 * width, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    assert type(Gated(4)) is Other
    with pytest.raises(LayerError, match=r"up\.bias: \(8,\) torch.float32 became absent"):
        Gated(4, bias=True)


@pytest.mark.parametrize("first", [0, 1])
def test_two_overrides_conflict_in_either_order(first: int) -> None:
    """A second override raises and names both; which one came first changes neither the message nor what is built."""
    classes = [type(name, (Gated,), {}) for name in ("A", "B")]
    Gated.register_oot(classes[first])
    with pytest.raises(LayerError, match=r"Gated is claimed by .*:A \(from .*\) and by .*:B \(from "):
        Gated.register_oot(classes[1 - first])


@pytest.mark.parametrize("first", [0, 1])
def test_priority_decides_in_either_order(first: int) -> None:
    """With different priorities the higher one is built, whichever was registered first."""
    low, high = (type(name, (Gated,), {}) for name in ("Low", "High"))
    claims = [(low, 0), (high, 1)]
    for cls, priority in (claims[first], claims[1 - first]):
        Gated.register_oot(priority=priority)(cls)
    assert type(Gated(2)) is high


def test_duplicate_names_and_overrides_raise_without_asserts() -> None:
    """``python -O`` removes assert statements; duplicates are still refused."""
    code = """
        from compile_policy.layers import PluggableLayer, LayerError
        class A(PluggableLayer):
            def forward(self, x): return x
        class B(A): pass
        class C(A): pass
        PluggableLayer.register("a")(A)
        A.register_oot(B)
        for again in (lambda: PluggableLayer.register("a")(B), lambda: A.register_oot(C), lambda: A.register_oot(B)):
            try: again()
            except LayerError: print("refused")
    """
    assert run_python(code, "-O").splitlines() == ["refused"] * 3


def test_an_override_of_nothing_is_refused() -> None:
    """``@PluggableLayer.register_oot`` without a name would override nothing, for ever."""
    for base in (PluggableLayer, CustomOp):
        with pytest.raises(LayerError, match="names no layer to override"):

            @base.register_oot
            class Lost(Gated):
                pass

    with pytest.raises(LayerError, match="given the name 'rms_norm' of something else"):
        Gated.register_oot(name="rms_norm")
    with pytest.raises(TypeError, match="decorates classes"):
        PluggableLayer.register_oot(name="gated")(Gated(2))  # type: ignore[type-var]


def test_a_dead_override_is_reported() -> None:
    """An override that replaced nothing is a warning with the near match, and an error in strict mode."""

    @PluggableLayer.register_oot(name="VocabParalelEmbedding")
    class Typo(Gated):
        pass

    assert [claim.cls for claim in dead_claims()] == [Typo]
    with pytest.warns(PolicyWarning, match="replaced 0 instances: no such layer .did you mean VocabParallelEmbedding"):
        check_claims()
    with pytest.raises(LayerError, match="replaced 0 instances"):
        check_claims(strict=True)
    assert "did you mean" in next(row for row in layer_rows() if row.name == "VocabParalelEmbedding").note


def test_a_live_override_is_no_warning() -> None:
    """Once an instance was replaced, the check is silent."""
    Gated.register_oot(type("Used", (Gated,), {}))
    with pytest.raises(LayerError):
        check_claims(strict=True)
    Gated(2)
    check_claims(strict=True)


def test_subclasses_are_not_replaced_and_the_list_says_so() -> None:
    """A subclass is a layer of its own: an override of its base does not reach it, and that is visible."""
    PluggableLayer.register("gated")(Gated)
    Gated(2)
    assert row_of("gated").count == 1
    override = type("Override", (Gated,), {})
    Gated.register_oot(override)
    assert row_of("gated").note == "1 built before the override"
    assert type(Wider(2)) is Wider
    assert row_of("gated").note == "1 built before the override, 1 of the subclass Wider not replaced"
    assert type(Gated(2)) is override
    wider = type("WiderStill", (Wider,), {})
    Wider.register_oot(wider)
    assert (type(Wider(2)), type(Gated(2))) == (wider, override)


def test_equal_names_in_other_modules_do_not_collide() -> None:
    """Classes are told apart by identity: an override of one leaves its namesake alone."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    here = type("Twin", (PluggableLayer,), {"__module__": "package.here", "forward": forward})
    there = type("Twin", (PluggableLayer,), {"__module__": "package.there", "forward": forward})
    override = type("Override", (here,), {})
    here.register_oot(override)
    assert (type(here()), type(there())) == (override, there)

    PluggableLayer.register("here")(here)
    PluggableLayer.register("there")(there)
    with pytest.raises(LayerError, match=r"may be package.here:Twin, package.there:Twin.*module:Class"):
        PluggableLayer.register_oot(name="Twin")(type("Which", (there,), {}))
    exact = type("Exact", (there,), {})
    PluggableLayer.register_oot(name="package.there:Twin")(exact)
    assert type(there()) is exact


@pytest.mark.parametrize("name", ["gated", "Gated", qualified(Gated)])
def test_the_layer_may_be_registered_after_its_override(name: str) -> None:
    """An override by name waits for the layer, so a plug-in need not import it first."""
    override = type("Early", (Gated,), {})
    PluggableLayer.register_oot(name=name)(override)
    assert type(Gated(2)) is Gated
    PluggableLayer.register("gated")(Gated)
    assert type(Gated(2)) is override


def test_forwards_that_nobody_calls_are_refused() -> None:
    """A plug-in's ``forward_oot`` would silently stop being called once its layer is a PluggableLayer."""
    with pytest.raises(LayerError, match="forward_oot, which nobody calls: Gated is a PluggableLayer"):

        @Gated.register_oot
        class Moved(Gated):
            def forward_oot(self, x: torch.Tensor) -> torch.Tensor:
                return x * 0

    with pytest.raises(LayerError, match="forward_native, which nobody calls"):

        @PluggableLayer.register("halfway")
        class Halfway(PluggableLayer):
            def forward_native(self, x: torch.Tensor) -> torch.Tensor:
                return x

    @Gated.register_oot
    class Both(Gated):
        """Works under either base: its forward is called, and may call the other."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.forward_oot(x)

        def forward_oot(self, x: torch.Tensor) -> torch.Tensor:
            return x * 0

    assert Gated(2)(torch.ones(1, 2)).sum() == 0


def test_the_bases_cannot_be_built() -> None:
    """Building the base is a clear error, not a module that fails later."""
    for base in (PluggableLayer, CustomOp):
        with pytest.raises(TypeError, match="base to derive layers from"):
            base()


def test_copies_keep_their_class() -> None:
    """An override reaches what is built, never a copy or an unpickled layer that was built before."""
    layer = Gated(3)
    stored = pickle.dumps(layer)
    Gated.register_oot(type("Late", (Gated,), {}))
    x = torch.randn(2, 3)
    for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(stored)):
        assert type(other) is Gated
        assert torch.equal(other(x), layer(x))


def test_an_override_may_be_overridden_but_not_in_a_circle() -> None:
    """Overrides chain; a circle is refused before anything is built."""
    first = type("First", (Gated,), {})
    second = type("Second", (first,), {})
    Gated.register_oot(first)
    first.register_oot(second)
    assert type(Gated(2)) is second
    with pytest.raises(LayerError, match="circle"):
        second.register_oot(state_dict_compatible=True)(Gated)
    assert type(Gated(2)) is second


def test_a_failing_init_counts_nothing() -> None:
    """An exception in the override reaches the caller, and the override still counts as dead."""

    @Gated.register_oot
    class Broken(Gated):
        def __init__(self, width: int) -> None:
            raise RuntimeError("no kernel here")

    with pytest.raises(RuntimeError, match="no kernel here"):
        Gated(2)
    assert [count_of(claim) for claim in dead_claims()] == [0]


def test_an_overridden_layer_is_one_graph() -> None:
    """Dynamo traces through an overridden layer without a break, whatever the batch."""
    Gated.register_oot(type("Override", (Gated,), {}))
    model = nn.Sequential(Gated(4), Gated(4))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 4)
        assert torch.equal(compiled(x), model(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_state_changes_with_the_registry() -> None:
    """The state is hashable, differs for each set of overrides, and is the old one again without them."""
    before = registry_state()
    states = {before}
    for name, priority in (("One", 0), ("Two", 1)):
        with registry_scope():
            Gated.register_oot(priority=priority)(type(name, (Gated,), {}))
            states.add(registry_state())
    assert len(states) == 3
    assert registry_state() == before
    PluggableLayer.register("gated")(Gated)
    assert registry_state() == before, "a layer that nobody overrides changes nothing"


PLUGIN = """
    import sys
    from compile_policy.layers import ParallelLMHead, registry_state
    @ParallelLMHead.register_oot
    class Head(ParallelLMHead):
        def forward(self, x):
            return super().forward(x) * {gain} if "cap" in {{"cap", "scale", "shift"}} else x
    print(registry_state())
"""


def test_the_state_is_equal_in_every_process_and_follows_the_code() -> None:
    """Two processes with one override agree; an edited override is another one, as it stands in artifacts' keys."""
    one, two, edited = (run_python(PLUGIN.format(gain=gain)) for gain in (2, 2, 3))
    assert "ParallelLMHead" in one
    assert one == two != edited


def run_python(code: str, *flags: str) -> str:
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, *flags, "-c", textwrap.dedent(code)]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
