"""Operators with a forward per platform: the rule that switches them, and what each of them computes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as interleaved_rotary
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from compile_policy.config import CompilationConfig
from compile_policy.errors import ConfigError
from compile_policy.layers import (
    CustomOp,
    CustomOps,
    LayerError,
    RMSNorm,
    RotaryEmbedding,
    SiluAndMul,
    layer_rows,
    registry_scope,
    use_custom_ops,
)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with registry_scope():
        yield


class Shift(CustomOp):
    """Says which of its forwards ran."""

    def __init__(self, by: float = 0.0, **flags: bool) -> None:
        super().__init__(**flags)
        self.by = nn.Parameter(torch.tensor(by))

    def forward_native(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.by

    def forward_cpu(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.by + 100


def ops(*entries: str, mode: int = 0, backend: str = "inductor") -> CustomOps:
    return CustomOps.of(entries, mode=mode, backend=backend)


@pytest.mark.parametrize(
    ("mode", "backend", "base"),
    [
        (0, "inductor", "all"),
        (1, "inductor", "none"),
        (2, "inductor", "none"),
        (2, "eager", "all"),
        (2, "aot_eager", "all"),
    ],
)
def test_the_default_follows_the_compile_mode(mode: int, backend: str, base: str) -> None:
    """Inductor fuses native forms, so operators are off where it compiles, and on everywhere else."""
    assert ops(mode=mode, backend=backend).base == base
    assert ops("all", mode=mode, backend=backend).base == "all"
    assert ops("none", mode=mode, backend=backend).base == "none"


def test_the_default_configuration_switches_operators_off() -> None:
    """The rule reads the fields of the configuration as they are."""
    config = CompilationConfig()
    assert not CustomOps.of(config.custom_ops, mode=config.mode, backend=config.backend).enabled("rms_norm")


@pytest.mark.parametrize(
    ("entries", "rms_norm", "silu_and_mul"),
    [
        (["none"], False, False),
        (["all"], True, True),
        (["none", "+rms_norm"], True, False),
        (["all", "-rms_norm"], False, True),
        (["+rms_norm"], True, False),
        (["-rms_norm"], False, False),
        (["none", "+rms_norm", "-silu_and_mul"], True, False),
    ],
)
def test_the_rule(entries: list[str], rms_norm: bool, silu_and_mul: bool) -> None:
    """On: by ``all`` or by ``+name``, unless ``-name``."""
    found = ops(*entries, mode=2)
    assert (found.enabled("rms_norm"), found.enabled("silu_and_mul")) == (rms_norm, silu_and_mul)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["all", "none"], "all and none"),
        (["none", "none"], "none and none"),
        (["+rms_norm", "-rms_norm"], "rms_norm both on and off"),
        (["rms_norm"], "all, none, .name or -name"),
        (["+"], "all, none, .name or -name"),
        (["+rms_nrom"], "no operator. Known: rms_norm"),
        (["+lm_head_of_nobody"], "Known: rms_norm, rotary_embedding, silu_and_mul"),
        (["-parallel_lm_head"], "a PluggableLayer, which is not switched"),
    ],
)
def test_nonsense_is_refused(entries: list[str], message: str) -> None:
    """Contradictions, missing signs and unknown names are errors that say what to write."""
    with pytest.raises(ConfigError, match=message):
        ops(*entries)


def test_entries_without_effect_are_told() -> None:
    """A known operator that the model does not use can be reported."""
    assert ops("none", "+rms_norm", "-silu_and_mul").unused({"rms_norm"}) == ("-silu_and_mul",)


def test_the_forward_is_chosen_when_the_operator_is_built() -> None:
    """Inside the block decides; what was built before and after it follows the rule of its own time."""
    CustomOp.register("shift")(Shift)
    x = torch.zeros(1)
    before = Shift()
    with use_custom_ops(ops("none")):
        inside, forced = Shift(), Shift(enforce_enable=True)
        with use_custom_ops(ops("none", "+shift")):
            switched = Shift()
    assert [op(x).item() for op in (before, inside, forced, switched, Shift())] == [100, 0, 100, 100, 100]


def test_the_forward_follows_the_device() -> None:
    """An operator is not bound to the platform that it was built on; the native form stands in where one is missing."""
    op = Shift()
    assert op.platform_forward(torch.empty(1)) == "forward_cpu"
    assert op.platform_forward(x=torch.empty(1, device="meta")) == "forward_native"
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        gpu = "forward_hip" if torch.version.hip else "forward_cuda"
        assert op.platform_forward(torch.empty(1, device="cuda")) == gpu
        assert op.platform_forward(torch.empty(1, device="xpu")) == "forward_xpu"
        assert op.platform_forward(torch.empty(1, device="mps")) == "forward_oot"
    x = torch.zeros(1)
    for name in ("forward_cuda", "forward_hip", "forward_xpu", "forward_oot"):
        assert getattr(op, name)(x).item() == 0


def test_an_operator_needs_a_native_form() -> None:
    """Everything falls back to ``forward_native``; an operator without one is refused where it is named."""
    with pytest.raises(LayerError, match="no forward_native"):

        @CustomOp.register("hollow")
        class Hollow(CustomOp):
            def forward_cuda(self, x: torch.Tensor) -> torch.Tensor:
                return x


def test_an_override_is_switched_by_the_name_of_its_target() -> None:
    """``+rms_norm`` also switches a plug-in's class in the place of RMSNorm."""

    @RMSNorm.register_oot
    class Doubled(RMSNorm):
        def forward_cpu(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
            return 2 * self.forward_native(x)

    x = torch.randn(2, 8)
    with use_custom_ops(ops("none")):
        off = RMSNorm(8)
    with use_custom_ops(ops("none", "+rms_norm")):
        on = RMSNorm(8)
    assert type(off) is type(on) is Doubled
    assert torch.equal(on(x), 2 * off(x))
    assert next(row for row in layer_rows() if row.name == "rms_norm").count == 2


def test_an_operator_of_another_base_is_switched_by_the_name_too() -> None:
    """An operator that is no subclass but takes the place of RMSNorm is still ``rms_norm``."""

    @RMSNorm.register_oot(state_dict_compatible=True)
    class Own(CustomOp):
        def __init__(self, hidden_size: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(hidden_size))

        def forward_native(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with use_custom_ops(ops("none")):
        off = RMSNorm(4)
    with use_custom_ops(ops("none", "+rms_norm")):
        on = RMSNorm(4)
    assert type(off) is type(on) is Own
    assert (off.custom_op_enabled, on.custom_op_enabled) == (False, True)


def test_compile_native_is_one_graph_and_survives_a_copy() -> None:
    """A native form compiled by itself serves every size, and a deep copy computes with its own weights."""
    with use_custom_ops(ops("none", mode=2, backend="aot_eager")):
        op = Shift(1.0, compile_native=True)
    other = copy.deepcopy(op)
    with torch.no_grad():
        other.by.fill_(5.0)
        for size in (2, 3, 7):
            assert torch.equal(op(torch.zeros(size)), torch.full((size,), 1.0))
            assert torch.equal(other(torch.zeros(size)), torch.full((size,), 5.0))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(pickle.loads(pickle.dumps(op))(torch.zeros(1)), torch.ones(1))


@pytest.mark.parametrize("rule", [ops("none", mode=0), ops("none", mode=2, backend="eager"), ops("all", mode=2)])
def test_compile_native_does_nothing_where_nothing_is_compiled(rule: CustomOps) -> None:
    """Eager mode, the eager backend, and an operator that is on: no compile."""
    with use_custom_ops(rule):
        op = Shift(compile_native=True)
    op(torch.zeros(3))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


@pytest.mark.filterwarnings("error:torch.compile is ignored")
def test_compile_native_keeps_out_of_an_export() -> None:
    """Where something else traces, the native form is traced as it is."""
    with use_custom_ops(ops("none", mode=2, backend="aot_eager")):
        op = RMSNorm(4, compile_native=True)
    x = torch.randn(2, 4)
    exported = torch.export.export(nn.Sequential(op), (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), op.forward_native(x))


@pytest.mark.parametrize("entries", [["all"], ["none"]])
def test_operators_are_part_of_one_graph(entries: list[str]) -> None:
    """On or off, an operator does not break the graph around it, whatever the batch."""
    with use_custom_ops(ops(*entries, mode=2, backend="aot_eager")):
        model = nn.Sequential(RMSNorm(8), SiluAndMul(), RMSNorm(4, compile_native=True))
    inputs = [torch.randn(batch, 8) for batch in (2, 3, 5)]
    wanted = [model(x) for x in inputs]  # outside of the graph the last one compiles itself
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for x, want in zip(inputs, wanted, strict=True):
        torch.testing.assert_close(compiled(x), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    """Equal to Transformers', in both forms, and with a residual."""
    x, residual = torch.randn(2, 3, 16, dtype=dtype), torch.randn(2, 3, 16, dtype=dtype)
    theirs = LlamaRMSNorm(16, eps=1e-5).to(dtype)
    with torch.no_grad():
        theirs.weight.normal_()
    ours = RMSNorm.from_layer(theirs)
    assert isinstance(ours, RMSNorm) and ours.weight is theirs.weight
    assert torch.equal(ours.forward_native(x), theirs(x))
    torch.testing.assert_close(ours.forward_cuda(x), theirs(x))
    for forward in (ours.forward_native, ours.forward_cuda):
        out, total = forward(x, residual)
        assert torch.equal(total, x + residual)
        torch.testing.assert_close(out, theirs(x + residual))


def test_rms_norm_refuses_another_norm() -> None:
    """A norm of the same shape that computes something else is not replaced: the two are compared first."""

    class PlusOne(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + hidden_states

    with pytest.raises(LayerError, match="computes something else"):
        RMSNorm.from_layer(PlusOne(8))
    with pytest.raises(LayerError, match="no weight and epsilon"):
        RMSNorm.from_layer(nn.Linear(2, 2))
    with pytest.raises(LayerError, match="without data"):
        RMSNorm.from_layer(LlamaRMSNorm(8).to("meta"))


def test_an_operator_may_be_replaced_by_a_plain_module() -> None:
    """An override that is no operator has one forward and no switch; its state is compared like any other's."""

    @RMSNorm.register_oot(state_dict_compatible=True)
    class Plain(nn.Module):
        def __init__(self, hidden_size: int, eps: float = 1e-6, dtype: torch.dtype | None = None) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    assert type(RMSNorm(4)) is Plain


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_moved_operator_runs_the_forward_of_its_new_device(dtype: torch.dtype) -> None:
    """Built on the CPU and moved, the norm takes torch's fused kernel there, which equals the native form."""
    op = RMSNorm(64, dtype=dtype).to("cuda")
    x = torch.randn(8, 64, dtype=dtype, device="cuda")
    assert op.platform_forward(x) in ("forward_cuda", "forward_hip")
    torch.testing.assert_close(op(x), op.forward_native(x))


def test_silu_and_mul() -> None:
    """Gate in the first half, value in the second."""
    gate, up = torch.randn(2, 5), torch.randn(2, 5)
    assert torch.equal(SiluAndMul()(torch.cat((gate, up), -1)), nn.functional.silu(gate) * up)


def test_rotary_embedding_in_halves() -> None:
    """Equal to the rotation of Llama; the rest of a partly turned head passes."""
    q, k = torch.randn(2, 3, 4, 10), torch.randn(2, 3, 1, 10)
    positions = torch.tensor([[0, 1, 2], [7, 8, 9]])
    op = RotaryEmbedding(10, 8, 16)
    angles = positions[..., None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))
    wanted = apply_rotary_pos_emb(q[..., :8], k[..., :8], cos, sin, unsqueeze_dim=2)
    for got, want, x in zip(op(positions, q, k), wanted, (q, k), strict=True):
        torch.testing.assert_close(got, torch.cat((want, x[..., 8:]), -1))


def test_rotary_embedding_in_pairs() -> None:
    """Equal to the rotation of GPT-J."""
    q = torch.randn(2, 3, 4, 8)
    positions = torch.arange(3).expand(2, 3)
    angles = positions[..., None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    got, _ = RotaryEmbedding(8, 8, 16, is_neox_style=False)(positions, q, q)
    torch.testing.assert_close(got, interleaved_rotary(q, angles.sin(), angles.cos()))


def test_rotary_embedding_refuses_what_is_not_there() -> None:
    """Odd or too many dims, and positions beyond the table."""
    with pytest.raises(ValueError, match="even"):
        RotaryEmbedding(8, 7, 16)
    with pytest.raises(ValueError, match="head_size"):
        RotaryEmbedding(8, 10, 16)
    x = torch.randn(1, 1, 1, 8)
    with pytest.raises(IndexError):
        RotaryEmbedding(8, 8, 16)(torch.tensor([[16]]), x, x)
