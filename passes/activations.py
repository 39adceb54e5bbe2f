"""Activations in int8: quantized once for all the products that read them.

A product with an activation of its own quantizes it inside its kernel (per token, where outliers
may also be set apart). Several products of one activation share one `fxquant::quantize`; so does
every activation whose scale is more than a row's largest magnitude.
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
        self.readers = Counter(_key(site) for site in ctx.sites)
        # Two products of a value that is written to see two activations.
        self.written = Written(ctx.regions)
        self.calibration = ctx.config.calibration
        self.derive = derive
        self.made: dict[Any, tuple[fx.Node, fx.Node, str, Rule | None]] = {}

    def quantized(self, site: LinearSite, x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Codes and amax of a site's activation, or None if its kernel takes it as it is.

        Args:
            site: The product; `site.quantize_json` is set.
            x: Its activation as ``[.., k]``, cast; the graph's insertion point comes after it.
        """
        activation = site.recipe.activation if site.recipe is not None else None
        if activation is None or not self._is_apart(site, activation):
            return None
        key = _key(site) if self._can_share(site) else id(site)
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
        observed, k = self._observed(site), site.operand.k
        found = int((observed.amax(ctx.inputs, ctx.tools) >= rule.threshold).sum())
        site.notes.append(f"{found} of {k} columns in {name_of(dtype)}")
        if not found:
            return None
        # Whole groups, so that products which differ little share a kernel.
        numbers = ColumnNumbers(observed, min(-(-found // _COLUMNS) * _COLUMNS, k))
        weights = ColumnWeights(numbers, dtype, site.scaled)
        return self._brought(site, "columns", numbers), self._brought(site, "apart", weights)

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
        shared = self._can_share(site) and self.readers[_key(site)] > 1
        return shared and not site.node.meta.get(GRAD_ENABLED)

    def _can_share(self, site: LinearSite) -> bool:
        return site.to_x is None and values.current(site.x) not in self.written


def _spec(k: int, dtype: torch.dtype, activation: Activation) -> QuantizeSpec:
    words = ["static"] if activation.scope == "static" else ["per", activation.scope]
    name = "_".join(["quantize", str(k), *words, *(["clipped"] if activation.clipped else [])])
    return QuantizeSpec(k, name_of(dtype), activation.scope, activation.clipped, name)


def _key(site: LinearSite) -> Any:
    dtype = site.node.meta["val"].dtype
    return (id(site.region), values.current(site.x), dtype, site.operand.k, site.recipe.activation)  # type: ignore[union-attr]
