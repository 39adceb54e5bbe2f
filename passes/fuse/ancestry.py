"""What makes an activation: how far back one kernel can go.

Nodes are looked at backwards from the activation. One joins if it is pointwise or reduces rows, if
its arguments have the axes of the activation, and if nothing that is computed outside of the kernel
leads from it back into the kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.codegen.epilogue import FLOAT_DTYPES, OPERAND_DTYPES
from fxquant.passes.fuse import pointwise
from fxquant.passes.fuse.region import MAX_RESULTS

_aten = torch.ops.aten
REDUCTIONS = {
    _aten.mean.dim: "aten.mean.dim",
    _aten.sum.dim_IntList: "aten.sum.dim_IntList",
    _aten.amax.default: "aten.amax.default",
}
"""Reductions of rows, as a prologue has them."""
_VIEWS = (*pointwise.VIEWS, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.expand.default)
_Sizes = Sequence[Any]


@dataclass
class Ancestry:
    """The ops that make an activation, as far back as they were taken in.

    Attributes:
        x: The activation.
        order: The nodes, in the order of the graph.
        sizes: Of the rows that each node belongs to: ``[.., k]`` up to views.
        kept: Views and casts of its values that are read elsewhere, and stay.
        more: Other values that are read elsewhere.
        ends: Why it goes no further back, a clause for each op that was looked at and left.
        place: Where a kernel can stand that reads all operands and whose results are read later.
    """

    x: fx.Node
    order: list[fx.Node]
    sizes: dict[fx.Node, _Sizes]
    kept: set[fx.Node]
    more: list[fx.Node]
    ends: list[str]
    place: fx.Node


def is_view(node: fx.Node) -> bool:
    """Whether a node gives a value of its argument's in another shape, and nothing else."""
    return node.op == "call_function" and node.target in _VIEWS


def is_alias(node: fx.Node) -> bool:
    """Whether a node's numbers are those of its first argument: kernels compute in float32."""
    if is_view(node):
        return True
    if not pointwise.is_cast(node) or node.meta["val"].dtype != torch.float32:
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and source.meta["val"].dtype != torch.bool


def moments(node: fx.Node) -> fx.Node | None:
    """The value whose variance (piece 0) or mean (piece 1) over its rows a node is, or None."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return None
    pair = node.args[0]
    if pair.target is not _aten.var_mean.correction:
        return None
    source = pair.args[0]
    assert isinstance(source, fx.Node), "an op reads a node"
    kept = pair.kwargs.get("keepdim", False) and pair.kwargs.get("correction") == 0
    return source if kept and _is_last(pair.args[1], source.meta["val"]) else None


def reduces(node: fx.Node) -> bool:
    """Whether a node reduces rows to one number each."""
    if moments(node) is not None:
        return True
    if node.op != "call_function" or node.target not in REDUCTIONS or len(node.args) != 3:
        return False
    source, dims, keeps = node.args
    return isinstance(source, fx.Node) and keeps is True and _is_last(dims, source.meta["val"])


def _is_last(dims: Any, value: Tensor) -> bool:
    return isinstance(dims, (list, tuple)) and list(dims) in ([-1], [value.dim() - 1])


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """The values that a node of an ancestry is made of."""
    source = moments(node)
    if source is not None:
        return [source]
    return [node_ for node_ in node.all_input_nodes if pointwise.constant(node_) is None]


def grow(graph: fx.Graph, x: fx.Node, readers: Sequence[fx.Node]) -> Ancestry:
    """The ancestry of an activation.

    Args:
        graph: Where it is made.
        x: The activation ``[.., k]``.
        readers: What takes it as int8, and will not read it any more.
    """
    at = {node: number for number, node in enumerate(graph.nodes)}
    left: dict[fx.Node, str] = {}
    while True:
        found = _Growth(graph, x, tuple(readers), at, left)
        early = found.early()
        if early is None:
            return found.result()
        left[early] = "a value of it is read before all that the kernel reads is there"


@dataclass
class _Growth:
    """One try, which leaves some nodes out."""

    graph: fx.Graph
    x: fx.Node
    readers: tuple[fx.Node, ...]
    at: dict[fx.Node, int]
    left: dict[fx.Node, str]
    sizes: dict[fx.Node, _Sizes] = field(default_factory=dict)
    members: set[fx.Node] = field(default_factory=set)
    kept: set[fx.Node] = field(default_factory=set)
    more: list[fx.Node] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        first = min(self.at[reader] for reader in self.readers)
        writes = [a for node, a in self.at.items() if a < first and pointwise.mutates(node)]
        self.barrier = max(writes, default=-1)
        self.sizes[self.x] = self.x.meta["val"].shape
        feeding: set[fx.Node] = set()
        for node in reversed(list(self.at)[: self.at[self.x] + 1]):
            if node in self.sizes:
                reason = self._reason(node, feeding)
                if not reason:
                    self._take(node)
                    continue
                if reason != _NATURAL:
                    self.ends.append(reason)
                feeding.add(node)
            elif self._is_pair(node):
                continue
            elif any(user in feeding or user in self.members for user in node.users):
                feeding.add(node)

    def _is_pair(self, node: fx.Node) -> bool:
        """Whether a node is a pair of moments, all of whose pieces are inside."""
        return node.target is _aten.var_mean.correction and set(node.users) <= self.members

    def _reason(self, node: fx.Node, feeding: set[fx.Node]) -> str:
        """Why a node cannot join, in a clause, or ``""``."""
        op = str(node.target).removesuffix(".default")
        if node.op != "call_function" or str(node.target).startswith("fxquant."):
            return _NATURAL
        if node in self.left:
            return self.left[node]
        if self.at[node] < self.barrier:
            return "a write to a tensor comes between"
        if any(user in feeding for user in node.users):
            return f"what {op} gives is also computed with outside, and comes back"
        obstacle = _obstacle(node)
        if obstacle:
            return obstacle
        wanted = self._sizes_of_inputs(node)
        if wanted is None and is_view(node):
            return f"{op} cuts rows in another way"
        if wanted is None:
            return f"{op} takes a tensor that is no operand of a kernel"
        known_sizes = ((self.sizes.get(each, size), size) for each, size in wanted.items())
        if not all(pointwise.same_shape(a, b) for a, b in known_sizes):
            return f"{op} reads a value in two shapes"
        return self._reason_of_users(node, op)

    def _reason_of_users(self, node: fx.Node, op: str) -> str:
        if is_alias(node) or not self._is_read_elsewhere(node):
            return ""
        value = node.meta["val"]
        if not pointwise.same_shape(value.shape, self.sizes[node]):
            return f"what {op} gives for every row is read elsewhere, too"
        if pointwise.name_of(value.dtype) not in FLOAT_DTYPES:
            return f"what {op} gives is read elsewhere and no float"
        if len(self.more) == MAX_RESULTS:
            return f"more than {MAX_RESULTS} values are read elsewhere"
        return ""

    def _is_read_elsewhere(self, node: fx.Node) -> bool:
        return any(user not in self.readers and not self._is_inside(user) for user in node.users)

    def _is_inside(self, user: fx.Node) -> bool:
        """Whether a node reads nothing any more once the kernel is there."""
        return (user in self.members and user not in self.kept) or self._is_pair(user)

    def _sizes_of_inputs(self, node: fx.Node) -> dict[fx.Node, _Sizes] | None:
        """The rows that a node's arguments belong to, or None if they are none of ours."""
        sizes, value = self.sizes[node], node.meta["val"]
        if reduces(node):
            (source,) = inputs_of(node)
            same = pointwise.same_shape(source.meta["val"].shape, sizes)
            return {source: sizes} if same and self._is_ours(source) else None
        if is_view(node):
            return self._sizes_behind_view(node, node.args[0], sizes)
        found: dict[fx.Node, _Sizes] = {}
        for source in inputs_of(node):
            tensor = source.meta["val"]
            if not self._is_ours(source) or pointwise.axes_of(tensor.shape, sizes, "mk") is None:
                return None
            found[source] = sizes
        return found if pointwise.axes_of(value.shape, sizes, "mk") is not None else None

    def _sizes_behind_view(
        self, node: fx.Node, source: Any, sizes: _Sizes
    ) -> dict[fx.Node, _Sizes] | None:
        if not isinstance(source, fx.Node) or not self._is_ours(source):
            return None
        shape, k = source.meta["val"].shape, sizes[-1]
        axes = pointwise.axes_of(node.meta["val"].shape, sizes, "mk")
        if axes is None or not len(shape):
            return None
        if axes == pointwise.axes_of(shape, sizes, "mk"):
            return {source: sizes}
        if node.target is _aten.expand.default:
            broadcast = pointwise.axes_of(shape, sizes, "mk")
            return None if broadcast is None else {source: sizes}
        if axes == "mk" and pointwise.equal(shape[-1], k):
            return {source: shape}
        if axes == "m" and pointwise.equal(shape[-1], 1):
            return {source: (*shape[:-1], k)}
        return None

    def _is_ours(self, node: fx.Node) -> bool:
        """Whether a node gives a tensor that kernels read."""
        value, x = pointwise.tensor_of(node), self.x.meta["val"]
        if value is None or value.device != x.device:
            return False
        return pointwise.name_of(value.dtype) in OPERAND_DTYPES

    def _take(self, node: fx.Node) -> None:
        self.members.add(node)
        if self._is_read_elsewhere(node):
            if is_alias(node):
                self.kept.add(node)
            else:
                self.more.append(node)
        for source, sizes in (self._sizes_of_inputs(node) or {}).items():
            self.sizes.setdefault(source, sizes)

    def operands(self) -> list[fx.Node]:
        """What is read and not made inside."""
        return list(
            dict.fromkeys(
                source
                for node in self.order()
                for source in inputs_of(node)
                if source not in self.members
            )
        )

    def order(self) -> list[fx.Node]:
        return sorted(self.members, key=self.at.__getitem__)

    def place(self) -> fx.Node:
        """The first node that reads a result."""
        outside = [
            user
            for node in (*self.more, self.x)
            for user in node.users
            if not self._is_inside(user)
        ]
        return min((*self.readers, *outside), key=self.at.__getitem__)

    def early(self) -> fx.Node | None:
        """A value that is read before the last operand is there, or None."""
        place = self.at[self.place()]
        if all(self.at[operand] < place for operand in self.operands()):
            return None
        return next(node for node in self.more if any(self.at[u] == place for u in node.users))

    def result(self) -> Ancestry:
        order = self.order()
        more = sorted(self.more, key=self.at.__getitem__)
        return Ancestry(self.x, order, self.sizes, self.kept, more, self.ends, self.place())


def _obstacle(node: fx.Node) -> str:
    """Why an op is none of prologues, in a clause, or ``""``."""
    if reduces(node) or is_view(node):
        return ""
    obstacle = pointwise.obstacle(node)
    if not obstacle or pointwise.is_pointwise_in_torch(node):
        return obstacle
    if node.target is operator.getitem:
        return _NATURAL
    op = str(node.target).removesuffix(".default")
    return f"{op} is neither pointwise nor a reduction of rows"


_NATURAL = "-"
"""Of a product, an input of the graph and the like: nothing to report."""
