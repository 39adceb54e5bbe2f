"""After autograd: what each `fxquant::linear` left in an Inductor graph becomes.

On targets with kernels of their own the op stays and is launched. On the ``torch`` target it is
replaced by the ops of its reference, which Inductor then compiles with everything around it: a
fallback (dequantize and multiply) that the report names as one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.codegen import reference
from fxquant.codegen.spec import KernelSpec


class Fuse(CustomGraphPass):
    """Inductor's last graph pass, as fxquant sets it.

    Args:
        version: Goes into Inductor's cache key.
        inline: Replace the ops by their reference (the ``torch`` target).
        before: A pass of the user's own, run first.
    """

    def __init__(
        self, version: str, *, inline: bool, before: Callable[[fx.Graph], None] | None = None
    ) -> None:
        self.version = version
        self.inline = inline
        self.before = before

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrites the graph in place."""
        if self.before is not None:
            self.before(graph)
        if self.inline:
            for node in graph.find_nodes(
                op="call_function", target=torch.ops.fxquant.linear.default
            ):
                _inline_reference(graph, node)

    def uuid(self) -> Any | None:
        """What Inductor's cache tells this pass from another by; None if the user's has none."""
        inner = None
        if self.before is not None:
            inner = self.before.uuid() if isinstance(self.before, CustomGraphPass) else None
            if inner is None:
                return None
        return ("fxquant", self.version, self.inline, inner)


def _inline_reference(graph: fx.Graph, node: fx.Node) -> None:
    """Puts the reference's ops in the place of one op."""
    x, weight, extra, text = node.args
    spec = KernelSpec.from_json(str(text))
    operands = [x, *weight, *extra]  # type: ignore[misc]
    values = [operand.meta["val"] for operand in operands]
    count = len(weight)  # type: ignore[arg-type]

    def body(*tensors: torch.Tensor) -> torch.Tensor:
        return reference.run(spec, tensors[0], list(tensors[1 : 1 + count]), list(tensors[1 + count :]))

    mode = detect_fake_mode(values)
    with torch.no_grad(), mode or contextlib.nullcontext():
        traced = make_fx(body, decomposition_table=select_decomp_table())(*values)
    copied: dict[fx.Node, Any] = {}
    placeholders = iter(operands)
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                copied[inner] = next(placeholders)
            elif inner.op == "output":
                node.replace_all_uses_with(copied[inner.args[0]])
            elif inner.op == "get_attr":
                copied[inner] = _adopt_constant(graph, traced, inner)
            else:
                copied[inner] = graph.node_copy(inner, lambda n: copied[n])
    graph.erase_node(node)


def _adopt_constant(graph: fx.Graph, source: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Moves a constant that tracing made (a codebook) to the outer graph's module."""
    owner = graph.owning_module
    value = getattr(source, str(node.target))
    number = 0
    while hasattr(owner, f"_fxquant_constant_{number}"):
        number += 1
    name = f"_fxquant_constant_{number}"
    owner.register_buffer(name, value)
    constant = graph.get_attr(name)
    constant.meta.update(node.meta)
    return constant
