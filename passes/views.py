"""Views and casts of a parameter, as strides on the flat contiguous parameter.

A chain of views is replayed on a stand-in without data: a fresh contiguous tensor on the ``meta``
device with the parameter's shape. Its strides and offset then say where every element of the view
lies in the row-major parameter, whatever the real one's memory format is. Copies and casts keep
the elements where they are and leave the stand-in alone.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.passes.context import BoundParameter, Context
from fxquant.passes.groups import gathered_from
from fxquant.passes.regions import Region

_aten = torch.ops.aten

_VIEWS = frozenset(
    (
        _aten.alias, _aten.broadcast_to, _aten.chunk, _aten.diagonal, _aten.expand,
        _aten.expand_as, _aten.flatten, _aten.movedim, _aten.moveaxis, _aten.narrow,
        _aten.numpy_T, _aten.mT, _aten.matrix_H, _aten.mH, _aten.permute, _aten.select,
        _aten.slice, _aten.split, _aten.split_with_sizes, _aten.squeeze, _aten.swapaxes,
        _aten.swapdims, _aten.t, _aten.tensor_split, _aten.transpose, _aten.unbind,
        _aten.unflatten, _aten.unsafe_chunk, _aten.unsafe_split, _aten.unsqueeze, _aten.view,
        _aten.adjoint, _aten.atleast_2d, _aten.atleast_3d, _aten.hsplit, _aten.vsplit,
    )
)  # fmt: skip
# Views where the memory allows it and copies else: on the stand-in only the view is right.
_RESHAPES = frozenset((_aten.reshape, _aten._unsafe_view, _aten.view_as, _aten.reshape_as))
_COPIES = frozenset(
    (
        _aten._to_copy, _aten.clone, _aten.contiguous, _aten.detach, _aten.lift_fresh, _aten.to,
        _aten.type_as, _aten.detach_copy, _aten.lift_fresh_copy, _aten._autocast_to_full_precision,
        _aten._autocast_to_reduced_precision,
    )
)  # fmt: skip
_REALS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class View:
    """A parameter seen through views and casts.

    Attributes:
        parameter: The parameter.
        layout: Stand-in on the ``meta`` device: shape, strides and offset; None where it is
            more than other strides on the same elements. A tuple of them for the pieces of a split.
        ids: Numbers ``[s]`` of the matrices that are picked out of a 3-D view, or None for it all.
    """

    parameter: BoundParameter
    layout: Any
    ids: fx.Node | None = None


def is_view(node: fx.Node) -> bool:
    """Whether a call gives a view or a cast of its operand."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    packet = getattr(node.target, "overloadpacket", None)
    return packet in _VIEWS or packet in _RESHAPES or packet in _COPIES


def resolve(ctx: Context, region: Region, node: Any) -> View | None:
    """The parameter that a node is a view or a cast of, or None.

    Args:
        ctx: Knows the parameters.
        region: The graph that `node` stands in; bodies are left through their operands.
        node: Any argument of a call.
    """
    if not isinstance(node, fx.Node):
        return None
    if node in ctx.parameters:
        bound = ctx.parameters[node]
        return View(bound, torch.empty(tuple(bound.value.shape), device="meta"))
    if node.op == "placeholder":
        if region.parent is None:
            return None
        return resolve(ctx, region.parent, region.operand(node))
    if not is_view(node) or not node.args:
        return None
    source = resolve(ctx, region, node.args[0])
    if source is None:
        return None
    return View(source.parameter, _replayed(node, source.layout))


def resolve_factor(ctx: Context, region: Region, node: Any) -> View | None:
    """Like `resolve`, for the operand of a product: it may pick matrices, ``weight[ids]``."""
    picked = gathered_from(node)
    if picked is not None:
        view = resolve(ctx, region, picked[0])
        return None if view is None else View(view.parameter, view.layout, picked[1])
    if isinstance(node, fx.Node) and is_view(node) and node.args:
        view = resolve_factor(ctx, region, node.args[0])
        if view is not None and view.ids is not None:
            return View(view.parameter, _replayed_inside(node, view.layout), view.ids)
    return resolve(ctx, region, node)


def _replayed_inside(node: fx.Node, layout: Any) -> Any:
    """The layout after a view of matrices that were picked, or None if it is one of their batch."""
    found = _replayed(node, layout)
    if not isinstance(found, Tensor) or found.ndim != 3:
        return None
    same = (found.shape[0], found.stride(0)) == (layout.shape[0], layout.stride(0))
    return found if same else None


def _replayed(node: fx.Node, layout: Any) -> Any:
    """The layout after a node's view, or None."""
    if layout is None:
        return None
    if node.target is operator.getitem:
        position = node.args[1]
        pieces = isinstance(layout, (tuple, list)) and isinstance(position, int)
        return layout[position] if pieces else None
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    value = node.meta["val"]
    if packet in _COPIES:
        # Codes stand for real numbers: what integers or float8 would cut off is not cut off.
        return layout if value.dtype in _REALS else None
    if node.target is _aten.view.dtype:
        return None
    try:
        if packet in _RESHAPES:
            return layout.view(_static(value))
        return _call(node, layout)
    except (RuntimeError, TypeError):
        return None


def _static(value: Tensor) -> tuple[int, ...]:
    if not all(isinstance(size, int) for size in value.shape):
        msg = "a symbolic size"
        raise TypeError(msg)
    return tuple(value.shape)


def _call(node: fx.Node, layout: Tensor) -> Any:
    rest = node.args[1:]
    if any(isinstance(given, fx.Node) for given in node.all_input_nodes[1:]):
        # A size or a tensor that another node computes: its value is a matter of the call.
        shape = _static(node.meta["val"])
        return layout.expand(shape) if node.target in _EXPANDS else None
    return node.target(layout, *rest, **node.kwargs)  # type: ignore[operator]


_EXPANDS = (_aten.expand.default, _aten.expand_as.default, _aten.broadcast_to.default)
