"""Smooth: scales move from activations into weights, before both are quantized.

Every activation with products that ask for it gets one scale a channel, joint over all of them
(`scales.Migration`, or `scales.Gamma`): the weights' columns are multiplied by it, and the
activation is divided. Where the division goes is found by data flow alone (`flow.Walk`):

* into the vectors of a norm and the rows of quantized products that make the activation, where
  everything that reads a value on the way is accounted for,
* else into one multiplication in the graph, which joins the pointwise work around the product.

A norm whose weight migrates (`Smoothing.gamma`) may have other readers, such as the residual
branch after BERT's norms: they get the value multiplied back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxquant import errors
from fxquant.formats import PackedWeight
from fxquant.passes import divide, flow, products
from fxquant.passes.context import Context, LinearSite, PassReport
from fxquant.passes.divide import Division, root_of
from fxquant.passes.flow import Found, Walk
from fxquant.passes.normalize import GRAD_ENABLED
from fxquant.passes.patterns import Pattern, Ties
from fxquant.passes.scales import Consumer, Gamma, Migration
from fxquant.passes.sources import Rule
from fxquant.passes.writes import Written


@dataclass
class Activation:
    """An activation, and the products that are to be smoothed with it.

    Attributes:
        sites: The products, in the graph's order.
        patterns: For each, where its channels are in its `x`. None for one product that mixes the
            elements of `x` before it reads them, as a convolution of patches does.
        root: What every `x` is a view, copy or cast of.
    """

    sites: list[LinearSite]
    patterns: list[Pattern]
    root: fx.Node

    @property
    def k(self) -> int:
        """Channels."""
        return self.sites[0].operand.k

    @property
    def readers(self) -> dict[fx.Node, fx.Node]:
        """The products' nodes, with the operand that is the activation."""
        return {site.node: site.x for site in self.sites}


def smooth(ctx: Context) -> PassReport:
    """Sets `in_scale`, `scaled` and `notes` of the sites, and divides their activations.

    Raises:
        CalibrationError: There is no calibration, or it lacks a product.
    """
    makers = {site.node: site for site in ctx.sites if _can_be_divided(site, ctx.sites)}
    walk = Walk(makers)
    written = Written(ctx.regions)
    division = Division(ctx, written)
    folded = done = 0
    # All is found before anything is changed: a changed graph would be another to look at.
    plans = [
        _gamma(ctx, walk, written, activation)
        if activation.sites[0].recipe.smoothing.gamma  # type: ignore[union-attr]
        else _migration(ctx, walk, written, activation)
        for activation in _activations(ctx, walk)
    ]
    for plan in plans:
        if plan.scale is None:
            _note(plan.activation, f"not smoothed: {plan.reason}")
            continue
        done += 1
        scale, activation = plan.scale, plan.activation
        for site in activation.sites:
            site.in_scale = scale
        if plan.found is None:
            division.multiply(activation.sites, activation.patterns, scale)
            where = f"multiplied in the graph: {plan.reason}"
        else:
            folded += 1
            division.fold(scale, plan.found, plan.others)
            where = _where(ctx, plan)
        _note(activation, f"1/s {where}")
    division.finish()
    return PassReport("smooth", f"{done} activations smoothed, {folded} by what makes them")


@dataclass
class _Plan:
    """What is to be done for one activation.

    Attributes:
        activation: The activation.
        scale: Its scale; None to leave it.
        found: Where the division goes; None for a multiplication in the graph.
        others: Values and readers of them that need the value multiplied back.
        reason: Why not all was done that could be.
    """

    activation: Activation
    scale: Rule | None
    found: Found | None = None
    others: tuple[tuple[fx.Node, fx.Node], ...] = ()
    reason: str = ""


def _activations(ctx: Context, walk: Walk) -> list[Activation]:
    """The activations to smooth: views, copies and casts of one value are one."""
    found: dict[object, Activation] = {}
    for site in ctx.sites:
        if site.recipe is None or site.recipe.smoothing is None:
            continue
        pattern = flow.channels_of(site)
        if pattern is None:
            found[site.node] = Activation([site], [], site.x)
            continue
        root, there = walk.root(site.x, pattern)
        key = (root, tuple(there.shape), tuple(there.flatten().tolist()))
        same = found.setdefault((*key, site.recipe.smoothing.gamma), Activation([], [], root))
        same.sites.append(site)
        same.patterns.append(pattern)
    return list(found.values())


def _can_be_divided(site: LinearSite, sites: list[LinearSite]) -> bool:
    """Whether the rows of a product may be divided: its weight is dense and its alone."""
    if isinstance(site.parameter.value, PackedWeight):
        return False
    same = [s for s in sites if s is not site and s.parameter.index == site.parameter.index]
    return not any(divide.overlap(site.operand, other.operand) for other in same)


# --- SmoothQuant -----------------------------------------------------------------------------


def _migration(ctx: Context, walk: Walk, written: Written, activation: Activation) -> _Plan:
    found = Found(Ties.none(activation.k))
    reason = _back(walk, activation, found)
    if reason is None:
        other = next(walk.others(found, activation.readers), None)
        if other is not None:
            reason = f"{products.name(other[1])} reads {products.name(other[0])} too"
        elif any(node in written for node in found.changed):
            reason = "it is written to in place"
    label = None
    if reason is None and not torch.equal(found.ties.label, torch.arange(activation.k)):
        label = tuple(found.ties.label.tolist())
    scale = _migration_rule(ctx, activation, label)
    return _Plan(activation, scale, None if reason else found, reason=reason or "")


def _back(walk: Walk, activation: Activation, found: Found) -> str | None:
    if not activation.patterns:
        return "its activation is no view of channels"
    for site, pattern in zip(activation.sites, activation.patterns, strict=True):
        reason = walk.back(site.x, pattern, found)
        if reason is not None:
            return reason
    return None


def _migration_rule(
    ctx: Context, activation: Activation, label: tuple[int, ...] | None
) -> Migration:
    calibration = ctx.config.calibration
    first = activation.sites[0]
    if calibration is None:
        raise errors.needs_calibration(first.scheme, first.parameter.name)
    consumers = {}
    alphas = []
    for site in activation.sites:
        assert site.recipe is not None, "only sites with a recipe are smoothed"
        assert site.recipe.smoothing is not None, "and only those that ask for it"
        alphas.append(site.recipe.smoothing.alpha)
        consumer = Consumer(
            site.parameter.index,
            site.parameter.name,
            site.operand,
            site.recipe.weight,
            site.recipe.activation,
        )
        consumers[consumer] = True
    if any(alpha != alphas[0] for alpha in alphas):
        _note(activation, f"alpha {alphas[0]}, that of {_title(first)}")
    return Migration(tuple(consumers), alphas[0], calibration, label)


# --- Outlier Suppression ---------------------------------------------------------------------


def _gamma(ctx: Context, walk: Walk, written: Written, activation: Activation) -> _Plan:
    found = Found(Ties.none(activation.k))
    reason = _back(walk, activation, found)
    factors = [edge for edge, (role, _) in found.vectors.items() if role == "factor"]
    if reason is None and (found.rows or len(factors) != 1):
        reason = "no norm makes its activation"
    if reason is not None:
        return _Plan(activation, None, reason=reason)
    region = activation.sites[0].region
    user, gamma = factors[0]
    weight = root_of(region, gamma)
    index = None if weight is None else divide.fixed(ctx, written, weight)
    if index is None or not torch.equal(found.ties.label, torch.arange(activation.k)):
        return _Plan(activation, None, reason="the weight of its norm is no plain parameter")
    if ctx.inputs[index].requires_grad and user.meta.get(GRAD_ENABLED):
        return _Plan(activation, None, reason="the weight of its norm is trained")
    if any(node in written for node in found.changed):
        return _Plan(activation, None, reason="it is written to in place")
    pattern = found.vectors[user, gamma][1].reshape(-1)
    place = torch.full((activation.k,), -1)
    place[pattern[pattern >= 0]] = torch.arange(len(pattern))[pattern >= 0]
    others = tuple(walk.others(found, activation.readers))
    sites = {site.node: site for site in ctx.sites}
    for value, reader in others:
        site = sites.get(reader)
        if site is not None and not divide.reads_once(site, value):
            # Its adapters hold on to what it adds to the product.
            return _Plan(activation, None, reason=f"{_title(site)} adds it to its product")
    return _Plan(activation, Gamma(index, tuple(place.tolist())), found, others)


# --- what the report says --------------------------------------------------------------------


def _note(activation: Activation, text: str) -> None:
    titles = [_title(site) for site in activation.sites]
    for site in activation.sites:
        others = list(dict.fromkeys(title for title in titles if title != _title(site)))
        joint = f"s joint with {', '.join(others)}; " if others else ""
        site.notes.append(joint + text)


def _title(site: LinearSite) -> str:
    return site.module or site.parameter.name


def _where(ctx: Context, plan: _Plan) -> str:
    assert plan.found is not None, "it is folded"
    region = plan.activation.sites[0].region
    vectors = [divide.title(region, vector) for _, vector in plan.found.vectors]
    titles = {site.node: _title(site) for site in ctx.sites}
    rows = [f"the rows of {titles[node]}" for node in plan.found.rows]
    text = f"folded into {' and '.join(dict.fromkeys([*vectors, *rows]))}"
    if plan.others:
        back = dict.fromkeys(products.name(user) for _, user in plan.others)
        text += f", multiplied back for {', '.join(back)}"
    if plan.found.ties.label.unique().numel() < plan.activation.k:
        text += ", the channels that share a row with one scale"
    return text
