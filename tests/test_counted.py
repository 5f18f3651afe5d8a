"""Positions counted on from a length: another expression is traced, with the same values, and only for this one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compile_policy.applied import apply, report
from compile_policy.config import CompilationConfig
from compile_policy.reference import relative_error
from compile_policy_transformers.counted import _rewritten, counted_by_size
from compile_policy_transformers.tiny import tiny_inputs, tiny_model


class Table(nn.Embedding):
    def forward(self, past: Any, new: int, offset: int = 2) -> torch.Tensor:
        positions = torch.arange(past, past + new, dtype=torch.long, device=self.weight.device)
        return super().forward(positions + offset)


class Frozen(nn.Module):
    @torch.no_grad()
    def forward(self, past: Any, new: int) -> torch.Tensor:
        return torch.arange(past, past + new)


class FromZero(nn.Module):
    def forward(self, past: Any, new: int) -> torch.Tensor:
        return torch.arange(0, past + new)


class InSteps(nn.Module):
    def forward(self, past: Any, new: int) -> torch.Tensor:
        return torch.arange(past, past + new, 1)


class Signed(nn.Module):
    def sign(self, forward: Any) -> Any:
        return forward

    @torch.inference_mode()
    def forward(self, past: Any, new: int) -> torch.Tensor:
        return torch.arange(past, past + new)


@pytest.mark.parametrize("module", [Table(20, 4), Frozen()])
@pytest.mark.parametrize("past", [3, torch.tensor(3)])
def test_the_traced_form_has_the_same_values(module: Any, past: Any) -> None:
    """Also where the length is a tensor, whose value no graph may know; ``super()`` and defaults are as before."""
    want = module(past, 5)
    assert "forward" not in vars(module)
    with counted_by_size(module):
        assert "forward" in vars(module)
        assert torch.equal(module(past, 5), want)  # eager: the module's own
        traced = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)(past, 5)
    assert torch.equal(traced, want) and traced.requires_grad == want.requires_grad
    assert "forward" not in vars(module)


def test_the_line_is_that_of_the_module() -> None:
    """What goes wrong in the traced form is told with the place in the model's file."""
    made = next(c.cell_contents for c in _rewritten(Table.forward).__closure__ if hasattr(c.cell_contents, "__code__"))
    assert made.__code__.co_filename == __file__
    assert abs(made.__code__.co_firstlineno - Table.forward.__code__.co_firstlineno) <= 1


@pytest.mark.parametrize("module", [FromZero(), InSteps(), Signed(), nn.Linear(2, 2)])
def test_other_code_is_left_alone(module: nn.Module) -> None:
    with counted_by_size(module):
        assert "forward" not in vars(module)


@torch.no_grad()
def test_one_graph_with_a_static_cache() -> None:
    """trocr counts like this, and a static cache gives it a tensor."""
    model = tiny_model("trocr")
    wish = {"max_new_tokens": 4, "cache_implementation": "static", "output_logits": True}
    prompts = [tiny_inputs(model, text_len=n, batch=rows) for n, rows in ((9, 1), (14, 2))]
    want = [model.generate(**p, **wish, return_dict_in_generate=True).logits for p in prompts]
    apply(model, CompilationConfig(backend="eager"))
    got = [model.generate(**p, **wish, return_dict_in_generate=True).logits for p in prompts]
    errors = [relative_error(g, w) for a, b in zip(got, want, strict=True) for g, w in zip(a, b, strict=True)]
    assert max(errors) < 1e-4
    (row,) = (c for c in report(model).components if c.role == "decoder")
    assert (row.graphs, row.eager_calls) == (1, 0)
