"""Epilogues as FX graphs, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxquant import errors
from fxquant.codegen import pointwise
from fxquant.codegen.epilogue import OPERAND_DTYPES, Epilogue, EpilogueNode, EpilogueOperand


def to_fx(epilogue: Epilogue) -> fx.Graph:
    """The epilogue as a graph: placeholders ``acc``, ``in0`` .., ATen calls, one output.

    With several weights ``acc1`` .. follow ``acc``; with further results the output is a tuple.
    """
    graph = fx.Graph()
    nodes = {"%acc": graph.placeholder("acc")}
    for number in range(1, epilogue.sums):
        nodes[f"%acc{number}"] = graph.placeholder(f"acc{number}")
    for number in range(len(epilogue.operands)):
        nodes[f"%in{number}"] = graph.placeholder(f"in{number}")

    def value_of(value: Any) -> Any:
        if isinstance(value, str):
            return getattr(torch, value) if value in OPERAND_DTYPES else nodes.get(value, value)
        return value

    for number, node in enumerate(epilogue.nodes):
        _, name, overload = node.op.split(".")
        nodes[f"%{number}"] = graph.call_function(
            getattr(getattr(torch.ops.aten, name), overload),
            tuple(map(value_of, node.args)),
            {key: value_of(value) for key, value in node.kwargs},
        )
    results = [epilogue.result, *(result.value for result in epilogue.more)]
    graph.output(nodes[results[0]] if len(results) == 1 else tuple(nodes[r] for r in results))
    return graph


def from_fx(graph: fx.Graph, operands: Sequence[EpilogueOperand]) -> Epilogue:
    """The epilogue that a graph describes.

    Args:
        graph: Placeholders for the accumulator and for every operand, calls of ATen overloads,
            and one output.
        operands: What the placeholders after the first stand for.

    Raises:
        KernelError: A node is not a pointwise ATen op that epilogues may hold.
    """
    names: dict[fx.Node, str] = {}
    nodes: list[EpilogueNode] = []

    def written(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return names[value]
        return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value

    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = f"%in{len(names) - 1}" if names else "%acc"
        elif node.op == "call_function":
            if not pointwise.is_pointwise(node.target):
                raise errors.no_pointwise_op(node.target, "an epilogue", pointwise.OPS)
            names[node] = f"%{len(nodes)}"
            kwargs = tuple((key, written(value)) for key, value in node.kwargs.items())
            args = tuple(written(value) for value in node.args)
            nodes.append(EpilogueNode(str(node.target), args, kwargs))
    (result,) = graph.output_node().args
    epilogue = Epilogue(tuple(operands), tuple(nodes))
    if not isinstance(result, fx.Node) or names[result] != epilogue.result:
        raise errors.bad_spec("epilogue", str(result), f"its last node, {epilogue.result}")
    return epilogue
