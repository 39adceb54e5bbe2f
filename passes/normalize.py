"""Normalize: the many spellings of a product become a handful of ATen ops.

Dynamo's graph is copied, and every call that touches a parameter, or a view or cast of one, is
expanded on its own. The graph is never retraced as a whole: that would drop the gradient of a
custom `autograd.Function`, undo activation checkpointing, and trip over tensors that the model
makes.
"""

from __future__ import annotations

import torch
from torch import fx

from fxquant.passes import regions, views
from fxquant.passes.bind import candidates
from fxquant.passes.context import Context, PassReport
from fxquant.passes.expand import expand
from fxquant.passes.groups import gathered_from
from fxquant.passes.regions import Region
from fxquant.passes.state import State
from fxquant.passes.traces import Traces

GRAD_ENABLED, TRANSFORMED = "fxquant_grad_enabled", "fxquant_transformed"


def normalize(ctx: Context) -> PassReport:
    """Copies the graph and expands what touches a parameter."""
    ctx.regions = regions.copied(ctx.gm)
    ctx.gm = ctx.regions[0].gm
    root = ctx.regions[0]
    weights = {node for node, _ in candidates(root, ctx.inputs)}
    before = sum(len(region.graph.nodes) for region in ctx.regions)
    expanded = _normalize(ctx, root, weights, Traces())
    after = sum(len(region.graph.nodes) for region in ctx.regions)
    return PassReport("normalize", f"{expanded} calls expanded, {before} nodes became {after}")


def _normalize(ctx: Context, region: Region, derived: set[fx.Node], traces: Traces) -> int:
    """Expands the calls of one region, and of those inside it.

    Args:
        ctx: Has all regions.
        region: The graph.
        derived: Its nodes that are a parameter, or a view or cast of one.
        traces: Those of all regions.
    """
    with State() as state:
        return _walk(ctx, region, derived, traces, state)


def _walk(ctx: Context, region: Region, derived: set[fx.Node], traces: Traces, state: State) -> int:
    count = 0
    for node in list(region.graph.nodes):
        state.step(node)
        inside = [body for body in ctx.regions if body.call is node]
        for body in inside:
            passed = zip(body.placeholders, regions.operands(node), strict=True)
            weights = {p for p, operand in passed if operand in derived}
            count += _normalize(ctx, body, weights, traces)
        node.meta[GRAD_ENABLED] = torch.is_grad_enabled()
        node.meta[TRANSFORMED] = state.transforms > 0
        if inside or not _is_call(node) or not derived.intersection(node.all_input_nodes):
            continue
        marks = {key: node.meta[key] for key in (GRAD_ENABLED, TRANSFORMED)}
        new = None if state.transforms else expand(region.gm, node, traces)
        for piece in [node] if new is None else new:
            piece.meta.update(marks)
            is_weight = views.is_view(piece) or gathered_from(piece) is not None
            if is_weight and piece.args[0] in derived:
                derived.add(piece)
        count += new is not None
    return count


def _is_call(node: fx.Node) -> bool:
    if node.op == "call_method":
        return True
    return node.op == "call_function" and not isinstance(
        node.target, torch._ops.HigherOrderOperator
    )
