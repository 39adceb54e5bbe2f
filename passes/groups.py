"""Rows that are multiplied with one of several matrices each, in the order that kernels want.

A grouped kernel reads rows sorted by the matrix that they belong to, and where each matrix' rows
end. Models that pick a matrix for every row, ``bmm(weight[ids], x)``, get their rows sorted before
and put back after, once for all products with the same ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.passes import adapt, values
from fxquant.passes.adapt import Adapter
from fxquant.passes.values import emit

_aten = torch.ops.aten

Ends = Callable[[fx.Node], fx.Node]
"""Takes the product that stands behind the insertion point, and gives int32 ``[batch]``: the row
after the last of each matrix."""


def given(offsets: fx.Node) -> Ends:
    """The ends that the model's own product is given."""
    return lambda node: adapt.cast(offsets, torch.int32, node)


@dataclass(frozen=True)
class _Order:
    """How rows are sorted.

    Attributes:
        there: The rows in the order of their matrices.
        back: Where each row went.
        ends: The row after the last of each matrix.
    """

    there: fx.Node
    back: fx.Node
    ends: fx.Node


class Picked:
    """Rows whose matrices are picked by numbers.

    Args:
        ids: Integers ``[s]``; below 0 they count from the last matrix.
        batch: How many matrices there are.
    """

    def __init__(self, ids: fx.Node, batch: int) -> None:
        self.ids, self.batch = ids, batch
        self._orders: dict[tuple[fx.Graph, Any], _Order] = {}

    def adapters(self) -> tuple[Adapter, Ends, Adapter]:
        """For one product: ``[s, m, k]`` to sorted ``[s * m, k]``, the ends, and the way back."""
        made: list[Any] = []

        def to_x(node: fx.Node) -> fx.Node:
            rows = node.meta["val"].shape[1]
            flat = emit(node.graph, node, _aten.flatten.using_ints, node, 0, 1)
            # A number of rows that is not known now may be another one for the next product.
            order = self._order(node, rows) if isinstance(rows, int) else self._sorted(node)
            made[:] = [node, order]
            return emit(node.graph, node, _aten.index_select.default, flat, 0, order.there)

        def ends(_: fx.Node) -> fx.Node:
            end: fx.Node = made[1].ends
            return end

        def from_out(node: fx.Node) -> fx.Node:
            x, order = made
            node = emit(node.graph, node, _aten.index_select.default, node, 0, order.back)
            sizes = [*adapt.sizes(x, 0, 1), node.meta["val"].shape[-1]]
            return emit(node.graph, node, _aten.view.default, node, sizes)

        return to_x, ends, from_out

    def _order(self, node: fx.Node, rows: int) -> _Order:
        key = (node.graph, rows)
        if key not in self._orders:
            self._orders[key] = self._sorted(node)
        return self._orders[key]

    def _sorted(self, node: fx.Node) -> _Order:
        graph = node.graph

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return emit(graph, node, target, *args, **kwargs)

        ids = call(_aten.remainder.Scalar, self.ids, self.batch)
        if node.meta["val"].shape[1] != 1:
            ids = call(_aten.unsqueeze.default, ids, 1)
            ids = call(_aten.expand.default, ids, adapt.sizes(node, 0, 1))
            ids = call(_aten.flatten.using_ints, ids)
        pair = call(_aten.sort.stable, ids, stable=True)
        ordered, there = values.pieces(pair, 2)
        numbers = call(_aten.new_ones.default, ids, [self.batch], dtype=torch.int64)
        numbers = call(_aten.cumsum.default, numbers, 0)
        ends = call(_aten.searchsorted.Tensor, ordered, numbers, out_int32=True)
        return _Order(there, call(_aten.argsort.default, there), ends)


def gathered_from(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The tensor and the numbers of a call that picks matrices, ``weight[ids]``, or None."""
    packet = getattr(node.target, "overloadpacket", None) if isinstance(node, fx.Node) else None
    if packet is _aten.index and len(node.args) == 2 and len(node.args[1]) == 1:
        source, ids = node.args[0], node.args[1][0]
    elif packet is _aten.index_select and node.args[1] == 0:
        source, _, ids = node.args
    else:
        return None
    fits = isinstance(ids, fx.Node) and _value(ids).ndim == 1 and _value(source).ndim == 3
    return (source, ids) if fits and _value(ids).dtype in (torch.int32, torch.int64) else None


def _value(node: fx.Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value
