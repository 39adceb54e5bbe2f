"""Adapters: what is done to an activation before a product, and to its result after.

An `Adapter` takes a node and gives a node, inserting calls at the insertion point of the node's
graph. Sizes may be symbolic: they are read from the activation in the graph, never specialised.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.passes.values import current, emit, hint, same_layout

Adapter = Callable[[fx.Node], fx.Node]
_aten = torch.ops.aten


def rank(node: Any) -> int:
    """Dimensions of a node's value."""
    return int(node.meta["val"].ndim)


def chain(*adapters: Adapter | None) -> Adapter | None:
    """The adapters one after the other; None if there is nothing to do."""
    steps = [adapter for adapter in adapters if adapter is not None]
    if not steps:
        return None

    def run(node: fx.Node) -> fx.Node:
        for step in steps:
            node = step(node)
        return node

    return run


def transpose(node: fx.Node) -> fx.Node:
    """Swaps the last two dimensions."""
    return emit(node.graph, node, _aten.transpose.int, node, -1, -2)


def add(bias: Any) -> Adapter | None:
    """Adds a tensor, broadcast."""
    if bias is None:
        return None
    return lambda node: emit(node.graph, node, _aten.add.Tensor, node, bias)


def scaled_sum(addend: fx.Node, beta: float, alpha: float) -> Adapter:
    """``beta * addend + alpha * result``, in the result's dtype.

    A beta of 0 leaves the addend out, NaN or not, as torch does.
    """

    def run(node: fx.Node) -> fx.Node:
        graph = node.graph
        dtype = node.meta["val"].dtype
        if alpha != 1:
            node = emit(graph, node, _aten.mul.Tensor, node, alpha)
        if beta == 0:
            return node
        term = cast(addend, dtype, node)
        if beta != 1:
            term = emit(graph, node, _aten.mul.Tensor, term, beta)
        return emit(graph, node, _aten.add.Tensor, term, node)

    return run


def cast(node: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    """The node in `dtype`."""
    node = current(node)
    if node.meta["val"].dtype == dtype:
        return node
    return emit(like.graph, like, _aten.to.dtype, node, dtype)


def channels_last(spatial: int) -> tuple[Adapter, Adapter]:
    """Moves the channels of a convolution's input to the end, and those of its result back."""

    def to_x(node: fx.Node) -> fx.Node:
        return emit(node.graph, node, _aten.movedim.int, node, -1 - spatial, -1)

    def from_out(node: fx.Node) -> fx.Node:
        return emit(node.graph, node, _aten.movedim.int, node, -1, -1 - spatial)

    return to_x, from_out


def patches(kernel: Sequence[int]) -> Adapter:
    """Takes a convolution's input to one row a patch: ``[.., patches.., channels * kernel]``.

    Args:
        kernel: Extents of a patch; patches lie side by side, and what is left over is not read.
    """
    spatial = len(kernel)

    def to_x(node: fx.Node) -> fx.Node:
        first = rank(node) - spatial
        for number, extent in enumerate(kernel):
            dim = first + number
            node = emit(node.graph, node, _aten.unfold.default, node, dim, extent, extent)
        # [.., channels, patches.., kernel..] with the channels behind the patches.
        node = emit(node.graph, node, _aten.movedim.int, node, first - 1, first - 1 + spatial)
        shape = sizes(node, *range(first - 1 + spatial))
        inner = math.prod(node.meta["val"].shape[first - 1 + spatial :])
        return emit(node.graph, node, _aten.reshape.default, node, [*shape, inner])

    return to_x


def batched(batch: int, dims: int) -> tuple[Adapter, Adapter | None]:
    """Takes an activation to ``[batch, M, K]`` for a 3-D weight, and the result back.

    Args:
        batch: Matrices in the weight.
        dims: Dimensions of the activation, which broadcasts against the weight's as `matmul` says.
    """
    if dims == 1:
        return _spread_vector(batch), _drop_rows
    if dims == 2:
        return _spread_matrix(batch), None
    if dims == 3:
        return _spread_batch(batch), None
    return _fold_leading(batch)


def leading(batch: int, dims: int) -> tuple[Adapter | None, Adapter | None]:
    """The same where all matrices of the batch are one: the batch is one more leading dimension.

    Args:
        batch: Times the matrix is repeated.
        dims: Dimensions of the activation.
    """
    if dims == 1:
        return _spread_vector(batch), _drop_rows
    if dims == 2:
        return _spread_matrix(batch), None
    return (None if batch == 1 else _spread_leading(batch)), None


def _spread_leading(batch: int) -> Adapter:
    def run(node: fx.Node) -> fx.Node:
        size = node.meta["val"].shape[-3]
        if isinstance(size, int) and size == batch:
            return node
        shape = [*sizes(node, *range(rank(node) - 3)), batch, *sizes(node, -2, -1)]
        return emit(node.graph, node, _aten.expand.default, node, shape)

    return run


def sizes(node: fx.Node, *dims: int) -> list[Any]:
    """Sizes of some dimensions: numbers where they are known, nodes else."""
    shape = node.meta["val"].shape
    return [
        shape[dim]
        if isinstance(shape[dim], int)
        else emit(node.graph, node, _aten.sym_size.int, node, dim)
        for dim in dims
    ]


def _expand(node: fx.Node, batch: int, base: fx.Node) -> fx.Node:
    rows, inner = sizes(base, -2, -1)
    return emit(node.graph, node, _aten.expand.default, node, [batch, rows, inner])


def _spread_vector(batch: int) -> Adapter:
    def run(node: fx.Node) -> fx.Node:
        row = emit(node.graph, node, _aten.unsqueeze.default, node, 0)
        return _expand(row, batch, row)

    return run


def _drop_rows(node: fx.Node) -> fx.Node:
    return emit(node.graph, node, _aten.squeeze.dim, node, -2)


def _spread_matrix(batch: int) -> Adapter:
    return lambda node: _expand(node, batch, node)


def _spread_batch(batch: int) -> Adapter:
    def run(node: fx.Node) -> fx.Node:
        size = node.meta["val"].shape[0]
        return node if isinstance(size, int) and size == batch else _expand(node, batch, node)

    return run


def _fold_leading(batch: int) -> tuple[Adapter, Adapter]:
    """``[.., batch, M, K]`` to ``[batch, .. * M, K]`` and back."""
    folded: list[Any] = []

    def to_x(node: fx.Node) -> fx.Node:
        lead = sizes(node, *range(rank(node) - 3))
        rows, inner = sizes(node, -2, -1)
        node = emit(node.graph, node, _aten.expand.default, node, [*lead, batch, rows, inner])
        node = emit(node.graph, node, _aten.movedim.int, node, -3, 0)
        folded[:] = [*lead, rows]
        count: Any = 1
        for size in folded:
            if isinstance(size, int) and isinstance(count, int):
                count = count * size
            else:
                count = emit(node.graph, node, operator.mul, count, size)
        return emit(node.graph, node, _aten.reshape.default, node, [batch, count, inner])

    def from_out(node: fx.Node) -> fx.Node:
        n = node.meta["val"].shape[-1]
        shape = [node.meta["val"].shape[0], *folded, n]
        node = emit(node.graph, node, _aten.view.default, node, shape)
        return emit(node.graph, node, _aten.movedim.int, node, 0, -3)

    return to_x, from_out


def laid_out_as(node: fx.Node, wanted: Tensor) -> fx.Node:
    """The node with the dimension order in memory that eager gives, copied if it has another."""
    if same_layout(node.meta["val"], wanted):
        return node
    order = sorted(range(wanted.ndim), key=lambda dim: -hint(wanted.stride(dim)))
    if order == list(range(wanted.ndim)):
        return emit(
            node.graph, node, _aten.clone.default, node, memory_format=torch.contiguous_format
        )
    back = [order.index(dim) for dim in range(wanted.ndim)]
    node = emit(node.graph, node, _aten.permute.default, node, order)
    node = emit(node.graph, node, _aten.clone.default, node, memory_format=torch.contiguous_format)
    return emit(node.graph, node, _aten.permute.default, node, back)
