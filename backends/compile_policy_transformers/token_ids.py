"""Token ids that a decoder reads beside their embeddings, and the history of them that it keeps in its cache."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import torch

from compile_policy.reference import preserved
from compile_policy_transformers.decoder_rules import DecoderRule
from compile_policy_transformers.known_code import tree_of

IDS = "input_ids"


class TokenIds:
    """What one decoder does with token ids; falsy for one that reads nothing but embeddings.

    Attributes:
        name: the argument that they go in.
        first: the token that its history is filled with where nothing came before.
    """

    def __init__(self, decoder: torch.nn.Module, rule: DecoderRule) -> None:
        config: Any = decoder.config
        reads = bool(rule.ids) and bool(getattr(config, rule.ids_where, None))
        self.name = rule.ids if reads else ""
        self._recover: Any = getattr(decoder, rule.ids_from) if reads else None
        end = getattr(config, "eos_token_id", None)
        self.first: int | None = None if not reads else end[0] if isinstance(end, list) else end

    def __bool__(self) -> bool:
        return bool(self.name)

    def complete(self, values: dict[str, Any], ids: torch.Tensor | None, embeds: torch.Tensor) -> None:
        """Give a call the ids (batch, sequence) that it has, or those that its embeddings are of, as eager finds them.

        Raises:
            RuntimeError: the embeddings are those of no tokens.
        """
        if self and values.get(self.name) is None:
            values[self.name] = self._recover(embeds) if ids is None else ids

    def of(self, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """Any ids, for a call with made-up embeddings (batch, sequence, hidden size)."""
        return {self.name: embeds.new_zeros(embeds.shape[:2], dtype=torch.long)} if self else {}


def layers_read_ids(decoder: Any) -> bool:
    """Whether a decoder's layers read the ids of tokens, so that embeddings alone are no call of it.

    One that routes tokens to experts by their ids does (DeepSeek V4): its forward hands them on as it goes through its
    layers, and two tokens show whether it can do without.
    """
    return _hands_on_ids(decoder) and not _runs(decoder, embedded=True) and _runs(decoder, embedded=False)


def takes_embeddings(decoder: Any, name: str) -> bool:
    """Whether a decoder can be given embeddings in place of ids: in an argument ``name``, or by way of others."""
    known = inspect.signature(decoder.forward).parameters
    return name in known or IDS not in known or _runs(decoder, embedded=True)


def _hands_on_ids(decoder: Any) -> bool:
    tree = tree_of(type(decoder).forward)
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For)] if tree is not None else []
    calls = [node for loop in loops for node in ast.walk(loop) if isinstance(node, ast.Call)]
    given = (value for call in calls for value in (*call.args, *(word.value for word in call.keywords)))
    return any(isinstance(value, ast.Name) and value.id == IDS for value in given)


def _runs(decoder: Any, *, embedded: bool) -> bool:
    """Whether the decoder runs on two tokens, or on their embeddings."""
    ids = torch.zeros((1, 2), dtype=torch.long, device=next(decoder.parameters()).device)
    with torch.no_grad(), preserved(decoder):
        try:
            call = {"inputs_embeds": decoder.get_input_embeddings()(ids)} if embedded else {IDS: ids}
            decoder.forward(**call, use_cache=False)
        except Exception:
            return False
    return True
