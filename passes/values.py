"""What a node stands for, as fake tensors, and new nodes that know theirs."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

from fxquant.formats import PackedWeight


def fake_mode_of(nodes: Iterable[fx.Node]) -> FakeTensorMode | None:
    """The fake mode that the values of some nodes were made under.

    Dynamo's values have a mode of their own, other than the one in its tracing context.
    """
    for node in nodes:
        for found in tree_leaves(node.meta.get("val")):
            if isinstance(found, PackedWeight):
                found = found.tensors()[0]  # noqa: PLW2901
            if isinstance(found, FakeTensor):
                return found.fake_mode
    return None


def value(node: fx.Node) -> Any:
    """A node's fake value; a packed weight's is that of the dense tensor it stands for."""
    found = node.meta["val"]
    if isinstance(found, PackedWeight):
        mode = fake_mode_of([node])
        assert mode is not None
        with mode:
            found = torch.empty(tuple(found.shape), dtype=found.dtype, device=found.device)
        node.meta["val"] = found
    return found.detach() if isinstance(found, Tensor) else found


_REPLACED = "fxquant_replaced"


def replace(node: fx.Node, new: fx.Node) -> None:
    """Puts a node in the place of another, also for adapters that hold on to the old one."""
    node.replace_all_uses_with(new)
    node.meta[_REPLACED] = new
    node.graph.erase_node(node)


def current(node: fx.Node) -> fx.Node:
    """What stands in the place of a node that may have been replaced."""
    while _REPLACED in node.meta:
        node = node.meta[_REPLACED]
    return node


def emit(graph: fx.Graph, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Inserts a call at the graph's insertion point, with its value and `like`'s provenance.

    Args:
        graph: Where.
        like: Gives ``stack_trace`` and ``nn_module_stack``.
        target: What is called.
        args: Nodes and constants.
        kwargs: Nodes and constants.
    """
    args, kwargs = fx.node.map_arg((args, kwargs), current)
    node = graph.call_function(target, args, kwargs)
    node.meta.update({key: like.meta[key] for key in PROVENANCE if key in like.meta})
    real_args, real_kwargs = fx.node.map_arg((args, kwargs), value)
    mode = fake_mode_of(node.all_input_nodes)
    with mode or contextlib.nullcontext(), torch.no_grad():
        node.meta["val"] = target(*real_args, **real_kwargs)
    return node


def pieces(node: fx.Node, count: int) -> list[fx.Node]:
    """The results of a call that gives several, at the graph's insertion point."""
    return [emit(node.graph, node, operator.getitem, node, i) for i in range(count)]


def show(gm: fx.GraphModule) -> None:
    """Puts the values of new nodes where Dynamo has those of its own, as `copied` found them.

    AOTAutograd answers from its cache only if each method's tensor has one there.
    """
    for node in gm.graph.nodes:
        if node.meta.get("val") is not None:
            node.meta.setdefault("example_value", node.meta["val"])


PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two fake tensors of one shape are known to have equal strides where they count."""
    return all(
        statically_known_true(x == y) or statically_known_true(size == 1)
        for x, y, size in zip(a.stride(), b.stride(), a.shape, strict=True)
    )


def hint(size: Any) -> int:
    """A size as a number, without a guard: a symbolic one gives its example."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else 2
    return int(size)
