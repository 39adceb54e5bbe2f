"""Dynamo's guards on the parts of packed weights, which our graphs do without.

They would take every weight apart at each call, in Python, and ask for codes that a kernel has
taken over. What else is guarded says as much: a weight's type, shape, dtype, device and encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from torch._dynamo.source import AttrSource, SubclassAttrListSource
from torch._guards import ChainedSource, GuardsSet, Source, TracingContext
from torch.utils._ordered_set import OrderedSet

from fxquant.formats import PackedWeight


def forget_parts(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Drops the guards on the parts of packed weights, for the graph that is being compiled.

    Args:
        gm: Dynamo's graph.
        inputs: Its inputs.
    """
    context = TracingContext.try_get()
    if context is None:
        return
    parts: dict[Source, list[str]] = {}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        source = getattr(node, "_dynamo_source", None)
        if source is not None and isinstance(value, PackedWeight):
            parts[source], _ = value.__tensor_flatten__()
    if parts:
        guards = context.guards_context
        left = (g for g in guards.dynamo_guards if not _is_of(g.originating_source, parts))
        guards.dynamo_guards = GuardsSet(OrderedSet(left))


def _is_of(source: Source, parts: dict[Source, list[str]]) -> bool:
    """Whether a source is a part of a weight, is reached through one, or is the list of them."""
    while isinstance(source, ChainedSource):
        if isinstance(source, AttrSource) and source.member in parts.get(source.base, ()):
            return True
        if isinstance(source, SubclassAttrListSource) and source.base in parts:
            return True
        source = source.base
    return False
