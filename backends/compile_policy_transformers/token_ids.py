"""Token ids that a decoder reads beside their embeddings, and the history of them that it keeps in its cache."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import torch

from compile_policy.random_state import seed_for_comparison
from compile_policy.reference import relative_error
from compile_policy.unseen import DoesNotRun, probed
from compile_policy_transformers.decoder_rules import DecoderRule
from compile_policy_transformers.known_code import tree_of

IDS = "input_ids"
#: Two ways to the same embeddings; scaled ones differ by far more.
_ALIKE = 1e-5
_SOME = 16


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


def more_than_embeddings(decoder: Any) -> bool:
    """Whether a decoder that is given ids does something else than embed them, such as to scale the embeddings.

    Or it looks up which ids given embeddings are of, and takes no others (Gemma 4). Then a call with ids is a graph of
    ids, and one with embeddings, which it takes as they are, one of embeddings. Its forward shows whether that may be;
    three tokens show whether it is so.
    """
    if not _embeds_otherwise(decoder):
        return False
    by_ids, embedded, of_no_ids = (_run(decoder, embedded=times) for times in (0.0, 1.0, 0.5))
    if by_ids is None or embedded is None:
        return False
    return of_no_ids is None or relative_error(by_ids, embedded) > _ALIKE


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


def _embeds_otherwise(decoder: Any) -> bool:
    """Whether more is assigned in the forward than one thing that a part of it makes of ids, and what they are."""
    tree = tree_of(type(decoder).forward)
    assigned = [n.value for n in ast.walk(tree) if isinstance(n, ast.Assign)] if tree is not None else []
    of_ids = [value for value in assigned if _names_ids(value)]
    return sum(isinstance(value, ast.Call) for value in of_ids) > 1 or not all(map(_only_embeds, of_ids))


def _names_ids(tree: ast.AST) -> bool:
    return any(isinstance(n, ast.Name) and n.id == IDS for n in ast.walk(tree))


def _only_embeds(value: ast.expr) -> bool:
    match value:
        case ast.Call(func=ast.Attribute(value=of), args=[ast.Name(id="input_ids")], keywords=[]):
            return not _names_ids(of)
        case (
            ast.Attribute()
            | ast.Call(func=ast.Attribute(value=ast.Name(id="input_ids")))
            | ast.Subscript()
            | ast.Name()
        ):
            return True  # its sizes, its device, another shape
        case ast.IfExp(body=body, orelse=other):
            return _only_embeds(body) and _only_embeds(other)
    return not _names_ids(value)


def _runs(decoder: Any, *, embedded: bool) -> bool:
    return _run(decoder, embedded=float(embedded)) is not None


def _run(decoder: Any, *, embedded: float) -> torch.Tensor | None:
    """What comes out for three tokens, or for their embeddings times a factor; ``None`` where it does not run."""
    device = next(decoder.parameters()).device
    special = [value for name, value in vars(decoder.config).items() if name.endswith("_token_id")]  # such as padding
    ids = torch.tensor([[n for n in range(_SOME) if n not in special][:3]], device=device)

    def run() -> torch.Tensor | None:
        try:
            embeds = decoder.get_input_embeddings()(ids) * embedded if embedded else None
            call = {IDS: ids} if embeds is None else {"inputs_embeds": embeds}
            out: torch.Tensor = decoder.forward(**call, use_cache=False)[0]
        except Exception:
            return None
        return out

    try:
        return probed(decoder, run, before=seed_for_comparison)  # of dropout, while it is trained
    except DoesNotRun:
        return None
