"""What epilogues and prologues take in: pointwise ops, their arguments, the axes of operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxquant.codegen import pointwise
from fxquant.codegen.epilogue import FLOAT_DTYPES, OPERAND_DTYPES, EpilogueNode

_aten = torch.ops.aten
_prims = torch.ops.prims
VIEWS = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)
"""Views that keep the order of elements."""
_CASTS = (_prims.convert_element_type.default, _aten._to_copy.default)


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name, as in ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def tensor_of(node: fx.Node) -> Tensor | None:
    """A node's fake tensor, if that is what it gives."""
    found = node.meta.get("val")
    return found if isinstance(found, Tensor) else None


def is_pointwise(node: fx.Node) -> bool:
    """Whether a node is an op of the shared table that gives floats or booleans."""
    value = tensor_of(node)
    if node.op != "call_function" or value is None or name_of(value.dtype) not in OPERAND_DTYPES:
        return False
    return is_cast(node) or pointwise.is_pointwise(node.target)


def is_cast(node: fx.Node) -> bool:
    """Whether a node changes the dtype and nothing else."""
    return node.target in _CASTS and not set(node.kwargs) - {"dtype"}


def mutates(node: fx.Node) -> bool:
    """Whether an op writes to one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def written(node: fx.Node, name: Callable[[fx.Node], str]) -> EpilogueNode:
    """A pointwise node as an epilogue has it.

    Args:
        node: `is_pointwise`.
        name: The reference of an argument, as in ``"%3"``.
    """

    def value(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            number = constant(argument)
            return name(argument) if number is None else number
        return name_of(argument) if isinstance(argument, torch.dtype) else argument

    if is_cast(node):
        dtype = name_of(node.meta["val"].dtype)
        return EpilogueNode("aten._to_copy.default", (value(node.args[0]),), (("dtype", dtype),))
    kwargs = tuple((key, value(argument)) for key, argument in node.kwargs.items())
    return EpilogueNode(str(node.target), tuple(map(value, node.args)), kwargs)


def constant(node: fx.Node) -> float | None:
    """The number that a tensor of one element is made of, or None."""
    if node.target not in (_aten.full.default, _aten.scalar_tensor.default):
        return None
    value, number = node.meta["val"], node.args[-1]
    is_one = math.prod(value.shape) == 1 and value.dtype in _REAL
    return float(number) if is_one and isinstance(number, (int, float)) else None


_REAL = tuple(getattr(torch, name) for name in FLOAT_DTYPES)


def obstacle(node: fx.Node) -> str:
    """Why an op is none that kernels compute, in a clause, or ``""``."""
    op, value = str(node.target).removesuffix(".default"), tensor_of(node)
    if node.op == "call_function" and value is not None and is_pointwise_in_torch(node):
        if name_of(value.dtype) not in OPERAND_DTYPES:
            return f"{op} gives {name_of(value.dtype)}"
        if not is_pointwise(node):
            return f"{op} has no entry in the table of pointwise ops"
        if not is_written(node):
            return f"{op} has no entry for these arguments"
    return "" if is_pointwise(node) else f"{op} is no pointwise op"


def is_pointwise_in_torch(node: fx.Node) -> bool:
    """Whether torch calls an op pointwise, of the shared table or not."""
    return is_cast(node) or torch.Tag.pointwise in getattr(node.target, "tags", ())


def is_written(node: fx.Node) -> bool:
    """Whether a pointwise node can be written down: numbers, dtypes and nodes are its arguments."""
    plain = (fx.Node, int, float, str, torch.dtype, type(None))
    if not all(isinstance(value, plain) for value in (*node.args, *node.kwargs.values())):
        return False
    return pointwise.is_spelled(written(node, lambda _: "%in0"))


def operand_axes(node: fx.Node, value: Tensor, axes: str) -> str | None:
    """The axes of an argument of a pointwise op, or None if kernels take no such tensor.

    Args:
        node: The argument.
        value: What the op gives.
        axes: Of that; see `axes_of`.
    """
    found = tensor_of(node)
    if found is None or found.device != value.device or name_of(found.dtype) not in OPERAND_DTYPES:
        return None
    return axes_of(found.shape, value.shape, axes)


def axes_of(shape: Sequence[Any], full: Sequence[Any], axes: str) -> str | None:
    """The axes of an operand that is broadcast to a value, or None if they are none of ours.

    Args:
        shape: Of the operand.
        full: Of the value.
        axes: Those of the value: a letter for each dimension (``"emn"``), or two letters, the
            first for all dimensions but the last (``"mn"``).
    """
    if len(shape) > len(full):
        return None
    missing = len(full) - len(shape)
    padded = [1] * missing + list(shape)
    if len(axes) == len(full):
        groups = [[i] for i in range(len(full))]
    else:
        groups = [list(range(len(full) - 1)), [len(full) - 1]]
    found = ""
    for letter, dims in zip(axes, groups, strict=True):
        if all(i >= missing and equal(padded[i], full[i]) for i in dims):
            found += letter
        elif not all(equal(padded[i], 1) for i in dims):
            return None
    return found


def equal(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal."""
    return bool(statically_known_true(a == b))


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal."""
    return len(a) == len(b) and all(map(equal, a, b))
