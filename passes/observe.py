"""Observe: before every product a call that counts its activation, and nothing else changes.

It comes in the place of the passes after `match`, so what it sees is what would be quantized:
the same products, and each activation in the form and dtype that a kernel would read.
"""

from __future__ import annotations

from torch import fx

from fxquant.passes import adapt
from fxquant.passes.context import Context, LinearSite, PassReport
from fxquant.passes.writes import Written
from fxquant.runtime.observe import observe as count


def observe(ctx: Context) -> PassReport:
    """Inserts the calls; a site's number is its place in `Context.sites`."""
    written = Written(ctx.regions)
    groups: dict[object, list[int]] = {}
    for number, site in enumerate(ctx.sites):
        groups.setdefault(_activation(site, written), []).append(number)
    for numbers in groups.values():
        _insert(ctx.sites[numbers[0]], numbers)
    for region in reversed(ctx.regions):
        region.gm.recompile()
    return PassReport("observe", f"{len(groups)} activations of {len(ctx.sites)} products")


def _activation(site: LinearSite, written: Written) -> object:
    """Equal for the products that read one activation in one form, as q, k and v do.

    Two products of a value that is written to may see two activations.
    """
    if site.to_x is not None or site.x in written:
        return site.node
    return site.x, site.node.meta["val"].dtype


def _insert(site: LinearSite, numbers: list[int]) -> fx.Node:
    graph, node = site.region.graph, site.node
    with graph.inserting_before(node):
        x = adapt.cast(site.x, node.meta["val"].dtype, node)
        x = x if site.to_x is None else site.to_x(x)
        call = graph.call_function(count, (x, tuple(numbers)))
    call.meta["val"] = None
    return call
