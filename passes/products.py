"""How each ATen product reads its weight, and how to say it as ``x [.., K]`` times ``[N, K]``.

A handler looks at one call and the side that its weight stands on, and gives a `Form`: which
dimensions of the weight are batch, outputs and inputs, and what to do to the activation before
and to the result after. Nothing is inserted into the graph until `pack` runs the adapters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.passes import adapt, groups
from fxquant.passes.adapt import Adapter
from fxquant.passes.groups import Ends, Picked

_aten = torch.ops.aten


@dataclass(frozen=True)
class Form:
    """One product, said as ``x [.., K]`` times a weight.

    Attributes:
        x: The activation.
        dims: Dimensions of the weight operand that are batch (None without), outputs and inputs.
        to_x: Takes the activation to ``[.., K]``, or ``[E, M, K]`` with a batch.
        from_out: Takes ``[.., N]`` to the product's result.
        bias: Added to the result's last dimension in the kernel.
        layout: The weight operand in the dimensions that `dims` counts, where they are not its own.
        ends: Of rows sorted by matrix, ``[M, K]``: gives the row after the last of each.
    """

    x: fx.Node
    dims: tuple[int | None, int, int]
    to_x: Adapter | None = None
    from_out: Adapter | None = None
    bias: fx.Node | None = None
    layout: Tensor | None = None
    ends: Ends | None = None


# (node, position of the weight among the factors, weight's layout) -> Form, or why there is none.
Handler = Callable[[fx.Node, int, Tensor], "Form | str"]


def factors(node: fx.Node) -> tuple[Any, ...]:
    """The two operands of a product that `form` understands."""
    first = 1 if _packet(node) in _WITH_ADDEND else 0
    args = node.args[first : first + 2]
    return args if len(args) == 2 else ()


def form(node: fx.Node, side: int, layout: Tensor, picked: Picked | None = None) -> Form | str:
    """The product's form, or why it has none.

    Args:
        node: The product.
        side: 0 or 1: which of `factors` is the weight.
        layout: Shape and strides of the weight operand, or of what its matrices are picked from.
        picked: Says which matrices, one for each of the product's; None for all of them in order.
    """
    handler = _HANDLERS.get(_packet(node)) or _CUSTOM.get(str(_packet(node)))
    if handler is None:
        return f"{name(node)} has no quantized form"
    if picked is not None:
        return _picked(node, side, picked)
    return handler(node, side, layout)


def is_product(node: fx.Node) -> bool:
    """Whether a call multiplies matrices, in ATen or in the user's spelling."""
    if node.op not in ("call_function", "call_method"):
        return False
    base = name(node).rpartition(".")[2]
    return base in _NAMES or _PRODUCT_WORD.search(base) is not None


def name(node: fx.Node) -> str:
    """A call's name for people, as in ``"aten.linear"`` or ``"matmul"``."""
    if node.op == "call_method":
        return str(node.target)
    packet = _packet(node)
    if packet is not None:
        return str(packet)
    return str(getattr(node.target, "__name__", node.target))


# Custom operators say so in their names: `transformers::grouped_mm_fallback`.
_PRODUCT_WORD = re.compile(r"(^|_)(mm|bmm|matmul|gemm|linear|einsum)(_|$)")
_NAMES = frozenset(
    (
        "addmm", "addbmm", "baddbmm", "mv", "addmv", "tensordot", "inner", "__matmul__",
        "__rmatmul__", "conv1d", "conv2d", "conv3d",
        "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "bilinear",
        "_trilinear", "multi_dot", "linalg_multi_dot", "outer", "addr", "ger",
        "lstm", "gru", "rnn_tanh", "rnn_relu", "multi_head_attention_forward",
        "_transformer_encoder_layer_fwd", "_native_multi_head_attention", "dot", "vdot",
        "baddbmm_", "addmm_", "addbmm_", "addmv_",
    )
)  # fmt: skip


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _argument(node: fx.Node, position: int, keyword: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(keyword, default)


def _linear(node: fx.Node, side: int, layout: Tensor) -> Form | str:
    """``linear(x [.., K], W [N, K], b)``, and the parameter as the activation: ``(W xT)``."""
    bias = _argument(node, 2, "bias")
    other = node.args[1 - side]
    if side == 1:
        return Form(other, (None, 0, 1), bias=bias)  # type: ignore[arg-type]
    if layout.ndim != 2 or adapt.rank(other) != 2:
        return "the parameter is the activation of a linear with more than 2 dimensions"
    after = adapt.chain(adapt.transpose, adapt.add(bias))
    return Form(other, (None, 0, 1), from_out=after)  # type: ignore[arg-type]


def _matmul(node: fx.Node, side: int, layout: Tensor) -> Form | str:
    """``matmul``, ``mm``, ``mv``, ``bmm``: the weight on either side, 2-D or 3-D."""
    return _product(node.args[1 - side], side, layout)  # type: ignore[arg-type]


def _product(x: fx.Node, side: int, layout: Tensor) -> Form | str:
    if layout.ndim > 3:
        return f"its weight has {layout.ndim} dimensions, and at most 3 can be read"
    n, k = (layout.ndim - 1, layout.ndim - 2)
    to_x: Adapter | None = None
    from_out: Adapter | None = None
    if side == 0:
        n, k = k, n
        if adapt.rank(x) > 1:
            to_x, from_out = adapt.transpose, adapt.transpose
    batch = None
    if layout.ndim == 3:
        size = layout.shape[0]
        one_matrix = size == 1 or layout.stride(0) == 0
        batch = None if one_matrix else 0
        around = adapt.leading if one_matrix else adapt.batched
        spread, gather = around(size, adapt.rank(x))
        to_x, from_out = adapt.chain(to_x, spread), adapt.chain(gather, from_out)
    return Form(x, (batch, n, k), to_x, from_out)


def _picked(node: fx.Node, side: int, picked: Picked) -> Form | str:
    """``bmm`` against matrices that are picked by number, ``weight[ids]``."""
    other = node.args[1 - side]
    if _packet(node) not in (_aten.bmm, _aten.matmul) or adapt.rank(other) != 3:
        return f"{name(node)} has no quantized form with a weight that is picked by number"
    to_x, ends, from_out = picked.adapters()
    if side == 1:
        return Form(other, (0, 2, 1), to_x, from_out, ends=ends)  # type: ignore[arg-type]
    to_x, from_out = adapt.chain(adapt.transpose, to_x), adapt.chain(from_out, adapt.transpose)  # type: ignore[assignment]
    return Form(other, (0, 1, 2), to_x, from_out, ends=ends)  # type: ignore[arg-type]


def _grouped(node: fx.Node, side: int, layout: Tensor) -> Form | str:
    """``grouped_mm(x [M, K], W [E, K, N], offsets [E])``: the rows of x, sorted by matrix."""
    offsets, bias = _argument(node, 2, "offs"), _argument(node, 3, "bias")
    if side == 0:
        return f"the parameter is the activation of {name(node)}"
    if layout.ndim != 3 or adapt.rank(node.args[0]) != 2 or offsets is None or bias is not None:
        return f"{name(node)} does not multiply groups of rows with a matrix each"
    return Form(node.args[0], (0, 2, 1), ends=groups.given(offsets))  # type: ignore[arg-type]


def _addmm(node: fx.Node, side: int, layout: Tensor) -> Form | str:
    """``beta * b + alpha * (a @ b)``: a bias goes into the kernel, other addends after it."""
    addend = node.args[0]
    beta: Any = node.kwargs.get("beta", 1)
    alpha: Any = node.kwargs.get("alpha", 1)
    found = _product(node.args[2 - side], side, layout)  # type: ignore[arg-type]
    if isinstance(found, str):
        return found
    assert isinstance(addend, fx.Node)
    n = layout.shape[found.dims[1]]
    in_kernel = side == 1 and layout.ndim == 2 and beta == 1 and alpha == 1
    if in_kernel and tuple(addend.meta["val"].shape) == (n,):
        return Form(found.x, found.dims, found.to_x, found.from_out, bias=addend)
    after = adapt.chain(found.from_out, adapt.scaled_sum(addend, beta, alpha))
    return Form(found.x, found.dims, found.to_x, after)


def _conv(node: fx.Node, side: int, layout: Tensor) -> Form | str:
    """A 1x1 convolution is a product over the channels; one of patches, side by side, over both."""
    if side == 0:
        return "the parameter is the input of a convolution"
    convolution = _packet(node) is _aten.convolution
    if convolution and node.args[6]:
        return "a transposed convolution is not supported"
    groups = _argument(node, 8 if convolution else 6, "groups", 1)
    if groups != 1:
        return f"a convolution in {groups} groups is not one product"
    kernel = tuple(layout.shape[2:])
    stride = _each(_argument(node, 3, "stride", 1), kernel)
    padding = _argument(node, 4, "padding", 0)
    dilation = _argument(node, 5, "dilation", 1)
    size = "x".join(map(str, kernel))
    if stride != kernel:
        step = "x".join(map(str, stride))
        return f"a convolution with a kernel of {size} and stride {step} is not a product"
    is_point = all(extent == 1 for extent in kernel)
    if not (padding in (("same", "valid") if is_point else ("valid",)) or _all_equal(padding, 0)):
        return f"a {size} convolution with padding {padding} is not supported"
    if not is_point and not _all_equal(dilation, 1):
        return f"a {size} convolution with dilation {dilation} is not supported"
    bias = _argument(node, 2, "bias")
    to_x, from_out = adapt.channels_last(len(kernel))
    seen = None
    if not is_point:
        to_x = adapt.patches(kernel)
        try:
            seen = layout.view(layout.shape[0], -1)
        except RuntimeError:
            return f"its {size} kernels do not lie one after the other in the parameter"
    return Form(node.args[0], (None, 0, 1), to_x, from_out, bias, seen)  # type: ignore[arg-type]


def _each(value: Any, like: tuple[int, ...]) -> tuple[Any, ...]:
    """A number, or one for each dimension, as one for each."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * len(like) if len(values) == 1 else values


def _all_equal(value: Any, wanted: int) -> bool:
    return all(v == wanted for v in value) if isinstance(value, (list, tuple)) else value == wanted


_WITH_ADDEND = frozenset((_aten.addmm, _aten.baddbmm, _aten.addmv))
_HANDLERS: dict[Any, Handler] = {
    _aten.linear: _linear,
    _aten.mm: _matmul,
    _aten.mv: _matmul,
    _aten.bmm: _matmul,
    _aten.matmul: _matmul,
    _aten.addmm: _addmm,
    _aten.addmv: _addmm,
    _aten.baddbmm: _addmm,
    _aten.conv1d: _conv,
    _aten.conv2d: _conv,
    _aten.conv3d: _conv,
    _aten.convolution: _conv,
    **({_aten._grouped_mm: _grouped} if hasattr(_aten, "_grouped_mm") else {}),
}
# By name: they are there once their package is imported.
_CUSTOM: dict[str, Handler] = {"transformers.grouped_mm_fallback": _grouped}
