"""Dynamic dims: what annotations say, what authors write, and what labels a call's tensors get."""

from __future__ import annotations

import textwrap
from typing import Annotated, Any, Optional, Union

import pytest
import torch
from torch import nn

from compile_policy import IntermediateTensors, PolicyError
from compile_policy.errors import DecorationError
from compile_policy.region import Region, RegionOptions, SignatureBinder
from compile_policy.shapes import infer_dynamic_arg_dims, labels_for, normalise, pattern, register_container


def module_with(annotation: Any) -> type[nn.Module]:
    """A class whose only tensor argument ``x`` is annotated as given."""

    def forward(self: nn.Module, x: Any, n: int = 1) -> Any:
        return x

    forward.__annotations__ = {"x": annotation, "n": int}
    return type("Annotated_", (nn.Module,), {"forward": forward})


@pytest.mark.parametrize(
    "annotation",
    [
        torch.Tensor,
        nn.Parameter,
        torch.FloatTensor,
        torch.LongTensor,
        torch.IntTensor,
        torch.BoolTensor,
        IntermediateTensors,
        Optional[torch.Tensor],  # noqa: UP045
        Optional[torch.LongTensor],  # noqa: UP045
        torch.Tensor | None,
        Union[torch.Tensor, IntermediateTensors, None],  # noqa: UP007
        Annotated[torch.Tensor, "tokens"],
        "torch.Tensor",
        "torch.LongTensor | None",
        "Optional[torch.Tensor]",
        "Union[FloatTensor, None]",
        "IntermediateTensors | None",
        "Tensor",
    ],
    ids=str,
)
def test_tensor_annotations_are_dynamic_in_dim_0(annotation: Any) -> None:
    """Every way to write a tensor or a container makes dim 0 dynamic; the integer beside it stays static."""
    assert infer_dynamic_arg_dims(module_with(annotation)) == {"x": {0: None}}


@pytest.mark.parametrize("annotation", [int, str, list, Optional[int], "dict", "TensorLike", None, Any], ids=str)  # noqa: UP045
def test_no_tensor_argument_is_an_error_with_a_remedy(annotation: Any) -> None:
    """Where nothing is dynamic there is nothing to compile once: refused where the class is written, as ValueError."""
    with pytest.raises(DecorationError, match=r"Annotated_\.forward.*no dynamic dimension.*dynamic_arg_dims") as info:
        infer_dynamic_arg_dims(module_with(annotation))
    assert isinstance(info.value, ValueError) and isinstance(info.value, PolicyError)


def test_postponed_annotations_of_a_generated_module() -> None:
    """``from __future__ import annotations`` leaves strings; they are read also where some name cannot be resolved."""
    source = textwrap.dedent("""
        from __future__ import annotations
        import torch
        from typing import Optional, TYPE_CHECKING
        if TYPE_CHECKING:
            from nowhere import Unknown
        class Resolvable(torch.nn.Module):
            def forward(self, ids: torch.LongTensor, mask: Optional[torch.Tensor] = None, n: int = 0): ...
        class Unresolvable(torch.nn.Module):
            def forward(self, ids: torch.LongTensor, mask: Optional[torch.Tensor] = None, u: Unknown = None): ...
    """)
    namespace: dict[str, Any] = {"__name__": "generated"}
    exec(compile(source, "generated.py", "exec", dont_inherit=True), namespace)
    for name in ("Resolvable", "Unresolvable"):
        assert infer_dynamic_arg_dims(namespace[name]) == {"ids": {0: None}, "mask": {0: None}}, name


def test_decorated_forwards_are_read_through() -> None:
    """A wrapper that uses ``functools.wraps`` hides neither names nor annotations."""
    import functools

    def wrap(f: Any) -> Any:
        @functools.wraps(f)
        def inner(*args: Any, **kwargs: Any) -> Any:
            return f(*args, **kwargs)

        return inner

    class Wrapped(nn.Module):
        @wrap
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    assert infer_dynamic_arg_dims(Wrapped) == {"x": {0: None}}


def test_a_registered_container_counts_and_cannot_be_registered_twice() -> None:
    """`register_container` makes a type of one's own dynamic; a second registration is refused."""

    class Ragged:
        pass

    with pytest.raises(DecorationError):
        infer_dynamic_arg_dims(module_with(Ragged))
    register_container(Ragged, lambda value: {})
    assert infer_dynamic_arg_dims(module_with(Ragged)) == {"x": {0: None}}
    assert infer_dynamic_arg_dims(module_with("Ragged | None")) == {"x": {0: None}}
    with pytest.raises(ValueError, match="Ragged is registered"):
        register_container(Ragged, lambda value: {})


def test_what_an_author_may_write() -> None:
    """One dim, several, negative ones, and shape ids come out in one form."""
    cls = module_with(torch.Tensor)
    assert normalise(cls, {"x": 0}) == {"x": {0: None}}
    assert normalise(cls, {"x": -1}) == {"x": {-1: None}}
    assert normalise(cls, {"x": [0, -1]}) == {"x": {0: None, -1: None}}
    assert normalise(cls, {"x": {0: "tokens", 1: None}}) == {"x": {0: "tokens", 1: None}}


def test_an_unknown_argument_is_named_with_the_known_ones() -> None:
    """A typing error in an argument's name is a ValueError that lists the arguments there are."""
    with pytest.raises(DecorationError, match=r"no argument 'y'.*x, n"):
        normalise(module_with(torch.Tensor), {"y": 0})

    class TakesAny(nn.Module):
        def forward(self, x: torch.Tensor, **kwargs: Any) -> Any:
            return x

    assert normalise(TakesAny, {"y": 0}) == {"y": {0: None}}


@pytest.mark.parametrize("spec", [[0.5], ["0"], {"0": "a"}, [True], [None]], ids=str)
def test_a_dim_that_is_no_integer_is_refused(spec: Any) -> None:
    """A dim is an integer: no string, float or flag."""
    with pytest.raises(DecorationError, match="dimension number is expected"):
        normalise(module_with(torch.Tensor), {"x": spec})


def test_labels_group_equal_sizes_and_keep_small_ones_apart() -> None:
    """Without shape ids, dims of equal size share a label; 0 and 1 only do at the same position."""
    three, one = torch.zeros(3, 3), torch.zeros(1, 1)
    assert labels_for(three, {0: None, -1: None}, "x") == ("size 3", "size 3")
    assert labels_for(one, {0: None, 1: None}, "x") == ("size 1 of dim 0", "size 1 of dim 1")
    assert labels_for(three, {-1: "width"}, "x") == (None, "width")
    assert labels_for(three, {}, "x") == (None, None)


@pytest.mark.parametrize("dim", [2, -3])
def test_a_dim_that_the_tensor_does_not_have_is_refused(dim: int) -> None:
    """The message names the argument and its number of dims."""
    with pytest.raises(DecorationError, match=rf"dim {dim} of x, which has 2 dims"):
        labels_for(torch.zeros(2, 2), {dim: None}, "x")


def test_pattern_forgets_names_and_keeps_equality() -> None:
    """Two labellings have one pattern exactly when the same dims share a label."""
    assert pattern([("size 4", None), ("size 4",)]) == pattern([("size 9", None), ("size 9",)])
    assert pattern([("size 4", None), ("size 4",)]) != pattern([("size 4", None), ("size 5",)])
    assert pattern([("a", None)]) != pattern([(None, "a")])


def test_a_negative_dim_is_dynamic_in_a_call() -> None:
    """``-1`` makes the last dim dynamic and leaves dim 0 static: one graph per leading size, any trailing size."""

    class Scale(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    module = Scale()
    region = Region(module, role="t", binder=SignatureBinder({"x": {-1: None}}), options=RegionOptions("eager"))
    for width in (2, 5, 1, 0):
        assert torch.equal(region(torch.ones(3, width)), torch.full((3, width), 2.0))
    assert region.graphs == 1
    region(torch.ones(4, 2))
    assert region.graphs == 2


def test_a_shape_id_ties_sizes_together() -> None:
    """Dims with one shape id are one size: a first call with equal sizes makes a graph for that, and says so."""

    class Add(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x.sum(0) + y.sum(0)

    together, apart = Add(), Add()
    same = Region(
        together, role="t", binder=SignatureBinder({"x": {0: "n"}, "y": {0: "n"}}), options=RegionOptions("eager")
    )
    free = Region(
        apart, role="t", binder=SignatureBinder({"x": {0: "n"}, "y": {0: "m"}}), options=RegionOptions("eager")
    )
    for region in (same, free):
        for n in (4, 7):
            region(torch.ones(n, 2), torch.ones(n, 2))
        assert region.graphs == 1
    assert torch.equal(free(torch.ones(4, 2), torch.ones(5, 2)), torch.full((2,), 9.0))
    assert free.graphs == 1 and free.fallback is None, "sizes with ids of their own are never assumed equal"


def test_intermediate_tensors() -> None:
    """The container reads, slices, compares and prints like the dictionary it holds."""
    held = IntermediateTensors({"h": torch.arange(6).reshape(3, 2), "r": torch.zeros(3)})
    assert len(held) == 2 and torch.equal(held["h"], torch.arange(6).reshape(3, 2))
    assert held[1:] == IntermediateTensors({"h": torch.tensor([[2, 3], [4, 5]]), "r": torch.zeros(2)})
    assert held != IntermediateTensors({"h": held["h"]}) and held != 3
    held["r"] = torch.ones(3)
    assert torch.equal(dict(held.items())["r"], torch.ones(3))
    empty = IntermediateTensors.empty_like(held)
    assert {n: t.shape for n, t in empty.items()} == {n: t.shape for n, t in held.items()}
    assert repr(held) == "IntermediateTensors({'h': (3, 2), 'r': (3,)})"
    with pytest.raises(TypeError, match="unhashable"):
        hash(held)
