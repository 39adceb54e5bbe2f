"""One call of a captured graph, expanded on its own into pre-dispatch ATen."""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.passes import opaque, values

_aten = torch.ops.aten
# Compositions that hide a product: pre-dispatch tracing keeps them whole unless told otherwise.
_DECOMPOSED = (
    _aten.einsum.default,
    _aten.tensordot.default,
    _aten.inner.default,
    _aten.chain_matmul.default,
    _aten.linalg_multi_dot.default,
    _aten.linalg_matmul.default,
    _aten.kron.default,
)
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **{op: op.decompose for op in _DECOMPOSED},
    **opaque.DECOMPOSITIONS,
}


def expand(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node] | None:
    """Replaces a call by the ATen calls that it makes.

    Autocast is taken from the surroundings: the caller enters it as the graph does.

    Args:
        gm: The graph module; it may get constants.
        node: The call. It is erased.

    Returns:
        The new nodes, or None if the call has to stay as it is: it gives no tensor, reads
        something that has no fake value, or cannot be traced on its own.
    """
    inputs = node.all_input_nodes
    if not _gives_tensors(node) or not all(_has_value(given) for given in inputs):
        return None
    traced = trace(node, inputs)
    if traced is None:
        return None
    output = traced.graph.output_node().args[0]
    pieces = isinstance(output, (tuple, list))
    if pieces and not all(_takes_piece(user, node, output) for user in node.users):
        return None
    new, results = _inline(gm, node, traced, inputs)
    if pieces:
        for user in list(node.users):
            piece = results[user.args[1]]
            if user.users:
                user.replace_all_uses_with(piece)
            gm.graph.erase_node(user)
    else:
        node.replace_all_uses_with(results)
    gm.graph.erase_node(node)
    return new


def _gives_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return any(isinstance(item, Tensor) for item in value)
    return isinstance(value, Tensor)


def _has_value(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float))


def _takes_piece(user: fx.Node, node: fx.Node, pieces: Any) -> bool:
    """Whether a user reads one tensor out of a call's results."""
    return (
        user.target is operator.getitem
        and user.args[0] is node
        and isinstance(user.args[1], int)
        and (isinstance(pieces[user.args[1]], fx.Node) or not user.users)
    )


def trace(node: fx.Node, inputs: list[fx.Node]) -> fx.GraphModule | None:
    """The call as a graph of its own."""

    def call(*given: Any) -> Any:
        bound = dict(zip(inputs, given, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: bound[n])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    fakes = [values.value(given) for given in inputs]
    try:
        # Tensors that the call itself makes have to be fake too.
        mode = values.fake_mode_of(inputs) or contextlib.nullcontext()
        with torch.no_grad(), mode, warnings.catch_warnings():
            # The user's own run has shown these already.
            warnings.simplefilter("ignore")
            return make_fx(call, decomposition_table=DECOMPOSITIONS, pre_dispatch=True)(*fakes)
    except Exception:  # noqa: BLE001 - whatever cannot be traced alone stays as Dynamo wrote it
        return None


def _inline(
    gm: fx.GraphModule, node: fx.Node, traced: fx.GraphModule, inputs: list[fx.Node]
) -> tuple[list[fx.Node], Any]:
    mapped: dict[fx.Node, Any] = {}
    given = iter(inputs)
    new: list[fx.Node] = []
    results: Any = None
    with gm.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                mapped[inner] = next(given)
                continue
            if inner.op == "output":
                results = fx.node.map_arg(inner.args[0], lambda n: mapped[n])
                continue
            if inner.op == "get_attr":
                mapped[inner] = _adopt_constant(gm, traced, inner)
            else:
                mapped[inner] = gm.graph.node_copy(inner, lambda n: mapped[n])
            copy = mapped[inner]
            copy.meta = {"val": inner.meta.get("val")}
            copy.meta.update({k: node.meta[k] for k in values.PROVENANCE if k in node.meta})
            new.append(copy)
    return new, results


def _adopt_constant(gm: fx.GraphModule, traced: fx.GraphModule, inner: fx.Node) -> fx.Node:
    number = 0
    while hasattr(gm, f"_fxquant_constant_{number}"):
        number += 1
    name = f"_fxquant_constant_{number}"
    setattr(gm, name, getattr(traced, str(inner.target)))
    return gm.graph.get_attr(name)
