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
from fxquant.passes.fuse.decisions import SITES

AUTO = "auto"
_LAUNCHES = {"linear": "launch", "quantize": "launch_quantize"}
"""What stands in the place of each of our ops, with a target as the last argument."""
_RESULTS = ("launch", "launch_several", "launch_quantize", "launch_rows")


def begin(graph: fx.Graph) -> None:
    """Makes every product and every quantization a launch that has no target yet."""
    for old, new in _LAUNCHES.items():
        for node in graph.find_nodes(op="call_function", target=_op(old)):
            args = node.args
            if old == "linear":
                node.meta[SITES] = () if args[4] == -1 else (args[4],)
                args = args[:4]
            node.target = _op(new)
            node.args = (*args, AUTO)
            if "eager_input_vals" in node.meta:
                # Inductor reads the strides of an op's operands there, by position.
                found, kwargs = node.meta["eager_input_vals"]
                node.meta["eager_input_vals"] = ((*found[: len(args)], AUTO), kwargs)
    for node in graph.find_nodes(op="call_function", target=_op("launch_quantize")):
        pieces = [reader for piece in node.users for reader in piece.users]
        node.meta[SITES] = tuple(
            dict.fromkeys(number for reader in pieces for number in reader.meta.get(SITES, ()))
        )


def launches(graph: fx.Graph) -> list[fx.Node]:
    """The ops of a graph that become kernels."""
    ops = [_op(name) for name in _RESULTS]
    return [node for op in ops for node in graph.find_nodes(op="call_function", target=op)]


def text_of(node: fx.Node) -> str:
    """The spec of a launch, as JSON."""
    return str(node.args[-2])


def lower(graph: fx.Graph, targets: Mapping[str, str], *, inline: bool) -> None:
    """Gives every launch its target, or puts the reference in its place.

    Args:
        graph: Its ops of ours are launches.
        targets: What computes each spec, as JSON.
        inline: Whether the reference stands in for launches on the ``torch`` target.
    """
    tables = _Tables(graph)
    for node in launches(graph):
        target = targets[text_of(node)]
        if inline and target == "torch" and not _counts(node):
            _inline_reference(graph, node, tables)
        else:
            node.args = (*node.args[:-1], target)
            if "eager_input_vals" in node.meta:
                found, kwargs = node.meta["eager_input_vals"]
                node.meta["eager_input_vals"] = ((*found[:-1], target), kwargs)


def _op(name: str) -> Any:
    return getattr(torch.ops.fxquant, name).default


def _counts(node: fx.Node) -> bool:
    """Whether a node quantizes rows and is given a limit."""
    rows = (_op("launch_quantize"), _op("launch_rows"))
    return node.target in rows and bool(node.args[1])


def _inline_reference(graph: fx.Graph, node: fx.Node, tables: _Tables) -> None:
    """Puts the reference's ops in the place of one op."""
    if node.target is _op("launch_quantize"):
        x, extra, text, _ = node.args
        operands = [x, *extra]  # type: ignore[misc]
        rows = QuantizeSpec.from_json(str(text))

        def body(*tensors: torch.Tensor) -> Any:
            return quantize.run(rows, tensors[0], tensors[1:])
    elif node.target is _op("launch_rows"):
        given, _, text, _ = node.args
        operands = list(given)  # type: ignore[arg-type]
        made = QuantizeSpec.from_json(str(text))

        def body(*tensors: torch.Tensor) -> Any:
            return quantize.run_rows(made, tensors, [])
    else:
        x, weight, extra, text, _ = node.args
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
