"""Code for a single row: the sizes of a decode step.

A linear layer over one row reads its whole weight to do two operations a number, so memory is all that counts. On a
CPU the BLAS product of a matrix and a single row is far from the speed at which memory can be read; a sum over
products that Inductor vectorises, and fuses with what surrounds it, comes near to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from compile_policy import compat


def single_row(gm: GraphModule, symbols: Mapping[Any, int]) -> GraphModule | None:
    """A copy of ``gm`` for the sizes that ``symbols`` gives, with linear layers over one row written as sums.

    ``None`` when there is no such layer.
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
    return GraphModule(gm, graph)


def _is_single(node: Node, symbols: Mapping[Any, int]) -> bool:
    """Whether the node is a linear layer on a CPU over one row, which is several without ``symbols``."""
    if node.op != "call_function" or node.target is not torch.nn.functional.linear:
        return False
    row = node.all_input_nodes[0].meta["example_value"]
    rows = math.prod(row.shape[:-1])
    if row.device.type != "cpu" or not isinstance(rows, torch.SymInt):
        return False
    return bool(rows.node.expr.subs(dict(symbols)) == 1)


def _sum_of_products(row: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    product = (row.reshape(1, -1) * weight).sum(-1)
    if bias is not None:
        product = product + bias
    return product.reshape(*row.shape[:-1], weight.shape[0])
