"""One call of a captured graph, expanded on its own into pre-dispatch ATen."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.passes import values
from fxquant.passes.traces import Trace, Traces


def expand(gm: fx.GraphModule, node: fx.Node, traces: Traces) -> list[fx.Node] | None:
    """Replaces a call by the ATen calls that it makes.

    Autocast is taken from the surroundings: the caller enters it as the graph does.

    Args:
        gm: The graph module; it may get constants.
        node: The call. It is erased.
        traces: Those of the graph's other calls.

    Returns:
        The new nodes, or None if the call has to stay as it is: it gives no tensor, reads
        something that has no fake value, or cannot be traced on its own.
    """
    inputs = node.all_input_nodes
    if not _gives_tensors(node) or not all(_has_value(given) for given in inputs):
        return None
    traced = traces.of(node)
    if traced is None:
        return None
    output = traced.gm.graph.output_node().args[0]
    pieces = isinstance(output, (tuple, list))
    if pieces and not all(_takes_piece(user, node, output) for user in node.users):
        return None
    new, results = _inline(gm, node, traced, inputs)
    if pieces:
        for user in list(node.users):
            piece = results[user.args[1]]
            if user.users:
                user.replace_all_uses_with(piece)
            gm.graph.erase_node(user)
    else:
        node.replace_all_uses_with(results)
    gm.graph.erase_node(node)
    return new


def _gives_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return any(isinstance(item, Tensor) for item in value)
    return isinstance(value, Tensor)


def _has_value(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float))


def _takes_piece(user: fx.Node, node: fx.Node, pieces: Any) -> bool:
    """Whether a user reads one tensor out of a call's results."""
    return (
        user.target is operator.getitem
        and user.args[0] is node
        and isinstance(user.args[1], int)
        and (isinstance(pieces[user.args[1]], fx.Node) or not user.users)
    )


def _inline(
    gm: fx.GraphModule, node: fx.Node, traced: Trace, inputs: list[fx.Node]
) -> tuple[list[fx.Node], Any]:
    mapped: dict[fx.Node, Any] = {}
    given = iter(inputs)
    new: list[fx.Node] = []
    results: Any = None
    with gm.graph.inserting_before(node):
        for inner in traced.gm.graph.nodes:
            if inner.op == "placeholder":
                mapped[inner] = next(given)
                continue
            if inner.op == "output":
                results = fx.node.map_arg(inner.args[0], lambda n: mapped[n])
                continue
            if inner.op == "get_attr":
                mapped[inner] = _adopt_constant(gm, traced.gm, inner)
            else:
                mapped[inner] = gm.graph.node_copy(inner, lambda n: mapped[n])
            copy = mapped[inner]
            copy.meta = {"val": traced.found[inner]}
            copy.meta.update({k: node.meta[k] for k in values.PROVENANCE if k in node.meta})
            new.append(copy)
    return new, results


def _adopt_constant(gm: fx.GraphModule, traced: fx.GraphModule, inner: fx.Node) -> fx.Node:
    number = 0
    while hasattr(gm, f"_fxquant_constant_{number}"):
        number += 1
    name = f"_fxquant_constant_{number}"
    setattr(gm, name, getattr(traced, str(inner.target)))
    return gm.graph.get_attr(name)
