"""Activations in int8: quantized once for all the products that read them.

A product with an activation of its own quantizes it inside its kernel (per token, where outliers
may also be set apart). Several products of one activation share one `fxquant::quantize`; so does
every activation whose scale is more than a row's largest magnitude.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import fx

from fxquant.codegen.quantize import QuantizeSpec
from fxquant.passes import values
from fxquant.passes.context import LinearSite
from fxquant.passes.normalize import GRAD_ENABLED
from fxquant.passes.specs import name_of
from fxquant.schemes import Activation

_fxquant = torch.ops.fxquant


class Activations:
    """The quantized activations of a graph.

    Args:
        sites: All products that are rewritten.
        written: Values that the graph writes to: two products of one see two activations.
    """

    def __init__(self, sites: Iterable[LinearSite], written: Container[fx.Node]) -> None:
        self.readers = Counter(_key(site) for site in sites)
        self.written = written
        self.made: dict[Any, tuple[fx.Node, fx.Node, str]] = {}

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
            spec = _spec(site.operand.k, x.meta["val"].dtype, activation).to_json()
            pair = values.emit(site.region.graph, site.node, _fxquant.quantize.default, x, [], spec)
            codes, amax = values.pieces(pair, 2)
            self.made[key] = (codes, amax, spec)
        codes, amax, site.quantize_json = self.made[key]
        return codes, amax

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
