"""Divides what makes an activation, or the activation itself: the rewriting half of `smooth`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxquant.codegen.spec import WeightOperand
from fxquant.formats import PackedWeight
from fxquant.passes import adapt, values
from fxquant.passes.bind import is_foreign, name_of
from fxquant.passes.context import Context, LinearSite
from fxquant.passes.flow import Edge, Found, occurrences
from fxquant.passes.inputs import derive
from fxquant.passes.normalize import GRAD_ENABLED
from fxquant.passes.patterns import Pattern
from fxquant.passes.regions import Region
from fxquant.passes.scales import Folded, Part, ScaledWeight, Spread
from fxquant.passes.sources import Rule
from fxquant.passes.writes import Written

_mul = torch.ops.aten.mul.Tensor
_POINTWISE = {
    *(F.gelu, F.silu, F.mish, F.tanh, F.sigmoid, torch.tanh, torch.sigmoid),
    *(torch.mul, operator.mul),
}
"""What computes in float32 and rounds its result."""


class Division:
    """The divisions of one graph, of which several may meet in one vector or weight.

    Args:
        ctx: The graph.
        written: What it writes to.
    """

    def __init__(self, ctx: Context, written: Written) -> None:
        self.ctx = ctx
        self.written = written
        self.regions = {region.graph: region for region in ctx.regions}
        self.vectors: dict[Edge, list[Spread]] = {}
        self.rows: dict[fx.Node, list[Spread]] = {}

    def multiply(
        self, sites: Sequence[LinearSite], patterns: Sequence[Pattern], scale: Rule
    ) -> None:
        """Divides an activation in the graph, once for all products that read it.

        Without patterns each product's is divided as the product reads it, ``[.., k]``.
        """
        if not patterns:
            for site in sites:
                site.to_x = adapt.chain(site.to_x, self._inside(site, scale))
            return
        made: dict[fx.Node, fx.Node] = {}
        for site, pattern in zip(sites, patterns, strict=True):
            x = site.x
            # What is written to in place may not be the same for the next product.
            if x not in made or x in self.written:
                spread = Spread(scale, _trimmed(pattern), inverse=True)
                alone = {site.node for site in sites if site.x is x}.issuperset(x.users)
                made[x] = self._times(x, spread, site.node, alone=alone)
            site.x = made[x]

    def fold(
        self, scale: Rule, found: Found, others: Iterable[tuple[fx.Node, fx.Node]] = ()
    ) -> None:
        """Notes the divisions of what makes an activation.

        Args:
            scale: The scale.
            found: Where the divisions go.
            others: Values and readers of them that get the value multiplied back.
        """
        for edge, (_, pattern) in found.vectors.items():
            self.vectors.setdefault(edge, []).append(Spread(scale, found.ties.of(pattern)))
        for node, pattern in found.rows.items():
            self.rows.setdefault(node, []).append(Spread(scale, found.ties.of(pattern)))
        back: dict[fx.Node, fx.Node] = {}
        for value, user in others:
            if value not in back:
                pattern = _trimmed(found.ties.of(found.changed[value]))
                back[value] = self._times(value, Spread(scale, pattern), value.next)
            user.replace_input_with(value, back[value])
            for site in self.ctx.sites:
                if site.node is user and site.x is value:
                    site.x = back[value]

    def finish(self) -> None:
        """Divides the vectors and the weights."""
        for (user, vector), spreads in self.vectors.items():
            user.replace_input_with(vector, self._divided(user, vector, spreads))
        for site in self.ctx.sites:
            rows = self.rows.get(site.node)
            if rows and site.bias is not None:
                old, site.bias = site.bias, self._divided(site.node, site.bias, rows)
                if occurrences(site.node, old) == 1:
                    site.node.replace_input_with(old, site.bias)
        self._scale_weights()

    def _times(
        self, x: fx.Node, spread: Spread, before: fx.Node, *, alone: bool = False
    ) -> fx.Node:
        """``x * spread`` in x's dtype, rounded once.

        Args:
            x: What is multiplied.
            spread: By what.
            before: Where.
            alone: Whether nothing else reads x: its own rounding may be left out, too.
        """
        scale = self._input("inverse_scale" if spread.inverse else "scale", spread, x.graph)
        with x.graph.inserting_before(before):
            factor = self._unrounded(x) if alone else x
            out = values.emit(x.graph, x, _mul, factor, scale)
            return adapt.cast(out, x.meta["val"].dtype, x)

    def _unrounded(self, x: fx.Node) -> fx.Node:
        """A value of 16 bits in float32, where making it so is no more work; else itself."""
        dtype, inputs = x.meta["val"].dtype, x.all_input_nodes
        if (
            x.target not in _POINTWISE
            or dtype not in (torch.bfloat16, torch.float16)
            or any(node in self.written for node in (x, *inputs))
            or any(getattr(values.value(node), "dtype", None) != dtype for node in inputs)
        ):
            return x
        args, kwargs = fx.node.map_arg(
            (x.args, x.kwargs), lambda node: adapt.cast(node, torch.float32, x)
        )
        return values.emit(x.graph, x, x.target, *args, **kwargs)

    def _inside(self, site: LinearSite, scale: Rule) -> adapt.Adapter:
        spread = Spread(scale, torch.arange(site.operand.k), inverse=True)
        inverse = self._input("inverse_scale", spread, site.node.graph)

        def run(x: fx.Node) -> fx.Node:
            out = values.emit(x.graph, x, _mul, x, inverse)
            return adapt.cast(out, x.meta["val"].dtype, x)

        return run

    def _divided(self, user: fx.Node, vector: fx.Node, spreads: list[Spread]) -> fx.Node:
        region = self.regions[user.graph]
        root = root_of(region, vector)
        index = None if root is None else fixed(self.ctx, self.written, root)
        trained = index is not None and self.ctx.inputs[index].requires_grad
        if index is not None and not (trained and user.meta.get(GRAD_ENABLED)):
            return self._input(
                f"{title(region, vector)}_folded", Folded(index, tuple(spreads)), user.graph
            )
        for spread in spreads:
            inverse = Spread(spread.scale, spread.pattern, inverse=True)
            vector = self._times(vector, inverse, user)
        return vector

    def _input(self, name: str, rule: Rule, graph: fx.Graph) -> fx.Node:
        return self.regions[graph].bring_in(derive(self.ctx, name, rule))

    def _scale_weights(self) -> None:
        """One packing of each parameter, or several where products want its elements otherwise."""
        by_parameter: dict[int, list[LinearSite]] = {}
        for site in self.ctx.sites:
            by_parameter.setdefault(site.parameter.index, []).append(site)
        for sites in by_parameter.values():
            parts: dict[object, tuple[Part, list[LinearSite]]] = {}
            for site in sites:
                rows = tuple(self.rows.get(site.node, ()))
                part = Part(site.operand, site.in_scale, rows)
                key = (site.operand, site.in_scale, rows)
                parts.setdefault(key, (part, []))[1].append(site)
            found = [(part, own) for part, own in parts.values() if _is_scaled(part)]
            if not found:
                continue
            apart = [part.operand for part, _ in parts.values()]
            clash = any(
                overlap(a, b) for number, a in enumerate(apart) for b in apart[number + 1 :]
            )
            groups = [[item] for item in found] if clash else [list(parts.values())]
            for group in groups:
                bound = sites[0].parameter
                scaled = tuple(part for part, _ in group if _is_scaled(part))
                encoding = sites[0].operand.encoding
                rule = ScaledWeight(bound.index, bound.name, encoding, scaled)
                for _, own in group:
                    for site in own:
                        site.scaled = rule


def reads_once(site: LinearSite, value: fx.Node) -> bool:
    """Whether a product reads a value as its activation and not otherwise."""
    return site.x is value and occurrences(site.node, value) == 1


def _is_scaled(part: Part) -> bool:
    return part.columns is not None or bool(part.rows)


def _trimmed(pattern: Pattern) -> Pattern:
    """Without leading dimensions of size 1, which broadcasting adds by itself."""
    while pattern.ndim > 1 and pattern.shape[0] == 1:
        pattern = pattern[0]
    return pattern


def overlap(a: WeightOperand, b: WeightOperand) -> bool:
    """Whether two parts of one parameter have an element in common."""
    if a.offset > b.last or b.offset > a.last:
        return False
    taken = torch.zeros(a.numel, dtype=torch.bool)
    torch.as_strided(taken, a.sizes, a.strides, a.offset).fill_(True)
    return bool(torch.as_strided(taken, b.sizes, b.strides, b.offset).any())


def root_of(region: Region, node: fx.Node) -> fx.Node | None:
    """The placeholder of the outermost graph that a node is, or None."""
    while node.op == "placeholder" and region.parent is not None:
        operand = region.operand(node)
        if not isinstance(operand, fx.Node):
            return None
        region, node = region.parent, operand
    return node if node.op == "placeholder" else None


def fixed(ctx: Context, written: Written, placeholder: fx.Node) -> int | None:
    """The position of a dense parameter that the graph only reads, or None.

    Buffers do not count: what was made of them once would not follow their changes.
    """
    index = ctx.regions[0].placeholders.index(placeholder)
    value = ctx.inputs[index]
    plain = isinstance(value, nn.Parameter) and not isinstance(value, PackedWeight)
    return index if plain and not is_foreign(value) and placeholder not in written else None


def title(region: Region, vector: fx.Node) -> str:
    """What to call a vector: the parameter's name, or the node's."""
    root = root_of(region, vector)
    return vector.name if root is None else name_of(root)
