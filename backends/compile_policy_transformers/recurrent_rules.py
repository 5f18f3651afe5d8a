"""The rules of linear attention and state spaces that `recurrent_mixers` knows, by the names of their functions.

A rule is a pair of functions in the Python module of a mixer: one for many tokens and one for a single token. It is
known while both have the parameters that it was written against (Transformers 5.17 to 5.24); otherwise the mixer is
traced as it is, at the price of more graphs. The table, with what makes each rule need more than one graph:

- ``torch_chunk_gated_delta_rule`` (Gated DeltaNet: Qwen3-Next, Qwen3.5, OLMo hybrid) loops over chunks of 64 tokens;
- ``chunk_kimi_delta_attention`` (Kimi Linear, GLM-5 next, Bailing hybrid) does so too;
- ``mamba2_chunk_scan`` (Mamba 2, Bamba, Granite and Nemotron hybrids, Falcon-H1, Zamba2) reshapes into chunks, whose
  number gets fixed;
- ``mamba_selective_scan`` (Mamba, Jamba, Falcon Mamba) loops over tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compile_policy.errors import NotCompilable
from compile_policy_transformers import recurrence


class Handed:
    """What a traced mixer and the rule below it hand to each other; set inside a trace only.

    Attributes:
        states: the mixer's view of its cache; ``None`` without one.
        mask: (batch, tokens) padding mask of a decoder that hands none to its mixers.
        module: Python module of the mixer's functions.
    """

    def __init__(self) -> None:
        self.states: Any = None
        self.mask: torch.Tensor | None = None
        self.module = ""

    def state(self, dims: int) -> torch.Tensor | None:
        """The state for a rule whose states have ``dims`` dims; a mixer of several such heads calls it for each."""
        if self.states is None:
            return None
        state: torch.Tensor | None = self.states.recurrent
        number = self.states.taken
        self.states.taken = number + 1
        if state is None or number >= self.states.number(dims):
            raise NotCompilable("a mixer calls its rule in an unknown way")
        return state if state.dim() == dims else state[:, number]


handed = Handed()


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        chunks, step: names of the functions for many tokens and for one; each with its parameters.
        substitute: called in place of the first.
    """

    chunks: str
    step: str
    chunks_parameters: str
    step_parameters: str
    substitute: Callable[..., Any]

    def fits(self, names: Mapping[str, Any]) -> bool:
        return all(
            tuple(inspect.signature(names[name]).parameters) == tuple(parameters.split())
            for name, parameters in ((self.chunks, self.chunks_parameters), (self.step, self.step_parameters))
        )


def rule_of(used: frozenset[str], names: Mapping[str, Any]) -> Rule | None:
    """The rule of a mixer whose code uses the names ``used`` of its Python module, if it is one that is known."""
    found = [rule for rule in RULES if rule.chunks in used]
    if len(found) != 1 or found[0].step not in used or not found[0].fits(names):
        return None
    return found[0]


# The guards on a substitute are about the function that it stands for, defaults included: these have none.
def _gated_delta_rule(*args: Any, **kwargs: Any) -> Any:
    return _delta_rule("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", *args, **kwargs)


def _kimi_delta_attention(*args: Any, **kwargs: Any) -> Any:
    return _delta_rule("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention", *args, **kwargs)


def _mamba2_chunk_scan(*args: Any, **kwargs: Any) -> Any:
    return _chunk_scan(*args, **kwargs)


def _mamba_selective_scan(*args: Any, **kwargs: Any) -> Any:
    return _selective_scan(*args, **kwargs)


def _delta_rule(
    chunks: str,
    step: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    state = handed.state(4)
    if initial_state is not None or output_final_state != (state is not None) or cu_seqlens is not None:
        raise NotCompilable("the delta rule is called in an unknown way")
    if "chunk_size" in kwargs:
        raise NotCompilable("the delta rule is called with a chunk size")
    out, after = recurrence.delta_rule(
        query, key, value, g, beta, state, use_qk_l2norm_in_kernel, handed.module, chunks, step
    )
    return out, None if state is None else after


def _chunk_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    seq_idx: None = None,
    **kwargs: Any,
) -> Any:
    state = handed.state(4)
    if not (initial_states is z is seq_idx is None) or return_final_states != (state is not None):
        raise NotCompilable("the state-space scan is called in an unknown way")
    low, high = float(dt_limit[0]), float(dt_limit[1])
    out, after = recurrence.chunk_scan(
        hidden_states,
        dt,
        A,
        B,
        C,
        D,
        dt_bias,
        state,
        chunk_size,
        dt_softplus,
        low,
        None if high == math.inf else high,
        handed.module,
    )
    return out if state is None else (out, after)


def _selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    seq_idx: None = None,
    **kwargs: Any,
) -> Any:
    state = handed.state(3)
    if seq_idx is not None or return_last_state != (state is not None):
        raise NotCompilable("the selective scan is called in an unknown way")
    out, after = recurrence.selective_scan(
        hidden_states,
        dt,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        state,
        delta_softplus,
        use_mambapy,
        use_associative_scan,
        handed.module,
    )
    return out if state is None else (out, after)


_DELTA = "query key value g beta initial_state output_final_state use_qk_l2norm_in_kernel kwargs"
_DELTA_CHUNKS = "query key value g beta chunk_size initial_state output_final_state use_qk_l2norm_in_kernel kwargs"
_STEP = "state hidden_states dt A B C D dt_bias dt_softplus z kwargs"
RULES = (
    Rule(
        "torch_chunk_gated_delta_rule",
        "torch_recurrent_gated_delta_rule",
        _DELTA_CHUNKS,
        _DELTA,
        _gated_delta_rule,
    ),
    Rule("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention", _DELTA_CHUNKS, _DELTA, _kimi_delta_attention),
    Rule(
        "mamba2_chunk_scan",
        "mamba2_selective_state_update",
        "hidden_states dt A B C chunk_size D dt_bias initial_states dt_softplus dt_limit return_final_states kwargs",
        _STEP,
        _mamba2_chunk_scan,
    ),
    Rule(
        "mamba_selective_scan",
        "mamba_selective_state_update",
        "hidden_states dt A B C D z delta_bias delta_softplus return_last_state use_mambapy use_associative_scan "
        "kwargs",
        _STEP,
        _mamba_selective_scan,
    ),
)
