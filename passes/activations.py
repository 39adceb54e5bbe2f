"""Activations in int8: quantized once for all the products that read them.

A product with an activation of its own quantizes it inside its kernel (per token, where outliers
may also be set apart). Several products of one activation share one `fxquant::quantize`; so does
every activation whose scale is more than a row's largest magnitude. Products that set outliers
apart are joined after autograd (`fxquant.passes.fuse.epilogue`), for what is set apart is left to
them; columns that are known are made the same ones here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxquant.codegen.quantize import QuantizeSpec
from fxquant.passes import values
from fxquant.passes.context import Context, LinearSite
from fxquant.passes.normalize import GRAD_ENABLED
from fxquant.passes.sources import Rule
from fxquant.passes.specs import name_of
from fxquant.passes.statistics import ColumnNumbers, ColumnWeights, Limit, Observed
from fxquant.passes.writes import Written
from fxquant.schemes import Activation

_fxquant = torch.ops.fxquant
_COLUMNS = 8


class Activations:
    """The quantized activations of a graph.

    Args:
        ctx: The graph, with its sites.
        derive: Adds an input that a rule makes of parameters to the outermost graph.
    """

    def __init__(self, ctx: Context, derive: Callable[[str, Rule], fx.Node]) -> None:
        # Two products of a value that is written to see two activations.
        written = Written(ctx.regions)
        # Settled before any product is rewritten: an activation may be another one's result.
        self.keys = {id(site): _key(site, written) for site in ctx.sites}
        self.readers = Counter(self.keys.values())
        self.sites = ctx.sites
        self.calibration = ctx.config.calibration
        self.derive = derive
        self.made: dict[Any, tuple[fx.Node, fx.Node, str, Rule | None]] = {}
        self.known: dict[Any, tuple[int, ColumnNumbers, fx.Node | None]] = {}

    def quantized(self, site: LinearSite, x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Codes and amax of a site's activation, or None if its kernel takes it as it is.

        Args:
            site: The product; `site.quantize_json` is set.
            x: Its activation as ``[.., k]``, cast; the graph's insertion point comes after it.
        """
        activation = site.recipe.activation if site.recipe is not None else None
        if activation is None or not self._is_apart(site, activation):
            return None
        key = self.keys[id(site)]
        if key not in self.made:
            spec = _spec(site.operand.k, x.meta["val"].dtype, activation)
            rule = Limit(self._observed(site), spec.clipped) if spec.has_limit else None
            limit = [] if rule is None else [self._brought(site, "limit", rule)]
            op, text = _fxquant.quantize.default, spec.to_json()
            pair = values.emit(site.region.graph, site.node, op, x, limit, text)
            codes, amax = values.pieces(pair, 2)
            self.made[key] = (codes, amax, text, rule)
        codes, amax, site.quantize_json, site.limit = self.made[key]
        return codes, amax

    def columns(
        self, ctx: Context, site: LinearSite, dtype: torch.dtype
    ) -> tuple[fx.Node, fx.Node] | None:
        """Numbers and weight of the columns that calibration found to be outliers, or None.

        Args:
            ctx: Has the parameters.
            site: The product.
            dtype: Of these columns.
        """
        rule = site.recipe.outliers if site.recipe is not None else None
        if rule is None or not rule.static:
            return None
        key = self.keys[id(site)]
        if key not in self.known:
            self.known[key] = self._known(ctx, site, rule.threshold)
        found, numbers, node = self.known[key]
        site.notes.append(f"{found} of {site.operand.k} columns in {name_of(dtype)}")
        if node is None:
            return None
        weights = ColumnWeights(self._observed(site), numbers, dtype, site.scaled)
        return node, self._brought(site, "apart", weights)

    def _known(
        self, ctx: Context, site: LinearSite, threshold: float
    ) -> tuple[int, ColumnNumbers, fx.Node | None]:
        """The outlier columns of an activation: how many, which, and the input that says so."""
        key, k = self.keys[id(site)], site.operand.k
        readers = tuple(self._observed(one) for one in self.sites if self.keys[id(one)] == key)
        amax = ColumnNumbers(readers, k).amax(ctx.inputs, ctx.tools)
        found = int((amax >= threshold).sum())
        # Whole groups, so that products which differ little share a kernel.
        numbers = ColumnNumbers(readers, min(-(-found // _COLUMNS) * _COLUMNS, k))
        return found, numbers, self._brought(site, "columns", numbers) if found else None

    def _observed(self, site: LinearSite) -> Observed:
        assert self.calibration is not None, "the plan pass asked for it"
        bound = site.parameter
        return Observed(bound.index, bound.name, site.operand, self.calibration, site.in_scale)

    def _brought(self, site: LinearSite, what: str, rule: Rule) -> fx.Node:
        return site.region.bring_in(self.derive(f"{site.parameter.name}_{what}", rule))

    def _is_apart(self, site: LinearSite, activation: Activation) -> bool:
        if site.recipe is not None and site.recipe.outliers is not None:
            return False
        if activation != Activation():
            return True
        # Rounding to integers has no gradient as an op; inside a kernel it is passed through.
        shared = self.readers[self.keys[id(site)]] > 1
        return shared and not site.node.meta.get(GRAD_ENABLED)


def _spec(k: int, dtype: torch.dtype, activation: Activation) -> QuantizeSpec:
    words = ["static"] if activation.scope == "static" else ["per", activation.scope]
    name = "_".join(["quantize", str(k), *words, *(["clipped"] if activation.clipped else [])])
    return QuantizeSpec(k, name_of(dtype), activation.scope, activation.clipped, name)


def _key(site: LinearSite, written: Written) -> Any:
    """What products of one activation, rounded in one way, have in common."""
    x = values.current(site.x)
    if site.to_x is not None or x in written:
        return id(site)
    dtype, recipe = site.node.meta["val"].dtype, site.recipe
    assert recipe is not None, "the plan pass ran"
    return (id(site.region), x, dtype, site.operand.k, recipe.activation, recipe.outliers)
