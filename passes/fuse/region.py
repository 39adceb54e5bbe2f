"""The pointwise work that follows products: how far it goes, and what it gives.

A region starts with one product, or with several of one activation, and takes in every pointwise
op whose other arguments do not depend on it. What is used outside of it are its results.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from fxquant.codegen.epilogue import FLOAT_DTYPES
from fxquant.passes.fuse import pointwise

MAX_RESULTS = 4
"""Values that a kernel gives at most: each is written out in full."""


class Order:
    """Where the nodes of a graph stand, as long as it is not changed.

    Args:
        graph: After autograd.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.at = {node: number for number, node in enumerate(graph.nodes)}
        self.writes = [number for node, number in self.at.items() if pointwise.mutates(node)]

    def barrier(self, start: int) -> int:
        """The first position after another at which a tensor is written to."""
        return next((number for number in self.writes if number > start), len(self.at))


@dataclass
class Region:
    """Products and the pointwise ops after them.

    Attributes:
        seeds: The products.
        axes: Of their results: ``"mn"``, or ``"emn"`` with a batch.
        nodes: The ops taken in, in the order of the graph.
        views: Views of the region's values that keep the order of elements, and the values.
        operands: Arguments from outside, each with its axes.
        ends: Why it does not go on: a clause for each op that was looked at and left.
    """

    seeds: tuple[fx.Node, ...]
    axes: str
    nodes: list[fx.Node] = field(default_factory=list)
    views: dict[fx.Node, fx.Node] = field(default_factory=dict)
    operands: dict[fx.Node, str] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)

    def base(self, node: fx.Node) -> fx.Node:
        """The value behind a view of the region; any other node is itself."""
        return self.views.get(node, node)

    def results(self) -> list[fx.Node]:
        """The values that are used outside, in the order of the graph."""
        inside = {*self.seeds, *self.nodes}
        return [node for node in (*self.seeds, *self.nodes) if self._leaves(node, inside)]

    def _leaves(self, node: fx.Node, inside: set[fx.Node]) -> bool:
        return any(
            self._leaves(user, inside) if user in self.views else user not in inside
            for user in node.users
        )

    def is_last(self, node: fx.Node) -> bool:
        """Whether nothing inside is made of a value."""
        return not any(self.base(a) is node for n in self.nodes for a in n.all_input_nodes)

    def drop(self, node: fx.Node) -> None:
        """Gives back an op and all that is made of it."""
        gone = {node}
        for later in self.nodes:
            if any(self.base(argument) in gone for argument in later.all_input_nodes):
                gone.add(later)
        self.nodes = [kept for kept in self.nodes if kept not in gone]
        self.views = {view: of for view, of in self.views.items() if of not in gone}
        read = {argument for kept in self.nodes for argument in kept.all_input_nodes}
        self.operands = {node: axes for node, axes in self.operands.items() if node in read}

    def joins(self) -> bool:
        """Whether some op is made of all the products."""
        under: dict[fx.Node, set[fx.Node]] = {seed: {seed} for seed in self.seeds}
        for node in self.nodes:
            found = [under.get(self.base(argument), set()) for argument in node.all_input_nodes]
            under[node] = set().union(*found)
        return any(len(found) == len(self.seeds) for found in under.values())


def grow(seeds: Sequence[fx.Node], axes: str, order: Order) -> Region | None:
    """The region of some products.

    Returns:
        None where one product depends on another, or a tensor is written to between them.
    """
    region = Region(tuple(seeds), axes)
    barrier = order.barrier(min(order.at[seed] for seed in seeds))
    if any(order.at[seed] > barrier for seed in seeds):
        return None
    held, cone = set(seeds), set(seeds)
    open_ends = {user for seed in seeds for user in seed.users}
    waiting = [(order.at[user], user) for user in open_ends]
    heapq.heapify(waiting)
    while open_ends and waiting:
        at, node = heapq.heappop(waiting)
        if node in cone:
            continue
        if node in held or node.op == "output" or at >= barrier:
            break
        cone.add(node)
        if node in open_ends:
            open_ends.discard(node)
            reason = _take(region, node, held, cone)
            if reason:
                region.ends.append(reason)
            else:
                held.add(node)
                open_ends.update(user for user in node.users if user not in cone)
        for user in node.users:
            heapq.heappush(waiting, (order.at[user], user))
    if any(argument in cone for seed in seeds for argument in seed.all_input_nodes):
        return None
    _trim(region)
    return region


def _take(region: Region, node: fx.Node, held: set[fx.Node], cone: set[fx.Node]) -> str:
    """Takes in an op that reads the region, or says why not."""
    op = str(node.target).removesuffix(".default")
    value = pointwise.tensor_of(node)
    if node.target in pointwise.VIEWS and value is not None and region.axes == "mn":
        source = node.args[0]
        outputs = region.seeds[0].meta["val"].shape[-1]
        if isinstance(source, fx.Node) and pointwise.equal(value.shape[-1], outputs):
            region.views[node] = region.base(source)
            return ""
    reason = _obstacle(node)
    if reason or value is None:
        return reason
    inside = [argument for argument in node.all_input_nodes if argument in held]
    if not any(pointwise.same_shape(a.meta["val"].shape, value.shape) for a in inside):
        return f"{op} broadcasts the product"
    operands: dict[fx.Node, str] = {}
    for argument in node.all_input_nodes:
        if argument in held or pointwise.constant(argument) is not None:
            continue
        if argument in cone:
            return f"{op} also takes what is made of the product elsewhere"
        axes = pointwise.operand_axes(argument, value, region.axes)
        if axes is None:
            return f"{op} takes a tensor that is no operand of a kernel"
        operands[argument] = axes
    region.operands.update(operands)
    region.nodes.append(node)
    return ""


def _obstacle(node: fx.Node) -> str:
    """Why no epilogue has an op, in a clause, or ``""``."""
    if str(node.target).startswith("fxquant."):
        return "the next product"
    if node.target in pointwise.VIEWS:
        return f"{str(node.target).removesuffix('.default')} into another shape"
    return pointwise.obstacle(node)


def _trim(region: Region) -> None:
    """Gives back what does not pay, or cannot be a result."""
    while True:
        results = region.results()
        poor = [node for node in results if node in region.nodes and _is_poor(region, node)]
        if not poor and len(results) > MAX_RESULTS and region.nodes:
            region.ends.insert(0, f"{len(results)} values would be results")
            poor = region.nodes[-1:]
        if not poor:
            return
        region.drop(poor[0])


def _is_poor(region: Region, node: fx.Node) -> bool:
    """Whether a value is better made outside.

    That is one that is no float, one that is only wider than what it is made of, and one that
    Inductor makes of other results within what reads it: the squares that a norm sums.
    """
    dtype = node.meta["val"].dtype
    if pointwise.name_of(dtype) not in FLOAT_DTYPES:
        return True
    if not region.is_last(node):
        return False
    if pointwise.is_cast(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if dtype.itemsize > source.meta["val"].dtype.itemsize:
            return True
    inside = {*region.seeds, *region.nodes}
    made_of = {region.base(argument) for argument in node.all_input_nodes} & inside
    return made_of <= set(region.results()) and all(map(_is_fused_by_inductor, node.users))


def _is_fused_by_inductor(node: fx.Node) -> bool:
    """Whether what an op reads need not lie in memory."""
    return pointwise.is_pointwise(node) or node.target in _REDUCTIONS


_aten = torch.ops.aten
_REDUCTIONS = (_aten.mean.dim, _aten.sum.dim_IntList, _aten.amax.default, _aten.var_mean.correction)
