"""Pack: every site becomes `fxquant::linear` on packed tensors, which are inputs of the graph."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from fxquant.formats import Encoding, PackedWeight
from fxquant.passes import adapt, regions, values, views
from fxquant.passes.activations import Activations
from fxquant.passes.context import BoundParameter, Context, PassReport
from fxquant.passes.inputs import add as add_input
from fxquant.passes.regions import Region
from fxquant.passes.sources import DerivedPart, PackedPart, Rule, evaluate
from fxquant.passes.specs import Asked, outliers_dtype, spec_of

_fxquant = torch.ops.fxquant


def pack(ctx: Context) -> PassReport:
    """Packs the sites' parameters, rewrites the sites, and settles the graph's inputs."""
    inputs = _PackedInputs(ctx)
    activations = Activations(ctx, inputs.derive)
    for number, site in enumerate(ctx.sites):
        weight, name = site.parameter.value, site.parameter.name
        if site.scaled is None:
            site.packed = ctx.pack_weight(weight, site.operand.encoding, name)
        else:
            site.packed = evaluate(site.scaled, ctx.inputs, ctx.tools)
        packed = inputs.of(site.packed, site.parameter, site.scaled)
        _rewrite(ctx, number, packed, activations)
    for region in reversed(ctx.regions):
        _drop_dead(ctx, region)
    _dequantize_other_uses(ctx, inputs)
    _settle_inputs(ctx, inputs)
    for region in reversed(ctx.regions):
        region.gm.recompile()
    count = len(ctx.sites)
    weights = len(inputs.placeholders)
    return PassReport("pack", f"{count} products rewritten on {weights} weights")


class _PackedInputs:
    """Placeholders for packed tensors: one set for each packed parameter, whoever uses it."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.root = ctx.regions[0]
        self.placeholders: dict[tuple[int, Encoding, Rule | None], list[fx.Node]] = {}
        self.tensors: dict[fx.Node, PackedPart | DerivedPart] = dict(ctx.derived)

    def of(
        self, packed: PackedWeight, bound: BoundParameter, scaled: Rule | None = None
    ) -> list[fx.Node]:
        """The placeholders in the outermost graph, in the order of ``Encoding.parts``.

        Args:
            packed: What the parameter is packed into.
            bound: The parameter.
            scaled: The rule that packs it with scales, or None.
        """
        encoding = packed.encoding
        key = (bound.index, encoding, scaled)
        if key not in self.placeholders:
            nodes = []
            parts = zip(encoding.parts, packed.held(), strict=True)
            for position, (part, tensor) in enumerate(parts):
                node = add_input(self.ctx, f"{bound.name}_{part}", tensor)
                if scaled is None:
                    source: PackedPart | DerivedPart = PackedPart(
                        bound.index, position, tensor, encoding, bound.name
                    )
                else:
                    packs = (bound.index, encoding, bound.name)
                    source = DerivedPart(scaled, position, tensor, packs)
                self.tensors[node] = source
                nodes.append(node)
            self.placeholders[key] = nodes
        return self.placeholders[key]

    def derive(self, name: str, rule: Rule) -> fx.Node:
        """A placeholder in the outermost graph for the tensor that a rule makes."""
        tensor = evaluate(rule, self.ctx.inputs, self.ctx.tools)
        node = add_input(self.ctx, name, tensor)
        self.tensors[node] = DerivedPart(rule, 0, tensor)
        return node


def _rewrite(ctx: Context, number: int, packed: list[fx.Node], activations: Activations) -> None:
    site = ctx.sites[number]
    node, graph = site.node, site.region.graph
    weight = [site.region.bring_in(part) for part in packed]
    out_dtype = node.meta["val"].dtype
    with graph.inserting_before(node):
        x = adapt.cast(site.x, out_dtype, node)
        x = x if site.to_x is None else site.to_x(x)
        extra = [] if site.bias is None else [adapt.cast(site.bias, out_dtype, node)]
        asked = Asked(out_dtype, biased=bool(extra), compute=ctx.config.compute_dtype)
        quantized = activations.quantized(site, x)
        columns = activations.columns(ctx, site, outliers_dtype(x.meta["val"].dtype))
        if quantized is not None:
            x, amax = quantized
            extra.append(amax)
        if columns is not None:
            extra += columns
            asked = dataclasses.replace(asked, columns=columns[0].meta["val"].numel())
        if site.ends is not None:
            extra.append(site.ends(node))
        spec = spec_of(site, x.meta["val"].dtype, asked)
        site.spec_json = spec.to_json()
        op, text = _fxquant.linear.default, site.spec_json
        out = values.emit(graph, node, op, x, weight, extra, text, number)
        out = out if site.from_out is None else site.from_out(out)
        out = adapt.laid_out_as(out, node.meta["val"])
    values.replace(node, out)


def _drop_dead(ctx: Context, region: Region) -> None:
    """Erases views of parameters that nothing reads any more, and a body's unread weights."""
    for node in reversed(list(region.graph.nodes)):
        if not node.users and views.resolve_factor(ctx, region, node) and node.op != "placeholder":
            region.graph.erase_node(node)
    if region.parent is None or region.call is None or region is not region.siblings[0]:
        return
    placeholders = [sibling.placeholders for sibling in region.siblings]
    kept = []
    for position, operand in enumerate(regions.operands(region.call)):
        nodes = [own[position] for own in placeholders]
        quantized = {site.parameter.node for site in ctx.sites}
        view = views.resolve(ctx, region.parent, operand)
        dead = view and view.parameter.node in quantized and not any(n.users for n in nodes)
        if dead:
            for sibling, node in zip(region.siblings, nodes, strict=True):
                sibling.graph.erase_node(node)
        else:
            kept.append(operand)
    regions.set_operands(region.call, kept)


def _dequantize_other_uses(ctx: Context, inputs: _PackedInputs) -> None:
    """Gives uses of an already packed parameter other than products the dense tensor."""
    for node, bound in ctx.parameters.items():
        if not isinstance(bound.value, PackedWeight) or not node.users:
            continue
        parts = inputs.of(bound.value, bound)
        value = values.value(node)
        users = list(node.users)
        with node.graph.inserting_after(inputs.root.placeholders[-1]):
            dense = node.graph.call_function(
                _fxquant.dequantize.default,
                (parts, str(bound.value.encoding), list(value.shape), value.dtype),
            )
        dense.meta["val"] = value
        for user in users:
            user.replace_input_with(node, dense)


def _settle_inputs(ctx: Context, inputs: _PackedInputs) -> None:
    """Drops placeholders of weights that are not read any more, and fills inputs and sources."""
    used: list[Any] = []
    dynamo_inputs = list(ctx.inputs)
    for index, node in enumerate(inputs.root.placeholders):
        if node in inputs.tensors:
            used.append(inputs.tensors[node].tensor)
            ctx.sources.append(inputs.tensors[node])
        elif node in ctx.parameters and not node.users:
            inputs.root.graph.erase_node(node)
        else:
            used.append(dynamo_inputs[index])
            ctx.sources.append(index)
    ctx.inputs[:] = used
