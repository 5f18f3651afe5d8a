"""`support_torch_compile`, `ignore_torch_compile`: what is decorated, what is refused, what is left as it was."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from compile_policy import CompilationConfig, ignore_torch_compile, support_torch_compile, use_config
from compile_policy.decorators import ClassPolicy, decorated, dims_of, policy_of
from compile_policy.errors import DecorationError, PolicyWarning
from compile_policy.region import Region, region_of
from compile_policy.shapes import UNBACKED

EAGER = CompilationConfig(backend="eager")


def plain_class() -> type[nn.Module]:
    """A fresh class, so that no test sees the decoration of another."""

    class Plain(nn.Module):
        def __init__(self, width: int, bias: bool = True, *, scale: float = 1.0) -> None:
            super().__init__()
            self.linear = nn.Linear(width, width, bias=bias)
            self.scale = scale

        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return self.linear(x) * self.scale

    return Plain


def compiled(module: nn.Module) -> Region:
    found = region_of(module)
    assert found is not None
    return found


# -- with and without arguments ---------------------------------------------------------------------------------------


def test_without_arguments_dims_are_inferred() -> None:
    """The bare decorator returns the same class, and instances are one graph for every batch."""
    cls = plain_class()
    assert support_torch_compile(cls) is cls
    with use_config(EAGER):
        module = cls(4, False, scale=2.0)
    for n in (2, 5, 1):
        x = torch.rand(n, 4)
        assert torch.equal(module(x), module.forward(x))
    report = compiled(module).report()
    assert (report.graphs, report.calls, report.eager_calls) == (1, 3, 0)
    assert module.scale == 2.0 and module.linear.bias is None


def test_with_arguments() -> None:
    """``dynamic_arg_dims`` replaces what annotations say: dim 1 varies, dim 0 does not."""

    @support_torch_compile(dynamic_arg_dims={"x": {1: "width"}}, config=EAGER)
    class Rows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(1)

    module = Rows()
    for shape in ((3, 2), (3, 5), (4, 5)):
        module(torch.rand(shape))
    assert compiled(module).graphs == 2


def test_mark_unbacked_dims_assume_nothing() -> None:
    """A dim that nothing may be assumed of is traced without size: a branch on it is refused, arithmetic is not."""
    cls = plain_class()
    dims = dims_of(cls, ClassPolicy(dynamic_arg_dims={"x": 0}, mark_unbacked_dims={"x": 0, "mask": {0: "rows"}}))
    assert dims == {"x": {0: f"{UNBACKED}x.0"}, "mask": {0: f"{UNBACKED}rows"}}

    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.shape[0] > 3 else x

    outcomes = []
    for unbacked in (None, {"x": 0}):
        decorated_cls = support_torch_compile(dynamic_arg_dims={"x": 0}, mark_unbacked_dims=unbacked, config=EAGER)(
            type("Again", (Branches,), {})
        )
        module = decorated_cls()
        refused: Any = contextlib.nullcontext()
        if unbacked is not None:
            refused = pytest.warns(PolicyWarning, match="runs eager")
        with refused:
            assert torch.equal(module(torch.ones(5, 2)), torch.full((5, 2), 2.0))
        outcomes.append(compiled(module).fallback is None)
    assert outcomes == [True, False]


def test_enable_if_is_asked_with_the_configuration() -> None:
    """An instance is compiled only when ``enable_if`` says so of the configuration in force."""
    seen: list[CompilationConfig] = []

    def wanted(config: CompilationConfig) -> bool:
        seen.append(config)
        return config.max_entries > 3

    cls = support_torch_compile(enable_if=wanted)(plain_class())
    with use_config(EAGER.replace(max_entries=2)):
        assert region_of(cls(4)) is None
    with use_config(EAGER):
        assert compiled(cls(4)).options.max_entries == EAGER.max_entries
    assert [c.max_entries for c in seen] == [2, EAGER.max_entries]


def test_an_encoder_needs_compile_mm_encoder() -> None:
    """``is_encoder`` classes are compiled only where encoders are asked for."""
    cls = support_torch_compile(is_encoder=True)(plain_class())
    with use_config(EAGER):
        assert region_of(cls(4)) is None
    with use_config(EAGER.replace(compile_mm_encoder=True)):
        assert region_of(cls(4)) is not None


@pytest.mark.parametrize("config", [EAGER.replace(enabled=False), EAGER.replace(mode=0)], ids=["disabled", "-O0"])
def test_a_configuration_that_wants_nothing_compiled(config: CompilationConfig) -> None:
    """Switched off, instances are plain modules."""
    cls = support_torch_compile(plain_class())
    with use_config(config):
        assert region_of(cls(4)) is None


def test_the_configuration_overrides_dims_by_class_name() -> None:
    """``dynamic_arg_dims`` of the configuration replaces what the class says."""
    cls = support_torch_compile(plain_class())
    with use_config(EAGER.replace(dynamic_arg_dims={"Plain": {"mask": 1}})):
        assert compiled(cls(4)).binder.dims == {"mask": {1: None}}  # type: ignore[attr-defined]


# -- refused ----------------------------------------------------------------------------------------------------------


def test_no_dynamic_dim_and_unknown_arguments_are_told_at_the_class() -> None:
    """Mistakes are ValueErrors where the class is written, not at the first call."""

    class Untyped(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return x

    with pytest.raises(DecorationError, match="no dynamic dimension was found"):
        support_torch_compile(Untyped)
    with pytest.raises(DecorationError, match="is empty"):
        support_torch_compile(dynamic_arg_dims={})(Untyped)
    with pytest.raises(DecorationError, match="no argument 'y'"):
        support_torch_compile(dynamic_arg_dims={"y": 0})(Untyped)
    with pytest.raises(DecorationError, match="no argument 'z'"):
        support_torch_compile(dynamic_arg_dims={"x": 0}, mark_unbacked_dims={"z": 0})(Untyped)
    assert policy_of(Untyped) is None and "__init__" not in vars(Untyped)


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), int, lambda x: x], ids=["instance", "no module", "function"])
def test_only_module_classes_can_be_decorated(thing: Any) -> None:
    """Anything else is refused with what to use instead."""
    with pytest.raises(DecorationError, match=r"no nn\.Module class.*compile_policy\.apply"):
        support_torch_compile(thing)


def test_positional_arguments_are_checked_against_annotations() -> None:
    """A positional argument on the wrong parameter: a TypeError with the class, the type and what to annotate."""
    cls = support_torch_compile(plain_class())
    with pytest.raises(TypeError) as info:
        cls("wide")
    said = str(info.value)
    assert "Plain.__init__" in said and "got a str" in said and "'width'" in said and "annotated int" in said
    assert "Annotate 'width' of" in said
    with use_config(EAGER):
        cls(width=4), cls(4, True), cls(4, bias=False)


def test_what_cannot_be_checked_fits() -> None:
    """Unannotated, ``Any``, optional, union, generic and unresolvable annotations accept what eager accepts."""

    class Loose(nn.Module):
        def __init__(
            self,
            a,
            b: Any,
            c: int | None,
            d: float,
            e: list[int],
            f: Nowhere = None,  # type: ignore[name-defined] # noqa: F821
            *rest: int,
        ):  # type: ignore[no-untyped-def]
            super().__init__()
            self.got = (a, b, c, d, e, f, rest)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    cls = support_torch_compile(config=EAGER)(Loose)
    assert cls(1, "b", None, 2, [1], "f", 7, 8).got == (1, "b", None, 2, [1], "f", (7, 8))


def test_a_second_decoration() -> None:
    """The same policy again changes nothing; another one is an error, and the first stays."""
    cls = support_torch_compile(plain_class())
    init = cls.__init__
    assert support_torch_compile(cls) is cls and cls.__init__ is init
    with pytest.raises(DecorationError, match="decorated with another policy already"):
        support_torch_compile(is_encoder=True)(cls)
    assert policy_of(cls) == ClassPolicy()


# -- inheritance ------------------------------------------------------------------------------------------------------


def test_a_subclass_follows_its_base_and_infers_its_own_arguments() -> None:
    """A subclass with other argument names is compiled by them, once, after the base's constructor."""
    base = support_torch_compile(config=EAGER)(plain_class())

    class Renamed(base):  # type: ignore[valid-type, misc]
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.shift = 3.0

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return self.linear(hidden) + self.shift

    module = Renamed(4)
    for n in (2, 6):
        x = torch.rand(n, 4)
        assert torch.equal(module(x), module.forward(x))
    assert compiled(module).graphs == 1 and compiled(module).fallback is None


def test_explicit_dims_that_a_subclass_does_not_have_are_told() -> None:
    """A subclass whose forward lacks a declared argument: the error names the subclass and its arguments."""
    base = support_torch_compile(dynamic_arg_dims={"x": 0}, config=EAGER)(plain_class())
    other = type("Other", (base,), {"forward": lambda self, hidden: hidden})
    with pytest.raises(DecorationError, match=r"Other\.forward has no argument 'x'.*hidden"):
        other(4)


def test_ignore_in_a_subclass_and_in_a_base() -> None:
    """The nearest word counts: an ignored subclass is left alone, a decorated one of an ignored base is compiled."""
    base = support_torch_compile(config=EAGER)(plain_class())
    ignored = ignore_torch_compile(type("Ignored", (base,), {}))
    below = type("Below", (ignored,), {})
    again = support_torch_compile(config=EAGER)(type("Again", (ignored,), {}))
    assert [region_of(cls(4)) is not None for cls in (base, ignored, below, again)] == [True, False, False, True]
    module = ignored(4)
    assert torch.equal(module(torch.ones(2, 4)), module.forward(torch.ones(2, 4)))


# -- the scope --------------------------------------------------------------------------------------------------------


def snapshot(cls: type) -> dict[str, Any]:
    return dict(vars(cls))


def test_the_scope_restores_classes_exactly() -> None:
    """After the block the class is as before: its own ``__init__``, or none of its own, and no policy."""
    own = plain_class()
    inherits = type("Inherits", (own,), {})
    before = [snapshot(own), snapshot(inherits)]
    with decorated({own: ClassPolicy(config=EAGER), inherits: ClassPolicy(config=EAGER)}):
        inside = [own(4), inherits(4)]
        assert "__init__" in vars(inherits)
    assert [snapshot(own), snapshot(inherits)] == before and policy_of(own) is None is policy_of(inherits)
    outside = [own(4), inherits(4)]
    assert all(region_of(m) for m in inside) and not any(region_of(m) for m in outside)
    x = torch.rand(3, 4)
    for m in (*inside, *outside):
        assert torch.equal(m(x), m.forward(x))
    assert [compiled(m).graphs for m in inside] == [1, 1]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_scope_restores_classes_when_a_constructor_raises(error: type[BaseException]) -> None:
    """Whatever leaves the block, the classes are restored and the exception is the constructor's."""

    class Raises(nn.Module):
        def __init__(self) -> None:
            raise error("from the constructor")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    before = snapshot(Raises)
    with pytest.raises(error, match="from the constructor"), decorated({Raises: ClassPolicy()}):
        Raises()
    assert snapshot(Raises) == before and policy_of(Raises) is None


def test_the_scope_leaves_a_class_with_a_policy_of_its_own_alone() -> None:
    """A class that its author decorated, or ignored, keeps that word inside and after the scope."""
    for mark in (support_torch_compile(config=EAGER), ignore_torch_compile):
        cls = mark(plain_class())  # type: ignore[operator]
        policy, before = policy_of(cls), snapshot(cls)
        with decorated({cls: ClassPolicy(is_encoder=True)}):
            assert policy_of(cls) == policy
        assert policy_of(cls) == policy and snapshot(cls) == before


def test_an_existing_instance_is_untouched_by_the_scope() -> None:
    """Only instances built inside the block are compiled."""
    cls = plain_class()
    old = cls(4)
    with decorated({cls: ClassPolicy(config=EAGER)}):
        old(torch.rand(2, 4))
    assert region_of(old) is None


# -- the module stays a module ----------------------------------------------------------------------------------------


def _pickled(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


class Kept(nn.Module):
    """At the top of the module, where pickle finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
def test_a_copy_is_the_model_without_policy(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    """A copy has the weights and none of the policy; the original keeps its graph."""
    with decorated({Kept: ClassPolicy(config=EAGER)}):
        module = Kept()
    x = torch.rand(3, 4)
    want = module(x)
    other = duplicate(module)
    assert type(other) is Kept and region_of(other) is None
    assert torch.equal(other(x), want) and torch.equal(module(x), want)
    with torch.no_grad():
        other.linear.weight.zero_()  # type: ignore[operator, union-attr]
    assert torch.equal(module(x), want) and compiled(module).graphs == 1


def test_type_names_and_state_are_unchanged() -> None:
    """Type, bases, ``forward``, ``state_dict`` keys and parameter names are those of the undecorated class."""
    plain, cls = plain_class(), plain_class()
    forward, bases, call = cls.forward, cls.__bases__, cls.__call__
    support_torch_compile(config=EAGER)(cls)
    module, other = cls(4), plain(4)
    module(torch.rand(2, 4))
    assert type(module) is cls and (cls.forward, cls.__bases__, cls.__call__) == (forward, bases, call)
    assert list(module.state_dict()) == list(other.state_dict())
    assert [n for n, _ in module.named_modules()] == [n for n, _ in other.named_modules()]
    assert cls.__init__.__wrapped__ is not None and cls.__init__.__name__ == "__init__"  # type: ignore[attr-defined]
    module.load_state_dict(other.state_dict())
    x = torch.rand(2, 4)
    assert torch.equal(module(x), other(x)) and compiled(module).graphs == 1
