"""The path of a call: counters that are the truth, budget and faults, threads, and every mode of use."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from falling import falls_back
from torch import nn

from compile_policy import events
from compile_policy.errors import BudgetExceeded, CompileFault
from compile_policy.region import Region, RegionOptions, SignatureBinder, region_of


@dataclass(frozen=True)
class Options(RegionOptions):
    """Options whose lowering the test chooses."""

    lower: Any = None

    def lowering(self) -> Any:
        return self.lower or super().lowering()


class Net(nn.Module):
    """Two layers, a mask, a flag and dropout."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.up, self.down = nn.Linear(width, 8), nn.Linear(8, width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, twice: bool = False) -> torch.Tensor:
        y = self.dropout(self.down(torch.relu(self.up(x))))
        y = y if mask is None else y * mask[:, None]
        return y * 2 if twice else y


def region(module: nn.Module | None = None, backend: str = "eager", **options: Any) -> Region:
    module = Net().eval() if module is None else module
    dims = {"x": {0: None}, "mask": {0: None}, "y": {0: None}}
    made = Region(
        module, role="component", qualname="net", binder=SignatureBinder(dims), options=Options(backend, **options)
    )
    made.attach()
    return made


@pytest.fixture
def heard() -> Iterator[list[events.Event]]:
    found: list[events.Event] = []
    with events.listening(found.append):
        yield found


def kinds(heard: list[events.Event]) -> list[str]:
    return [e.kind for e in heard]


class Failing:
    """A lowering that raises, so many times, and then runs the captured graph as it is."""

    def __init__(self, error: BaseException, times: int = 10**9) -> None:
        self.error, self.left = error, times

    def __call__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.left:
            self.left -= 1
            raise self.error
        return gm.forward

    def ahead(self, gm: torch.fx.GraphModule) -> bool:
        return False

    def takes_any_graph(self) -> bool:
        return False

    def jit(self) -> Failing:
        return self


# -- counters ---------------------------------------------------------------------------------------------------------


def test_counters_say_what_happened() -> None:
    """``graphs`` counts captures, ``calls`` calls, ``eager_calls`` those that ran eager; else there is no fallback."""
    ours = region()
    for n in (3, 1, 0, 8, 3):
        x = torch.rand(n, 4)
        assert torch.equal(ours.module(x), ours.module.forward(x))
    row = ours.report()
    assert (row.graphs, row.calls, row.eager_calls, row.fallback) == (1, 5, 0, None)
    assert row.compile_seconds > 0 and sum(e.calls for found in ours.entries.values() for e in found) == 5
    ours.module(torch.rand(3, 4), twice=True)
    with falls_back("mask is a Sub, a tensor subclass"):
        ours.module(torch.rand(3, 4), torch.rand(3).as_subclass(type("Sub", (torch.Tensor,), {})))
    row = ours.report()
    assert (row.graphs, row.calls, row.eager_calls) == (2, 7, 1) and "Sub" in str(row.fallback)


def test_capture_count_is_what_dynamo_did() -> None:
    """The counter agrees with Dynamo's own, so that no trace goes uncounted."""
    torch._dynamo.utils.counters.clear()
    ours = region()
    ours.module(torch.rand(3, 4))
    ours.module(torch.rand(3, 4), twice=True)
    assert ours.graphs == torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_an_argument_left_out_or_given_as_its_default_is_one_call() -> None:
    """``f(x)``, ``f(x, None)`` and ``f(x=x, twice=False)`` share a graph."""
    ours = region()
    x = torch.rand(3, 4)
    ours.module(x), ours.module(x, None), ours.module(x=x, twice=False), ours.module(x, mask=None)
    assert ours.graphs == 1


def test_fallback_is_the_last_reason() -> None:
    """The reason of the last eager call is kept; compiled calls neither set nor clear it."""
    ours = region()
    x = torch.rand(3, 4)
    ours.module(x)
    assert ours.fallback is None
    handle = ours.module.register_full_backward_hook(lambda *a: None)
    with falls_back("the component has a backward hook"):
        ours.module(x)
    assert ours.fallback == "the component has a backward hook"
    handle.remove()
    ours.module(x)
    assert ours.fallback == "the component has a backward hook" and ours.eager_calls == 1
    with falls_back("TorchFunctionMode"), torch.overrides.BaseTorchFunctionMode():
        ours.module(x)
    assert "TorchFunctionMode" in str(ours.fallback) and ours.eager_calls == 2


def test_attach_and_detach_are_the_instance_s_affair() -> None:
    """Only the instance calls through the region; detached, it is as it was."""
    one, other = Net().eval(), Net().eval()
    before = set(one.__dict__)
    ours = region(one)
    assert region_of(one) is ours and region_of(other) is None
    other(torch.rand(2, 4))
    assert ours.calls == 0
    ours.detach()
    assert region_of(one) is None and set(one.__dict__) == before


def test_pause_runs_eager_and_counts_nothing() -> None:
    """Inside `pause` the module is on its own."""
    ours = region()
    with ours.pause():
        ours.module(torch.rand(3, 4))
    assert ours.report().calls == 0


# -- budget -----------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, k: int) -> torch.Tensor:
        return x * k


def test_over_budget_eager_runs_right_and_says_so(heard: list[events.Event]) -> None:
    """A storm of a changing integer: compiled up to the budget, eager and right beyond, with the argument named."""
    ours = region(Scaled(), max_entries=2, on_budget="eager")
    with falls_back("needs more than max_entries=2 graphs"):
        for k in range(6):
            assert torch.equal(ours.module(torch.ones(2), k), torch.full((2,), float(k)))
    assert (ours.graphs, ours.calls, ours.eager_calls) == (2, 6, 4)
    assert "max_entries=2" in str(ours.fallback)
    named = [e.message for e in heard if e.kind == "new_entry"]
    assert named == ["another graph is needed: argument k is 1, was 0"]
    assert "budget" in kinds(heard) and "fallback" in kinds(heard)
    ours.module(torch.ones(3), 1)
    assert ours.eager_calls == 4, "what was compiled within the budget still runs compiled"


def test_over_budget_error_raises() -> None:
    """``on_budget="error"`` raises with the component's name; compiled calls go on."""
    ours = region(Scaled(), max_entries=1, on_budget="error")
    ours.module(torch.ones(2), 1)
    with pytest.raises(BudgetExceeded, match="component net needs more than max_entries=1"):
        ours.module(torch.ones(2), 2)
    assert ours.module(torch.ones(2), 1)[0] == 1 and ours.graphs == 1


def test_over_budget_warn_compiles_with_an_event(heard: list[events.Event]) -> None:
    """``on_budget="warn"`` compiles on, and every graph beyond the budget is an event."""
    ours = region(Scaled(), max_entries=1, on_budget="warn")
    for k in range(3):
        ours.module(torch.ones(2), k)
    assert ours.graphs == 3 and kinds(heard).count("budget") == 2 and ours.eager_calls == 0


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_fault_runs_eager_and_is_remembered(heard: list[events.Event]) -> None:
    """A lowering that raises: right results, the cause in the report, and no second attempt for this key."""
    ours = region(lower=Failing(ValueError("no such kernel\nsecond line")))
    x = torch.rand(3, 4)
    with falls_back("compiling failed with ValueError: no such kernel"):  # once
        for _ in range(3):
            assert torch.equal(ours.module(x), ours.module.forward(x))
        assert (ours.graphs, ours.eager_calls) == (1, 3)
        assert ours.fallback == "compiling failed with ValueError: no such kernel"
        assert kinds(heard).count("fallback") == 1
        ours.module(x, twice=True)
    assert ours.graphs == 2, "another key is another attempt"
    assert ours.report().fallbacks == {"compiling failed with ValueError: no such kernel": 4}


def test_a_fault_raises_the_original_where_asked() -> None:
    """``on_fault="error"``: `CompileFault` with the lowering's own exception as its cause."""
    original = ValueError("no such kernel")
    ours = region(lower=Failing(original), on_fault="error")
    with pytest.raises(CompileFault, match="component net: compiling failed with ValueError: no such kernel") as info:
        ours.module(torch.rand(3, 4))
    assert info.value.__cause__ is original


def test_out_of_memory_in_compile_is_a_fault() -> None:
    """A MemoryError while compiling costs the compiled run, not the call."""
    ours = region(lower=Failing(MemoryError()))
    x = torch.rand(3, 4)
    with falls_back("not enough memory"):
        assert torch.equal(ours.module(x), ours.module.forward(x))
    assert "not enough memory" in str(ours.fallback)


def test_a_fault_in_one_component_leaves_the_others_compiled() -> None:
    """Regions share nothing but the lock."""
    model = nn.Sequential(Net(), Net()).eval()
    bad, good = region(model[0], lower=Failing(ValueError())), region(model[1])
    x = torch.rand(3, 4)
    with falls_back("ValueError"):
        assert torch.equal(model(x), model[1].forward(model[0].forward(x)))
    assert bad.fallback and not bad.entries and good.fallback is None and good.entry_count() == 1


def test_after_a_fault_the_module_is_what_it_was() -> None:
    """Names, keys, hooks and type are untouched by a failed compile."""
    model = nn.Sequential(Net()).eval()
    before = (list(model.state_dict()), [n for n, _ in model.named_modules()], type(model[0]), set(model[0].__dict__))
    ours = region(model[0], lower=Failing(ValueError()))
    with falls_back("ValueError"):
        model(torch.rand(3, 4))
    ours.detach()
    after = (list(model.state_dict()), [n for n, _ in model.named_modules()], type(model[0]), set(model[0].__dict__))
    assert after == before


def test_control_c_in_compile_leaves_the_module_usable() -> None:
    """KeyboardInterrupt goes through; nothing half-made is kept, and the next call compiles."""
    ours = region(lower=Failing(KeyboardInterrupt(), times=1))
    x = torch.rand(3, 4)
    with pytest.raises(KeyboardInterrupt):
        ours.module(x)
    assert not ours.entries and not ours.refused and ours.fallback is None
    assert torch.equal(ours.module(x), ours.module.forward(x))
    assert (ours.graphs, ours.eager_calls, ours.entry_count()) == (2, 0, 1)


def test_a_missing_compiler_is_one_clear_reason(tmp_path: Any) -> None:
    """Without a C++ compiler Inductor cannot work: the call runs eager, right, and the reason names the compiler."""
    script = textwrap.dedent("""
        import torch
        from torch import nn
        from compile_policy.region import Region, SignatureBinder
        class Gated(nn.Linear):
            def forward(self, x):
                return torch.sigmoid(super().forward(x)) * x + 1
        module = Gated(4, 4)
        ours = Region(module, role="t", binder=SignatureBinder({"x": {0: None}}))
        x = torch.rand(3, 4)
        with torch.no_grad():
            assert torch.equal(ours(x), module.forward(x))
        print(ours.eager_calls, ours.fallback)
    """)
    environ = {
        **os.environ,
        "CXX": "/nonexistent",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("1 compiling failed with ") and "compiler" in run.stdout.lower()
    assert "Traceback" not in run.stderr


# -- the user's own mistakes ------------------------------------------------------------------------------------------


def test_a_bad_shape_is_told_as_eager_tells_it_and_leaves_no_verdict(heard: list[events.Event]) -> None:
    """A wrong width before and after a good call: the module's own exception, and the good call is compiled."""
    ours = region(on_fault="error")
    bad = torch.rand(3, 5)
    with pytest.raises(RuntimeError) as wanted:
        ours.module.forward(bad)
    for _ in range(2):
        with pytest.raises(RuntimeError) as found:
            ours.module(bad)
        assert str(found.value) == str(wanted.value) and found.value.__cause__ is None and not found.value.__context__
        ours.module(torch.rand(3, 4))
    assert ours.fallback is None and not ours.refused and "fallback" not in kinds(heard)


def test_sizes_that_do_not_fit_each_other_do_not_poison_the_key() -> None:
    """Key and static sizes are right, two dynamic sizes contradict: raised as eager does; the next call is compiled."""
    ours = region()
    with pytest.raises(RuntimeError, match="must match"):
        ours.module(torch.rand(3, 4), torch.ones(5))
    ours.module(torch.rand(3, 4), torch.ones(3))
    assert ours.entry_count() == 1 and ours.eager_calls == 1
    with pytest.raises(RuntimeError, match="must match"):
        ours.module(torch.rand(3, 4), torch.ones(5))


def test_a_call_that_does_not_fit_the_signature() -> None:
    """A missing or unknown argument is the module's TypeError."""
    ours = region()
    for args, kwargs in [((), {}), ((torch.rand(3, 4),), {"nonsense": 1})]:
        with pytest.raises(TypeError, match=r"forward\(\)"):
            ours.module(*args, **kwargs)


def test_a_scalar_where_a_row_was_declared_runs_eager() -> None:
    """A tensor without the declared dim is no crash of ours: eager decides."""
    ours = region(Scaled())
    with falls_back("dim 0 of x, which has 0 dims"):
        assert ours.module(torch.tensor(2.0), 3) == 6


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x)


def test_an_error_at_run_time_is_told_as_eager_tells_it() -> None:
    """An id outside the table, found by the compiled graph: the exception is eager's, and the entry stays in use."""
    ours = region(Looks())
    good = torch.tensor([1, 4])
    ours.module(good)
    with pytest.raises(IndexError, match="index out of range in self"):
        ours.module(torch.tensor([1, 5]))
    assert torch.equal(ours.module(good), ours.module.forward(good))
    assert ours.graphs == 1 and not ours.refused


# -- hooks on the component -------------------------------------------------------------------------------------------


def test_hooks_on_the_component_run_round_its_graph() -> None:
    """Pre-hooks and hooks, with and without kwargs, added before or after the compile, change call and result."""
    module = Net().eval()
    ours = region(module)
    x = torch.rand(3, 4)
    ours.module(x)
    seen: list[str] = []

    def pre(m: nn.Module, args: Any) -> Any:
        seen.append("pre")
        return (args[0] + 1,)

    def pre_kwargs(m: nn.Module, args: Any, kwargs: Any) -> Any:
        seen.append("pre with kwargs")
        return args, {**kwargs, "twice": True}

    def post(m: nn.Module, args: Any, result: Any) -> Any:
        seen.append("post")
        return result - 1

    def post_kwargs(m: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        seen.append(f"post with {sorted(kwargs)}")

    handles = [
        module.register_forward_pre_hook(pre),
        module.register_forward_pre_hook(pre_kwargs, with_kwargs=True),
        module.register_forward_hook(post),
        module.register_forward_hook(post_kwargs, with_kwargs=True),
    ]
    assert torch.equal(module(x), module.forward(x + 1, twice=True) - 1)
    assert seen == ["pre", "pre with kwargs", "post", "post with ['twice']"] and ours.eager_calls == 0
    for handle in handles:
        handle.remove()
    assert torch.equal(module(x), module.forward(x)) and ours.graphs == 2


@pytest.mark.parametrize("kind", ["always", "global", "backward"])
def test_other_hooks_run_eager_with_the_reason(kind: str) -> None:
    """Hooks that a graph cannot be put between make the call eager, and the report says which."""
    module, seen = Net().eval(), []
    ours = region(module)
    x = torch.rand(3, 4)
    module(x)
    if kind == "always":
        handle = module.register_forward_hook(lambda *a: seen.append(1), always_call=True)
    elif kind == "global":
        handle = nn.modules.module.register_module_forward_hook(lambda *a: seen.append(1))
    else:
        handle = module.register_full_backward_hook(lambda *a: seen.append(1))
    with handle, falls_back("hook"):
        module(x).sum().backward()
    assert seen and ours.eager_calls == 1 and "hook" in str(ours.fallback)


# -- threads ----------------------------------------------------------------------------------------------------------


def test_first_calls_from_8_threads_make_one_graph() -> None:
    """Eight threads start together: one capture, eight counted calls, none eager, all results equal."""
    ours = region()
    x, start = torch.rand(3, 4), threading.Barrier(8)

    def work(_: int) -> torch.Tensor:
        start.wait()
        with torch.no_grad():
            return ours.module(x)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    with torch.no_grad():
        want = ours.module.forward(x)
    assert all(torch.equal(r, want) for r in results)
    assert (ours.graphs, ours.calls, ours.eager_calls) == (1, 8, 0)


def test_two_components_from_two_threads() -> None:
    """Different components called first from different threads: no deadlock, each captured once."""
    pair, start = [region(), region(Net(6).eval())], threading.Barrier(2)

    def work(ours: Region) -> bool:
        x = torch.rand(3, ours.module.up.in_features)  # type: ignore[union-attr]
        start.wait()
        with torch.no_grad():
            return torch.equal(ours.module(x), ours.module.forward(x))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, pair))
    assert [r.graphs for r in pair] == [1, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_during_a_compile_is_not_locked_out() -> None:
    """The compile lock is free in a forked child whoever held it in the parent."""
    ours = region()
    with ours.lock:
        child = os.fork()
        if child == 0:
            free: list[bool] = []
            thread = threading.Thread(target=lambda: free.append(ours.lock.acquire(timeout=5)))
            thread.start()
            thread.join()
            os._exit(0 if free == [True] else 1)
        assert os.waitpid(child, 0)[1] == 0


# -- modes of use -----------------------------------------------------------------------------------------------------


def test_gradients_equal_eager() -> None:
    """With grad enabled, input and parameter gradients are those of eager, in the first call and in later ones."""
    ours, plain = region(Net().eval(), backend="aot_eager"), Net().eval()
    for n in (3, 5):
        x = torch.rand(n, 4)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours.module(a).square().sum().backward()
        plain(b).square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
    for p, q in zip(ours.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert ours.graphs == 1 and ours.eager_calls == 0


def test_modes_are_told_apart_and_each_is_right() -> None:
    """grad, no_grad, inference_mode and autocast each have their own graph, and results of the right kind."""
    ours = region(backend="aot_eager")
    x = torch.rand(3, 4)
    modes: list[Callable[[], Any]] = [
        torch.enable_grad,
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
    ]
    for _ in range(2):
        for mode in modes:
            with mode():
                got, want = ours.module(x), ours.module.forward(x)
            torch.testing.assert_close(got, want)
            assert (got.requires_grad, got.is_inference(), got.dtype) == (
                want.requires_grad,
                want.is_inference(),
                want.dtype,
            )
    assert ours.graphs == len(modes) and ours.eager_calls == 0


def test_train_mode_is_another_graph_and_back() -> None:
    """Dropout draws in train mode and not in eval mode; nothing of one leaks into the other."""
    ours = region(backend="aot_eager")
    x = torch.rand(3, 4)
    for _ in range(2):
        ours.module.eval()
        assert torch.equal(ours.module(x), ours.module.forward(x))
        ours.module.train()
        torch.manual_seed(1)
        got = ours.module(x)
        torch.manual_seed(1)
        assert torch.equal(got, ours.module.forward(x)) and (got == 0).any()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def test_running_statistics_and_random_numbers_are_the_user_s() -> None:
    """Compiling runs the module on made-up numbers: neither its buffers nor the random state show a trace of that."""
    ours, plain = region(Normed().train(), backend="aot_eager"), Normed().train()
    torch.manual_seed(5)
    for _ in range(3):
        x = torch.rand(6, 4)
        state = torch.get_rng_state()
        torch.testing.assert_close(ours.module(x), plain(x))
        assert torch.equal(torch.get_rng_state(), state)
    assert ours.graphs == 1 and ours.eager_calls == 0
    for mine, theirs in zip(ours.module.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


class Makes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones(2) + torch.zeros(2, device=x.device)


def test_defaults_of_the_process_belong_to_the_key() -> None:
    """Default dtype and default device decide what a factory makes: another value is another graph."""
    ours = region(Makes(), backend="aot_eager")
    x = torch.rand(3)
    assert ours.module(x).dtype is torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert ours.module(x).dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"), falls_back("the call's tensors have no memory"):
        assert ours.module(x.to("meta")).device.type == "meta"
    assert ours.module(x).dtype is torch.float32


def test_vmap_and_forward_mode_run_eager() -> None:
    """Inside torch.func transformations a tensor is not what it seems: the module's own code runs."""
    ours = region(Scaled())
    ours.module(torch.ones(3), 2)
    with falls_back("torch.func"):
        assert torch.equal(torch.func.vmap(lambda x: ours.module(x, 2))(torch.ones(4, 3)), torch.full((4, 3), 2.0))
        _, tangent = torch.func.jvp(lambda x: ours.module(x, 2), (torch.ones(3),), (torch.ones(3),))
    assert torch.equal(tangent, torch.full((3,), 2.0)) and ours.eager_calls == 2


def test_an_outer_torch_compile_inlines_the_module() -> None:
    """Under the user's own torch.compile the region steps aside: one graph of theirs, none of ours."""
    ours = region()
    outer = torch.compile(lambda x: ours.module(x) + 1, backend="eager", fullgraph=True)
    x = torch.rand(3, 4)
    assert torch.equal(outer(x), ours.module.forward(x) + 1)
    assert ours.graphs == 0 and ours.calls == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values_pass_through(value: float) -> None:
    """NaN and infinities come out where eager has them."""
    ours = region(backend="aot_eager")
    ours.module(torch.rand(3, 4))
    x = torch.rand(3, 4)
    x[1, 2] = value
    torch.testing.assert_close(ours.module(x), ours.module.forward(x), equal_nan=True)


def test_strides_do_not_matter() -> None:
    """Transposed, sliced, expanded and offset inputs share the graph and give eager's numbers."""
    ours = region(backend="aot_eager")
    big = torch.rand(9, 8)
    for x in (big[:4, ::2], torch.rand(4, 3).t(), torch.rand(1, 4).expand(5, 4), big.flatten()[3:15].view(3, 4)):
        torch.testing.assert_close(ours.module(x), ours.module.forward(x))
    assert ours.graphs == 1


def test_inductor_is_right_for_every_size() -> None:
    """The default backend: one graph for 0, 1, 2 and larger batches, equal to eager."""
    ours = region(backend="inductor")
    with torch.inference_mode():
        for n in (3, 0, 1, 2, 8, 33):
            x = torch.rand(n, 4)
            torch.testing.assert_close(ours.module(x, torch.ones(n)), ours.module.forward(x, torch.ones(n)))
    assert (ours.graphs, ours.eager_calls, ours.fallback) == (1, 0, None)


# -- when the structure is looked at ----------------------------------------------------------------------------------


class Counting(SignatureBinder):
    """A binder for which no call starts a sequence."""

    def bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return replace(super().bind(module, args, kwargs), boundary=False)


class Factor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


@pytest.mark.parametrize("every_call", [True, False])
def test_an_attribute_in_mid_sequence(every_call: bool) -> None:
    """It counts at once where every call looks at the structure, else from the next sequence on."""
    module = Factor()
    options = RegionOptions(backend="eager", check_every_call=every_call)
    ours = Region(module, role="component", binder=Counting.inferred(Factor), options=options)
    x = torch.rand(3)
    for _ in range(2):  # the capture may have registered something, which the next call looks at
        assert torch.equal(ours(x), x * 2)
    module.scale = 5.0
    assert torch.equal(ours(x), x * (5 if every_call else 2))


class Wrapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 2


def test_a_hook_that_notes_something_notes_it_once_a_call() -> None:
    """A graph would not call it, and a trial run would call it too often: the component runs eager."""
    module, noted = Wrapping(), []
    module.inner.register_forward_hook(lambda m, a, result: noted.append(result))
    options = RegionOptions(backend="eager")
    ours = Region(module, role="component", binder=SignatureBinder.inferred(Wrapping), options=options)
    with falls_back("inner has a hook"):
        for _ in range(3):
            ours(torch.rand(2, 4))
    assert len(noted) == 3
    assert (ours.graphs, ours.eager_calls, ours.fallback) == (0, 3, "inner has a hook")


class Alone(nn.Module):
    """Does something else for a single row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] != 1 else x + 1


def test_a_first_call_that_needs_two_graphs_says_why() -> None:
    """The graph of the general example does not hold for one row: the second one comes with the condition."""
    ours = Region(Alone(), role="t", binder=SignatureBinder({"x": {0: None}}), options=RegionOptions("eager"))
    heard: list[events.Event] = []
    with events.listening(heard.append):
        x = torch.rand(1, 4)
        assert torch.equal(ours(x), x + 1) and ours.graphs == 2
        assert torch.equal(ours(torch.ones(3, 4)), torch.full((3, 4), 2.0)) and ours.graphs == 2
    (told,) = [e.data["difference"] for e in heard if e.kind == "new_entry"]
    assert told.startswith("sizes: ") and "!= 1" in told
