"""Code for a single row: the sizes of a decode step.

A linear layer over one row reads its whole weight to do two operations a number, so memory is all that counts. On a
CPU the BLAS product of a matrix and a single row is far from the speed at which memory can be read; a sum over
products that Inductor vectorises, and fuses with what surrounds it, comes near to it. Attention of one query is two
such sums; the operator for many queries spends more on its own preparations. Over a static cache the sums end where
the mask does: its tail, which hides the slots that nothing fills yet, is left out of it (`hidden_tails`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from compile_policy.blocks import Piece
from compile_policy.compat_fakes import of_shorter_length, with_sizes
from compile_policy.masked_attention import is_masked_attention

#: Under this name the ``meta`` of a graph holds options of Inductor for it.
OPTIONS = "compile_policy_options"

_OPTIONS = {
    # A normalised row is written down once, not computed again for every row of the weights that it meets.
    "realize_opcount_threshold": 3,
    # Products are added up without being rounded first.
    "cpp.enable_floating_point_contract_flag": "fast",
}
_ATTENTION = torch.nn.functional.scaled_dot_product_attention


def has_single_row(gm: GraphModule, symbols: Mapping[Any, int]) -> bool:
    """Whether ``gm`` has a linear layer of one row for the sizes that ``symbols`` gives: what `single_row` is for."""
    return any(_is_single(node, symbols) for node in gm.graph.nodes)


def single_row(gm: GraphModule, symbols: Mapping[Any, int], tails: Sequence[int] = ()) -> GraphModule:
    """A copy of ``gm`` for the sizes that ``symbols`` gives, with linear layers and attention of one row as sums.

    Args:
        tails: the inputs, by number, that are masks and come without the tail that hides everything.
    """
    graph, copies = Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(gm.graph, copies))
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    short = {inputs[number] for number in tails}
    for node in gm.graph.nodes:
        if node in short:
            copies[node].meta["example_value"] = of_shorter_length(with_sizes(_value(node), symbols))
        elif node.op == "placeholder":
            copies[node].meta["example_value"] = with_sizes(_value(node), symbols)
        elif _is_single(node, symbols):
            copies[node].target = _sum_of_products
        elif _is_single_query(node, symbols):
            copies[node].target = _one_query(node, shown=_mask_of(node) in short)
    made = GraphModule(gm, graph)
    made.meta[OPTIONS] = dict(_OPTIONS)
    return made


def hidden_tails(
    pieces: Sequence[Piece], symbols: Mapping[Any, int], single: Container[Any]
) -> dict[tuple[Any, ...], tuple[int, ...]]:
    """Masks among the inputs of the whole graph that nothing but attention of one query reads.

    Args:
        pieces: all of the graph.
        single: forms of pieces that have code for a single row.

    Returns:
        Form of a piece -> its inputs, by number, that are such masks. Pieces of one form agree on them.
    """
    uses = [
        (piece, number, node) for piece in pieces for number, node in enumerate(piece.inputs) if _is_row(node, symbols)
    ]
    others = {
        node
        for piece, number, node in uses
        if piece.form not in single
        or any(user.op == "output" for user in node.users)
        or not _masks_slots(piece.graph, number, symbols)
    }
    while True:
        found = {(piece.form, number) for piece, number, node in uses if node in others}
        more = {node for piece, number, node in uses if (piece.form, number) in found}
        if more <= others:
            break
        others |= more
    forms: dict[tuple[Any, ...], set[int]] = {}
    for piece, number, node in uses:
        if node not in others:
            forms.setdefault(piece.form, set()).add(number)
    return {form: tuple(sorted(numbers)) for form, numbers in forms.items()}


def _is_row(node: Node, symbols: Mapping[Any, int]) -> bool:
    """Whether an input of the whole graph may be the mask of one query on a CPU: (1, 1, 1, keys), true where seen."""
    value = _value(node)
    if node.op != "placeholder" or value.dtype != torch.bool or value.dim() != 4 or value.device.type != "cpu":
        return False
    return isinstance(value.shape[3], torch.SymInt) and _becomes_one(math.prod(value.shape[:3]), symbols)


def _masks_slots(gm: GraphModule, number: int, symbols: Mapping[Any, int]) -> bool:
    """Whether an input masks attention of one query over slots that may be empty, and is nothing else.

    States that were just put together are all filled; where they are also all read, both are one loop.
    """
    mask = [node for node in gm.graph.nodes if node.op == "placeholder"][number]
    queries = all(_is_single_query(node, symbols) and _mask_of(node) is mask for node in mask.users)
    return queries and not any(part.target is torch.cat for node in mask.users for part in node.all_input_nodes)


def _mask_of(node: Node) -> Any:
    return _arguments(node)[3]


def _value(node: Node) -> Any:
    return node.meta["example_value"]


def _is_single(node: Node, symbols: Mapping[Any, int]) -> bool:
    """Whether the node is a linear layer on a CPU over one row, which is several without ``symbols``."""
    if node.op != "call_function" or node.target is not torch.nn.functional.linear:
        return False
    row = node.all_input_nodes[0].meta["example_value"]
    return row.device.type == "cpu" and _becomes_one(math.prod(row.shape[:-1]), symbols)


def _is_single_query(node: Node, symbols: Mapping[Any, int]) -> bool:
    """Whether the node is attention on a CPU of one query per head, and nothing special."""
    if node.op != "call_function" or not (node.target is _ATTENTION or is_masked_attention(node)):
        return False
    query, key, value, _, dropout, causal = _arguments(node)
    shapes = [_value(n).shape for n in (query, key, value) if isinstance(n, Node)]
    if dropout != 0.0 or causal is not False or len(shapes) != 3 or any(len(shape) != 4 for shape in shapes):
        return False
    heads = [shape[1] for shape in shapes]
    fit = all(isinstance(n, int) for n in heads) and heads[0] % heads[1] == 0 and heads[1] == heads[2]
    return fit and _value(query).device.type == "cpu" and _becomes_one(shapes[0][2], symbols)


def _becomes_one(size: Any, symbols: Mapping[Any, int]) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr.subs(dict(symbols)) == 1)


def _arguments(node: Node) -> tuple[Any, ...]:
    """Query, key, value, mask, dropout and causality of an attention node."""
    if is_masked_attention(node):
        return (*node.args[:4], 0.0, False)
    return _arguments_of_sdpa(*node.args, **node.kwargs)


def _one_query(node: Node, *, shown: bool) -> Callable[..., torch.Tensor]:
    """What attention of one query is written out as; ``shown``: its mask comes without a hidden tail."""
    if is_masked_attention(node):
        return _masked_of_shown if shown else _masked_of_one
    return _attention_of_shown if shown else _attention_of_one


def _arguments_of_sdpa(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: Any = 0.0, is_causal: Any = False, **_: Any
) -> tuple[Any, ...]:
    return query, key, value, attn_mask, dropout_p, is_causal


def _sum_of_products(row: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    product = (row.reshape(1, -1) * weight).sum(-1)
    if bias is not None:
        product = product + bias
    return product.reshape(*row.shape[:-1], weight.shape[0])


def _attention_of_shown(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """`_attention_of_one` under a mask that may end before the keys do: what is behind its end is not seen."""
    shown = attn_mask.shape[-1]
    return _attention_of_one(query, key.narrow(2, 0, shown), value.narrow(2, 0, shown), attn_mask, *args, **kwargs)


def _masked_of_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """`masked_attention` of one query: (batch, 1, heads, head dim)."""
    grouped = query.shape[1] != key.shape[1]
    return _attention_of_one(query, key, value, mask, scale=scale, enable_gqa=grouped).transpose(1, 2)


def _masked_of_shown(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """`_masked_of_one` under a mask that may end before the keys do."""
    shown = mask.shape[-1]
    return _masked_of_one(query, key.narrow(2, 0, shown), value.narrow(2, 0, shown), mask, scale)


def _attention_of_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What `torch.nn.functional.scaled_dot_product_attention` gives for queries of shape (batch, heads, 1, width).

    A query that may see nothing gets zeros, as there.
    """
    heads = key.shape[1]
    groups = query.shape[1] // heads
    if groups > 1:  # the heads of a group read the same keys, one after the other
        query, key, value = query.unflatten(1, (heads, groups)), key.unsqueeze(2), value.unsqueeze(2)
        if attn_mask is not None and attn_mask.dim() == 4:
            by_head = attn_mask.shape[1] != 1
            attn_mask = attn_mask.unflatten(1, (heads, groups)) if by_head else attn_mask.unsqueeze(2)
    exact = torch.promote_types(query.dtype, torch.float32)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query.to(exact) * key.to(exact)).sum(-1, keepdim=True).transpose(-1, -2) * factor
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = torch.where(attn_mask, scores, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(top == -math.inf, 0.0, top))
    total = weights.sum(-1, keepdim=True)
    mixed = (weights.transpose(-1, -2) * value.to(exact)).sum(-2, keepdim=True)
    result = (mixed / torch.where(total == 0.0, 1.0, total)).to(query.dtype)
    return result.flatten(1, 2) if groups > 1 else result
