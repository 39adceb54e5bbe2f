"""What must hold after every pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from fxquant import errors
from fxquant.formats import PackedWeight
from fxquant.passes.context import Context
from fxquant.passes.regions import Region, operands

Aliases = set[tuple[int, str]]


def aliases(gm: fx.GraphModule) -> Aliases:
    """Which results share memory with which inputs: positions and placeholders' names."""
    inputs = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        storage = _storage(node.meta.get("val"))
        if storage is not None:
            inputs[storage.cdata] = node.name
    leaves = tree_leaves(gm.graph.output_node().args)
    found: Aliases = set()
    for position, leaf in enumerate(leaves):
        storage = _storage(leaf.meta.get("val")) if isinstance(leaf, fx.Node) else None
        if storage is not None and storage.cdata in inputs:
            found.add((position, inputs[storage.cdata]))
    return found


def _storage(value: Any) -> StorageWeakRef | None:
    if not isinstance(value, Tensor) or isinstance(value, PackedWeight):
        return None
    return StorageWeakRef(value.untyped_storage())


def verify(name: str, ctx: Context, before: Aliases) -> None:
    """Checks every graph of a context.

    Args:
        name: The pass that ran.
        ctx: What it left.
        before: What `aliases` gave for the first graph that has values.

    Raises:
        PassError: Something does not hold.
    """
    for region in ctx.regions:
        try:
            region.graph.lint()
        except RuntimeError as error:
            raise errors.broken_graph(name, str(error)) from error
        for node in region.graph.nodes:
            if node.op in ("call_function", "call_method") and "val" not in node.meta:
                raise errors.broken_graph(name, f"{node.name} has no value")
        _check_call(name, region)
    placeholders = ctx.regions[0].placeholders
    if len(placeholders) != len(ctx.inputs):
        reason = f"{len(placeholders)} placeholders, {len(ctx.inputs)} inputs"
        raise errors.broken_graph(name, reason)
    for node, given in zip(placeholders, ctx.inputs, strict=True):
        _check_input(name, node, given)
    added = aliases(ctx.gm) - before
    if added:
        raise errors.broken_graph(name, f"outputs share memory with inputs: {sorted(added)}")


def _check_call(name: str, region: Region) -> None:
    if region.call is None:
        return
    passed, taken = len(operands(region.call)), len(region.placeholders)
    if passed != taken:
        reason = f"{region.call.name} passes {passed} operands to a body that takes {taken}"
        raise errors.broken_graph(name, reason)


def _check_input(name: str, node: fx.Node, given: Any) -> None:
    value: Any = node.meta.get("val")
    if not isinstance(given, Tensor):
        return
    fits = isinstance(value, Tensor) and value.ndim == given.ndim and value.dtype == given.dtype
    if fits:
        sizes = zip(value.shape, given.shape, strict=True)
        fits = not any(isinstance(a, int) and a != b for a, b in sizes)
    if not fits:
        reason = f"{node.name} is {_said(value)}, its input {_said(given)}"
        raise errors.broken_graph(name, reason)


def _said(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"{value.dtype}{list(value.shape)}"
