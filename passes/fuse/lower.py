"""What each `fxquant::linear` and `fxquant::quantize` left in a graph becomes.

On targets with kernels of their own that is `fxquant::launch` (`launch_quantize`), which names the
target. On the ``torch`` target it is the ops of its reference, which Inductor then compiles with
everything around them: a fallback (dequantize and multiply) that the report names as one. Rows with
a limit are launched there too, since what lies beyond the limit is counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.codegen import quantize, reference
from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.spec import KernelSpec

_LAUNCHES = {"linear": "launch", "quantize": "launch_quantize"}
"""What stands in the place of each of our ops; all take the spec last."""


def lower(graph: fx.Graph, targets: Mapping[str, str]) -> None:
    """Rewrites the graph in place.

    Args:
        graph: After autograd.
        targets: What computes each spec, as JSON.
    """
    tables = _Tables(graph)
    for node in products_and_rows(graph):
        target = targets.get(str(node.args[-1]), "auto")
        if target == "torch" and not _counts(node):
            _inline_reference(graph, node, tables)
        else:
            launch_as(node, target)


def _op(name: str) -> Any:
    return getattr(torch.ops.fxquant, name).default


def products_and_rows(graph: fx.Graph) -> list[fx.Node]:
    """The ops of a graph that become kernels."""
    ops = [_op(name) for name in _LAUNCHES]
    return [node for op in ops for node in graph.find_nodes(op="call_function", target=op)]


def _counts(node: fx.Node) -> bool:
    """Whether a node quantizes rows and is given a limit."""
    return node.target is _op("quantize") and bool(node.args[1])


def launch_as(node: fx.Node, target: str) -> None:
    """Makes a `fxquant::linear` or a `fxquant::quantize` the launch of a target's kernel."""
    node.target = next(_op(new) for old, new in _LAUNCHES.items() if node.target is _op(old))
    node.args = (*node.args, target)
    if "eager_input_vals" in node.meta:
        # Inductor reads the strides of an op's operands there, by position.
        args, kwargs = node.meta["eager_input_vals"]
        node.meta["eager_input_vals"] = ((*args, target), kwargs)


def _inline_reference(graph: fx.Graph, node: fx.Node, tables: _Tables) -> None:
    """Puts the reference's ops in the place of one op."""
    if node.target is _op("quantize"):
        x, extra, text = node.args
        operands = [x, *extra]  # type: ignore[misc]
        rows = QuantizeSpec.from_json(str(text))

        def body(*tensors: torch.Tensor) -> Any:
            return quantize.run(rows, tensors[0], tensors[1:])
    else:
        x, weight, extra, text = node.args
        operands = [x, *weight, *extra]  # type: ignore[misc]
        spec, count = KernelSpec.from_json(str(text)), 1 + len(weight)  # type: ignore[arg-type]

        def body(*tensors: torch.Tensor) -> Any:
            return reference.run(spec, tensors[0], tensors[1:count], tensors[count:])

    values = [operand.meta["val"] for operand in operands]
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
                _replace(node, fx.node.map_arg(inner.args[0], lambda n: copied[n]))
            elif inner.op == "get_attr":
                copied[inner] = tables.node_for(getattr(traced, str(inner.target)), inner)
            else:
                copied[inner] = graph.node_copy(inner, lambda n: copied[n])
    graph.erase_node(node)


def _replace(node: fx.Node, new: Any) -> None:
    """Puts one node in the place of another, or several in the place of its results."""
    if isinstance(new, fx.Node):
        node.replace_all_uses_with(new)
        return
    for user in list(node.users):
        user.replace_all_uses_with(new[user.args[1]])
        user.graph.erase_node(user)


class _Tables:
    """The constants of inlined references (codebooks), one `fxquant::table` each a graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.nodes: dict[tuple[Any, ...], fx.Node] = {}

    def node_for(self, value: torch.Tensor, like: fx.Node) -> fx.Node:
        """The node that yields a constant's values; `like` is the one that read the constant."""
        assert value.dtype == torch.float32, "the constants of a reference are codebooks"
        values = value.flatten().tolist()
        key = (*values, *value.shape, value.device)
        if key not in self.nodes:
            first = next(node for node in self.graph.nodes if node.op != "placeholder")
            with self.graph.inserting_before(first):
                node = self.graph.call_function(
                    torch.ops.fxquant.table.default, (values, list(value.shape), value.device)
                )
            node.meta.update(like.meta)
            self.nodes[key] = node
        return self.nodes[key]
