"""Each private symbol of torch that is relied on: there, and doing what it is used for."""

from __future__ import annotations

import functools
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import AttrSource, LocalSource
from torch._guards import Guard
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode

from compile_policy import compat
from compile_policy.compat_fakes import of_shorter_length, with_own_sizes, with_sizes
from compile_policy.compat_guards import guard_facts
from compile_policy.errors import EnvironmentNotSupported
from compile_policy.versions import check_versions


@pytest.mark.parametrize(("torch_version", "name"), [("2.10.1", "torch"), ("1.13", "torch"), ("strange", "torch")])
def test_an_old_torch_is_refused_with_the_command(torch_version: str, name: str) -> None:
    """Below the floor, or unreadable: the message has the command that mends it."""
    with pytest.raises(EnvironmentNotSupported, match=rf"{name} {torch_version}.*pip install '{name}>=2\.11,<2\.16'"):
        check_versions(torch_version, "5.17.0")


def test_floors_and_newer_versions_pass() -> None:
    """The oldest tested versions, local builds and newer ones are fine; an old Transformers is not."""
    check_versions("2.11.0+cpu", "5.17.0.dev0")
    check_versions(torch.__version__, "6.0")
    with pytest.raises(EnvironmentNotSupported, match=r"transformers 5\.16\.9"):
        check_versions("2.13.0", "5.16.9")


def test_what_dynamo_hands_to_a_backend() -> None:
    """Placeholders know their tensor and source, the shape environment its symbols, guards and their origins."""
    found: dict[str, Any] = {}
    x = torch.rand(5, 3)

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        env = compat.tracing_shape_env()
        places = [compat.graph_argument(n) for n in gm.graph.nodes if n.op == "placeholder"]
        found["examples"] = [e for e, _ in places]
        found["places"] = [compat.leaf_dim_of_source(s) for _, s in places]
        found["symbols"] = {compat.leaf_dim_of_source(s) for ss in compat.symbol_sources(env).values() for s in ss}
        found["origins"] = [compat.guard_origin(g) for g in env.guards]
        return gm.forward

    def fn(*leaves: torch.Tensor) -> torch.Tensor:
        return leaves[0] * leaves[0].shape[0] if leaves[0].shape[0] < 100 else leaves[0]

    torch.compile(fn, backend=backend, dynamic=True, fullgraph=True)(x)
    assert any(e is x for e in found["examples"]) and (0, 0) in found["places"] and (0, 0) in found["symbols"]
    assert any("test_compat" in o for o in found["origins"])


def test_the_call_of_an_instance_can_be_routed_and_restored() -> None:
    """The slot that ``nn.Module.compile`` uses takes a callable, is asked first, and is no part of state or copies."""
    module = nn.Linear(2, 2)
    x = torch.rand(1, 2)
    compat.set_compiled_call_impl(module, lambda *a: "routed")
    assert module(x) == "routed" and compat.compiled_call_impl(module) is not None
    assert torch.equal(compat.plain_call(module, x), module.forward(x))
    assert "_compiled_call_impl" not in module.__getstate__()  # type: ignore[operator]
    compat.set_compiled_call_impl(module, None)
    assert torch.equal(module(x), module.forward(x)) and compat.compiled_call_impl(module) is None


def test_modes_change_with_the_mode_and_only_with_it() -> None:
    """Each mode that a graph takes for granted is seen, by its name, and gone after its block."""
    before = dict(compat.modes())
    changed = {
        "grad mode": torch.no_grad(),
        "inference mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "default device": torch.device("meta"),
    }
    for name, block in changed.items():
        with block:
            assert dict(compat.modes())[name] != before[name], name
        assert dict(compat.modes()) == before
    torch.use_deterministic_algorithms(True)
    assert dict(compat.modes())["deterministic algorithms"] is True
    torch.use_deterministic_algorithms(False)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    assert dict(compat.modes())["float32 matmul precision"] == "medium"
    torch.set_float32_matmul_precision(precision)
    assert dict(compat.modes()) == before


def test_what_forbids_compiled_calls_is_named() -> None:
    """Hooks and modes that a graph would bypass are seen while they last."""
    module = nn.Linear(2, 2)
    assert compat.eager_only(module) == ""
    for register, words in [
        (module.register_full_backward_hook, "backward hook"),
        (module.register_full_backward_pre_hook, "backward hook"),
        (nn.modules.module.register_module_forward_hook, "all modules"),
        (nn.modules.module.register_module_forward_pre_hook, "all modules"),
        (nn.modules.module.register_module_full_backward_hook, "all modules"),
    ]:
        with register(lambda *a: None):
            assert words in compat.eager_only(module), register
    with TorchDispatchMode():
        assert "TorchDispatchMode" in compat.eager_only(module)
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in compat.eager_only(module)
    with torch.device("cpu"):
        assert compat.eager_only(module) == ""
    seen: list[str] = []
    torch.func.vmap(lambda t: seen.append(compat.eager_only(module)) or t)(torch.rand(2))
    torch.jit.trace(lambda t: seen.append(compat.eager_only(module)) or t * 2, torch.rand(2), check_trace=False)
    assert "torch.func" in seen[0] and "torch.jit" in seen[1] and compat.eager_only(module) == ""


def test_hooks_run_as_torch_runs_them() -> None:
    """`call_with_hooks` gives what the module's own call gives, hook for hook."""
    module = nn.Linear(2, 2)
    assert not compat.has_hooks(module)
    module.register_forward_pre_hook(lambda m, a: a[0] * 2)
    module.register_forward_pre_hook(lambda m, a, k: ((a[0] + 1,), k), with_kwargs=True)
    module.register_forward_pre_hook(lambda m, a: None)
    module.register_forward_hook(lambda m, a, r: r - 3)
    module.register_forward_hook(lambda m, a, k, r: None, with_kwargs=True)
    x = torch.rand(1, 2)
    ours = compat.call_with_hooks(module, lambda args, kwargs: module.forward(*args, **kwargs), (x,), {})
    assert compat.has_hooks(module) and torch.equal(ours, module(x))


def test_the_original_error_is_found_under_wrappers() -> None:
    """Dynamo wraps what a backend raises; the original is what people need."""

    def backend(gm: Any, inputs: Any) -> Any:
        raise ValueError("mine")

    with pytest.raises(Exception) as info:
        torch.compile(lambda x: x + 1, backend=backend)(torch.rand(2))
    assert isinstance(compat.original_error(info.value), ValueError)
    plain = KeyError()
    assert compat.original_error(plain) is plain


def test_a_lock_can_be_renewed() -> None:
    """What runs in a forked child frees a lock that another thread holds."""
    lock = threading.RLock()
    thread = threading.Thread(target=lock.acquire)
    thread.start()
    thread.join()
    assert not lock.acquire(blocking=False)
    lock._at_fork_reinit()  # type: ignore[attr-defined]
    assert lock.acquire(blocking=False)
    compat.renew_after_fork(threading.RLock())


def test_ambient_changes_with_everything_that_modes_and_obstacles_look_at() -> None:
    """Equal before and after, another one inside; no mode or obstacle goes unseen."""
    module = nn.Linear(2, 2)
    usual = compat.ambient(module)
    inside: dict[str, Any] = {
        "no grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "device": lambda: torch.device("cpu"),
        "dispatch mode": TorchDispatchMode,
        "forward mode": torch.autograd.forward_ad.dual_level,
    }
    for name, context in inside.items():
        with context():
            assert compat.ambient(module) != usual, name
        assert compat.ambient(module) == usual, name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = compat.ambient(module)
    with torch.autocast("cpu", dtype=torch.float16):
        assert compat.ambient(module) != other
    seen: list[Any] = []
    torch.func.vmap(lambda t: seen.append(compat.ambient(module)) or t)(torch.rand(2))
    assert seen[0] != usual
    for register in (
        module.register_full_backward_hook,
        module.register_full_backward_pre_hook,
        lambda hook: module.register_forward_hook(hook, always_call=True),
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert compat.ambient(module) != usual
        handle.remove()
    module.eval()
    assert compat.ambient(module) != usual
    module.train()
    torch.set_default_dtype(torch.float64)
    assert compat.ambient(module) != usual
    torch.set_default_dtype(torch.float32)
    assert compat.ambient(module) == usual


def test_alike_tells_every_difference_but_the_values() -> None:
    """Class, dtype, sizes, strides, gradients, inference tensors, lazy negation; one dim may be left open."""
    x, mask = torch.rand(2, 1, 4), torch.ones(2, 1, 1, 5, dtype=torch.bool)
    check = compat.alike([x, mask], [None, 3])
    assert check(torch.rand(2, 1, 4), torch.zeros(2, 1, 1, 9, dtype=torch.bool))
    with torch.inference_mode():
        other = torch.rand(2, 1, 4)
    lazy = torch.rand(2, 1, 4, dtype=torch.complex64).conj().imag
    for t in (None, nn.Parameter(x), x.double(), torch.rand(3, 1, 4), torch.rand(2, 4), other, lazy):
        assert not check(t, mask)
    assert not check(torch.rand(2, 1, 8)[..., ::2], mask) and not check(x.clone().requires_grad_(), mask)
    assert not check(x, mask.long()) and not check(x, mask[:1])


def test_views_share_a_storage_and_copies_do_not() -> None:
    """For real tensors and for fake ones, which have no memory to compare."""
    with FakeTensorMode():
        fake = torch.empty(4, 4)
    for x in (torch.rand(4, 4), fake):
        assert compat.storage_of(x) == compat.storage_of(x[1:].t()) != compat.storage_of(x.clone())


def test_operators_say_whether_they_write() -> None:
    """By their schema; what is no operator says nothing."""
    assert compat.mutates(torch.ops.aten.index_copy_.default) and compat.mutates(torch.ops.aten.add.out)
    assert not compat.mutates(torch.ops.aten.add.Tensor) and not compat.mutates(torch.add)


def test_a_fake_tensor_with_some_sizes_filled_in() -> None:
    """Named symbols become numbers in shape and strides, the others stay symbols."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    policy = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    fake = mode.from_tensor(torch.rand(3, 5, 4), symbolic_context=policy)
    rows, columns = fake.shape[0], fake.shape[1]
    assert isinstance(rows, torch.SymInt) and isinstance(columns, torch.SymInt)
    one = with_sizes(fake, {rows.node.expr: 1})
    assert one.shape[0] == 1 and isinstance(one.shape[0], int) and isinstance(one.shape[1], torch.SymInt)
    both = with_sizes(fake, {rows.node.expr: 1, columns.node.expr: 2})
    assert tuple(both.shape) == (1, 2, 4) and both.stride() == (8, 4, 1) and both.dtype == fake.dtype


def test_a_length_of_its_own() -> None:
    """The last dim becomes a symbol that nothing else has, smaller than the size that was there."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    policy = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.DYNAMIC])
    fake = mode.from_tensor(torch.rand(3, 5) > 0, symbolic_context=policy)
    before = fake.shape[1]
    first, second = (of_shorter_length(fake).shape[1] for _ in range(2))
    assert isinstance(first, torch.SymInt) and isinstance(second, torch.SymInt) and isinstance(before, torch.SymInt)
    assert len({n.node.expr for n in (before, first, second)}) == 3
    assert first.node.hint == second.node.hint == 4
    assert of_shorter_length(fake).dtype == torch.bool and of_shorter_length(fake).shape[0] == 3


def test_sizes_that_no_dim_gives_get_a_symbol() -> None:
    """A dim of ``s // 4`` alone becomes a symbol, the same one everywhere; after a dim of ``s`` nothing changes."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    policy = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    whole = mode.from_tensor(torch.rand(12, 4), symbolic_context=policy)
    with mode:
        quarter, turned = whole.new_empty(whole.shape[0] // 4, 16), whole.new_empty(16, whole.shape[0] // 4)
    one, other = with_own_sizes([quarter, turned])
    (length,) = {tensor.shape[dim].node.expr for tensor, dim in ((one, 0), (other, 1))}  # type: ignore[union-attr]
    assert length.is_Symbol and other.stride()[0].node.expr == length  # type: ignore[attr-defined]
    assert length != whole.shape[0].node.expr and one.shape[0].node.hint == 3  # type: ignore[attr-defined]
    with mode:
        halves = whole.new_empty(2, (whole.shape[0] - 1) // 2 + 1, 8)
    (kept_open,) = with_own_sizes([halves])
    size = kept_open.shape[1].node.expr  # type: ignore[attr-defined]
    assert size.is_Symbol and kept_open.stride()[0].node.expr == 8 * size  # type: ignore[attr-defined]
    kept = with_own_sizes([whole, quarter])
    assert kept[0] is whole and kept[1] is quarter
    assert with_own_sizes([quarter, whole])[0].shape[0].node.expr.is_Symbol  # type: ignore[attr-defined]


def test_a_guard_on_an_attribute_is_read_in_both_forms() -> None:
    """To torch 2.11 its source is that of the attribute, since then that of the object and the name beside it."""
    owner = LocalSource("x")
    forms = {
        "until 2.11": Guard(AttrSource(owner, "scale"), GuardBuilder.HASATTR),
        "since 2.12": Guard(owner, functools.partial(GuardBuilder.HASATTR, attr="scale")),
    }
    for guard in forms.values():
        entry: Any = SimpleNamespace(orig_guard=guard, guard_type="HASATTR", name="x.scale")
        facts = guard_facts(entry)
        assert (facts.place, facts.word) == ((("local", "x"),), "scale")
