"""Epilogues and joins: products take in the pointwise work after them.

`join` first makes one kernel of products of one activation: of two that a pointwise op brings
together (the gate and the up projection of a gated MLP), and of several of one form (query, key
and value). `epilogues` then extends every product that is left by the work on its result.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxquant.codegen.epilogue import (
    Epilogue,
    EpilogueNode,
    EpilogueOperand,
    EpilogueResult,
)
from fxquant.codegen.spec import KernelSpec
from fxquant.passes import values
from fxquant.passes.fuse import pointwise
from fxquant.passes.fuse.decisions import SITES, Decision
from fxquant.passes.fuse.region import MAX_RESULTS, Order, Region, grow
from fxquant.passes.fuse.words import words

_fxquant = torch.ops.fxquant


def join(graph: fx.Graph) -> list[Decision]:
    """Joins products of one activation, each joint kernel with what follows it."""
    made: list[Decision] = []
    order = Order(graph)
    for group in _groups(graph):
        left = list(group)
        for pair in itertools.combinations(group, 2):
            if not set(pair) <= set(left):
                continue
            region = grow(pair, _axes(pair[0]), order)
            if region is not None and region.joins():
                made.append(_rewrite(graph, region, order, "join"))
                order = Order(graph)
                left = [node for node in left if node not in pair]
        if len(left) < 2:
            continue
        region = grow(left[:MAX_RESULTS], _axes(left[0]), order)
        if region is None:
            reason = "one of them needs another's result, or a tensor is written to between them"
            sites = tuple(site for node in left for site in node.meta[SITES])
            made.append(Decision("join", sites, done=False, reason=reason))
        elif len(region.results()) <= MAX_RESULTS:
            made.append(_rewrite(graph, region, order, "join"))
            order = Order(graph)
    return [*made, *_apart(graph)]


def _apart(graph: fx.Graph) -> list[Decision]:
    """Why products that still have an activation in common were not joined."""
    sharing: dict[fx.Node, list[fx.Node]] = {}
    for op in (_fxquant.launch.default, _fxquant.launch_several.default):
        for node in graph.find_nodes(op="call_function", target=op):
            sharing.setdefault(node.args[0], []).append(node)
    made = []
    for nodes in sharing.values():
        specs = [_spec(node) for node in nodes]
        if len(nodes) < 2:
            continue
        if len({spec.weight for spec in specs}) > 1:
            sizes = list(dict.fromkeys(f"{s.weight.n}x{s.weight.k}" for s in specs))
            found = f"are {', '.join(sizes)}" if len(sizes) > 1 else "are encoded in several ways"
            reason = f"a kernel takes weights of one form, and these {found}"
        else:
            continue
        sites = tuple(site for node in nodes for site in node.meta[SITES])
        made.append(Decision("join", sites, done=False, reason=reason))
    return made


def epilogues(graph: fx.Graph) -> list[Decision]:
    """Extends products by the pointwise work on their results."""
    made: list[Decision] = []
    order = Order(graph)
    for node in list(_products(graph)):
        region = grow([node], _axes(node), order)
        assert region is not None, "a product alone does not depend on itself"
        if region.nodes:
            made.append(_rewrite(graph, region, order, "epilogue"))
            order = Order(graph)
        elif _spec(node).weights == 1:
            why = region.ends[0] if region.ends else "its result is the graph's"
            made.append(Decision("epilogue", node.meta[SITES], done=False, reason=why))
    return made


def _products(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=_fxquant.launch.default))


def _spec(node: fx.Node) -> KernelSpec:
    return KernelSpec.from_json(str(node.args[3]))


def _axes(node: fx.Node) -> str:
    return "mn" if _spec(node).batch is None else "emn"


def _beside(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """What a product takes beside the epilogue's operands: of the activation, and of its own."""
    spec, extra = _spec(node), node.args[2]
    first = len(spec.epilogue.operands)
    found: list[fx.Node] = list(extra[first:])  # type: ignore[index,arg-type]
    given = spec.outliers is not None and spec.outliers.columns is not None
    # The numbers of the columns, and their weight.
    return (found[:1] + found[2:], found[1:2]) if given else (found, [])


def _groups(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Products of one activation with weights of one form, in the order of the graph."""
    groups: dict[Any, list[fx.Node]] = {}
    for node in _products(graph):
        beside, _ = _beside(node)
        form = dataclasses.replace(_spec(node), epilogue=Epilogue(), name="_")
        groups.setdefault((node.args[0], *beside, form), []).append(node)
    yield from (group for group in groups.values() if len(group) > 1)


@dataclasses.dataclass
class _Writer:
    """Writes a region as one epilogue."""

    region: Region
    operands: list[EpilogueOperand] = dataclasses.field(default_factory=list)
    tensors: list[fx.Node] = dataclasses.field(default_factory=list)
    nodes: list[EpilogueNode] = dataclasses.field(default_factory=list)
    names: dict[fx.Node, str] = dataclasses.field(default_factory=dict)

    def begin(self, number: int, seed: fx.Node) -> None:
        """Takes over a product's own epilogue."""
        own, extra = _spec(seed).epilogue, seed.args[2]
        renamed = {"%acc": f"%acc{number}" if number else "%acc"}
        for i, operand in enumerate(own.operands):
            renamed[f"%in{i}"] = f"%in{len(self.operands)}"
            self.operands.append(operand)
            self.tensors.append(extra[i])  # type: ignore[index,arg-type]

        def new(value: Any) -> Any:
            return renamed.get(value, value) if isinstance(value, str) else value

        for i, node in enumerate(own.nodes):
            kwargs = tuple((key, new(value)) for key, value in node.kwargs)
            renamed[f"%{i}"] = f"%{len(self.nodes)}"
            self.nodes.append(EpilogueNode(node.op, tuple(map(new, node.args)), kwargs))
        self.names[seed] = renamed[own.result]

    def take(self, node: fx.Node) -> None:
        """Writes down an op; a cast that is only a result is rounding, which results have."""
        if pointwise.is_cast(node) and self.region.is_last(node):
            self.names[node] = self.name(node.args[0])  # type: ignore[arg-type]
            return
        written = pointwise.written(node, self.name)
        self.names[node] = f"%{len(self.nodes)}"
        self.nodes.append(written)

    def name(self, argument: fx.Node) -> str:
        """The reference of a value, which may be a new operand."""
        value = self.region.base(argument)
        if value not in self.names:
            dtype = pointwise.name_of(argument.meta["val"].dtype)
            self.names[value] = f"%in{len(self.operands)}"
            self.operands.append(EpilogueOperand(self.region.operands[argument], dtype))
            self.tensors.append(argument)
        return self.names[value]

    def results(self) -> list[fx.Node]:
        """The results, the main one first: what the last op gives."""
        last = f"%{len(self.nodes) - 1}" if self.nodes else "%acc"
        found = self.region.results()
        main = next(node for node in found if self.names[node] == last)
        return [main, *(node for node in found if node is not main)]


def _rewrite(graph: fx.Graph, region: Region, order: Order, kind: str) -> Decision:
    """Puts one launch in the place of a region."""
    writer = _Writer(region)
    for number, seed in enumerate(region.seeds):
        writer.begin(number, seed)
    for node in region.nodes:
        writer.take(node)
    results = writer.results()
    dtypes = [pointwise.name_of(node.meta["val"].dtype) for node in results]
    more = [EpilogueResult(writer.names[n], d) for n, d in zip(results, dtypes, strict=True)][1:]
    first, said = _spec(region.seeds[0]), _words(region)
    joined = ["join"] if len(region.seeds) > 1 else []
    spec = dataclasses.replace(
        first,
        epilogue=Epilogue(tuple(writer.operands), tuple(writer.nodes), tuple(more)),
        out_dtype=dtypes[0],
        weights=len(region.seeds),
        name="_".join([first.name, *joined, *said])[:80],
    )
    shared, _ = _beside(region.seeds[0])
    apart = [tensor for seed in region.seeds for tensor in _beside(seed)[1]]
    beside = [*shared[:1], *apart, *shared[1:]]
    weight = [part for seed in region.seeds for part in seed.args[1]]  # type: ignore[union-attr]
    start = min(region.seeds, key=order.at.__getitem__)
    with graph.inserting_after(max((*region.seeds, *region.nodes), key=order.at.__getitem__)):
        op = _fxquant.launch_several.default if more else _fxquant.launch.default
        args = (region.seeds[0].args[0], weight, [*writer.tensors, *beside], spec.to_json(), "auto")
        fused = values.emit(graph, start, op, *args)
    fused.meta[SITES] = tuple(number for seed in region.seeds for number in seed.meta[SITES])
    new = [fused]
    if more:
        with graph.inserting_after(fused):
            new = values.pieces(fused, len(results))
    shaped = [_shaped(region, each, old) for each, old in zip(new, results, strict=True)]
    for old, each in zip(results, shaped, strict=True):
        old.replace_all_uses_with(each)
    _settle(start, fused, {*new, *shaped})
    inside = (*region.seeds, *region.nodes, *region.views)
    for node in sorted(inside, key=order.at.__getitem__, reverse=True):
        if not node.users:
            graph.erase_node(node)
    plain = f"{len(region.seeds)} products in one kernel" if joined else "arithmetic with numbers"
    end = f"; then {region.ends[0]}" if region.ends else ""
    reason = f"{', '.join(said) or plain}{end}"
    return Decision(kind, fused.meta[SITES], done=True, reason=reason)


def _words(region: Region) -> list[str]:
    ops = []
    for node in region.nodes:
        tensors = [each for each in node.all_input_nodes if pointwise.constant(each) is None]
        ops.append((str(node.target).split(".")[1], len(tensors)))
    return words(ops)


def _shaped(region: Region, given: fx.Node, old: fx.Node) -> fx.Node:
    """A result in the shape of the node that it stands for, behind a view."""
    shape = old.meta["val"].shape
    if pointwise.same_shape(given.meta["val"].shape, shape):
        return given
    alike = (v for v in region.views if pointwise.same_shape(v.meta["val"].shape, shape))
    sizes = next(alike).args[1]
    with given.graph.inserting_after(given):
        return values.emit(given.graph, old, torch.ops.aten.reshape.default, given, sizes)


def _settle(start: fx.Node, fused: fx.Node, parts: set[fx.Node]) -> None:
    """Moves what reads a new node, and stands between a node and the new one, behind it.

    Args:
        start: From where on nodes stand that may read it.
        fused: The new node.
        parts: Its results, which follow it.
    """
    late, last = {fused, *parts}, fused
    while last.next in parts:
        last = last.next
    node = start
    while node is not fused:
        following = node.next
        if late.intersection(node.all_input_nodes):
            late.add(node)
            last.append(node)
            last = node
        node = following
