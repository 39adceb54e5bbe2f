"""Which kernels read the codes of a packed weight, where nothing else in a graph does."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx

from fxquant.codegen.spec import KernelSpec
from fxquant.kernels import Kernels
from fxquant.passes.context import Context
from fxquant.passes.sources import DerivedPart, PackedPart
from fxquant.runtime import launch, verify
from fxquant.runtime.cpp import CppKernel

Readers = dict[PackedPart | DerivedPart, tuple[CppKernel, ...]]


def readers(ctx: Context, kernels: Kernels) -> Readers:
    """The kernels that codes can be handed over to (`fxquant.runtime.handover`).

    A gradient decodes the weight, and a check compares with its reference: graphs with either hand
    nothing over.

    Args:
        ctx: The graph after the pipeline.
        kernels: What was built for it.

    Returns:
        By the source of the codes.
    """
    graph = ctx.gm.graph
    if kernels.verify or _may_have_gradient(ctx):
        return {}
    found: Readers = {}
    for node, source in zip(graph.find_nodes(op="placeholder"), ctx.sources, strict=True):
        if isinstance(source, int) or source.part != 0:
            continue
        if isinstance(source, PackedPart) or source.packs is not None:
            found[source] = _of_codes(node, kernels)
    return found


def _may_have_gradient(ctx: Context) -> bool:
    if not torch.is_grad_enabled():
        return any(node.target is torch._C._set_grad_enabled for node in ctx.gm.graph.nodes)
    return any(isinstance(value, Tensor) and value.requires_grad for value in ctx.inputs)


def _of_codes(codes: fx.Node, kernels: Kernels) -> tuple[CppKernel, ...]:
    """All kernels that read some codes; none if anything else does."""
    texts: dict[str, None] = {}
    for user in codes.users:
        if user.target is not torch.ops.fxquant.linear.default:
            return ()
        number = cast("int", user.args[4])
        products = [t for t in kernels.of(number) if isinstance(launch.parse(t), KernelSpec)]
        if not products:
            return ()
        texts |= dict.fromkeys(products)
    if any(kernels.choices[t].runs != "cpp" or verify.set_aside_because(t, "cpp") for t in texts):
        return ()
    return tuple(kernel for t in texts if isinstance(kernel := launch.cpp_kernel(t), CppKernel))
