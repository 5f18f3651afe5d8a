"""Code for a single row: the sizes of a decode step.

A linear layer over one row reads its whole weight to do two operations a number, so memory is all that counts. On a
CPU the BLAS product of a matrix and a single row is far from the speed at which memory can be read; a sum over
products that Inductor vectorises, and fuses with what surrounds it, comes near to it. Attention of one query is two
such sums; the operator for many queries spends more on its own preparations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from compile_policy import compat

#: Under this name the ``meta`` of a graph holds options of Inductor for it.
OPTIONS = "compile_policy_options"

_OPTIONS = {
    # A normalised row is written down once, not computed again for every row of the weights that it meets.
    "realize_opcount_threshold": 3,
    # Products are added up without being rounded first.
    "cpp.enable_floating_point_contract_flag": "fast",
}
_ATTENTION = torch.nn.functional.scaled_dot_product_attention


def single_row(gm: GraphModule, symbols: Mapping[Any, int]) -> GraphModule | None:
    """A copy of ``gm`` for the sizes that ``symbols`` gives, with linear layers and attention of one row as sums.

    ``None`` when there is no such linear layer.
    """
    if not any(_is_single(node, symbols) for node in gm.graph.nodes):
        return None
    graph, copies = Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(gm.graph, copies))
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["example_value"]
            copies[node].meta["example_value"] = compat.with_sizes(value, symbols)
        elif _is_single(node, symbols):
            copies[node].target = _sum_of_products
        elif _is_single_query(node, symbols):
            copies[node].target = _attention_of_one
    made = GraphModule(gm, graph)
    made.meta[OPTIONS] = dict(_OPTIONS)
    return made


def _is_single(node: Node, symbols: Mapping[Any, int]) -> bool:
    """Whether the node is a linear layer on a CPU over one row, which is several without ``symbols``."""
    if node.op != "call_function" or node.target is not torch.nn.functional.linear:
        return False
    row = node.all_input_nodes[0].meta["example_value"]
    return row.device.type == "cpu" and _becomes_one(math.prod(row.shape[:-1]), symbols)


def _is_single_query(node: Node, symbols: Mapping[Any, int]) -> bool:
    """Whether the node is attention on a CPU of one query per head, as many heads as keys have, and nothing special."""
    if node.op != "call_function" or node.target is not _ATTENTION:
        return False
    query, key, value, _, dropout, causal = _arguments(*node.args, **node.kwargs)
    shapes = [n.meta["example_value"].shape for n in (query, key, value) if isinstance(n, Node)]
    if dropout != 0.0 or causal is not False or len(shapes) != 3 or any(len(shape) != 4 for shape in shapes):
        return False
    alike = all(shape[1] == shapes[0][1] for shape in shapes) and isinstance(shapes[0][1], int)
    on_cpu = query.meta["example_value"].device.type == "cpu"
    return alike and on_cpu and _becomes_one(shapes[0][2], symbols)


def _becomes_one(size: Any, symbols: Mapping[Any, int]) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr.subs(dict(symbols)) == 1)


def _arguments(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: Any = 0.0, is_causal: Any = False, **_: Any
) -> tuple[Any, ...]:
    return query, key, value, attn_mask, dropout_p, is_causal


def _sum_of_products(row: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    product = (row.reshape(1, -1) * weight).sum(-1)
    if bias is not None:
        product = product + bias
    return product.reshape(*row.shape[:-1], weight.shape[0])


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
    return (mixed / torch.where(total == 0.0, 1.0, total)).to(query.dtype)
