"""Interval arithmetic for epilogues: each op on ends of intervals, wider by what it may round.

An op is evaluated in float64 at the ends of its arguments, at zero where they hold it, and where
ops of `fxquant.codegen.pointwise` turn; between such points all of them are monotone in each
argument, so that the least and the largest value are among those found. Sines are bounded by their
slope instead. What cannot be bounded (a quotient by an interval with zero, a logarithm of one) is
the whole line, which any number lies in, NaN too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.codegen.epilogue import OPERAND_DTYPES, EpilogueNode
from fxquant.codegen.pointwise import boxed

UNIT = 2.0**-24
"""Half the distance of neighbouring float32 numbers at 1: what one rounding may be off by."""
_LARGEST = torch.finfo(torch.float32).max
_SMALLEST_NORMAL = 2.0**-126
_LOST_BY_SILU = 2.0**-121
"""From -88.8 down its exponential is infinite, and the quotient 0 in place of up to -2.4e-37."""

_TURNS = (0.0, -0.7517915246935645, -1.2784645427610738)
"""Where ops turn that are not monotone: magnitude and square, gelu, silu."""

_ARITHMETIC = {
    *("add", "sub", "rsub", "mul", "div", "neg", "abs", "reciprocal", "square", "where"),
    *("relu", "leaky_relu", "maximum", "minimum", "clamp", "clamp_min", "clamp_max", "hardtanh"),
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not"),
    *("_to_copy", "convert_element_type", "floor", "ceil", "round", "trunc", "sign", "copysign"),
    *("isnan", "isinf", "signbit", "logical_xor", "ldexp"),
    *("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not"),
}
"""One or two roundings, of quotients on a GPU two units in the last place: `4 * UNIT`."""

_RELATIVE = {
    *("exp", "exp2", "expm1", "log1p", "sigmoid", "silu", "sqrt", "rsqrt", "pow", "hypot"),
    *("erf", "erfc", "sin", "cos", "asin", "acos", "atan", "atan2"),
    *("tanh", "sinh", "cosh", "asinh", "acosh", "atanh"),
}
"""Functions whose error is relative to their result; that of others may be to the argument."""

_COMPOSED = {"tan", "fmod", "remainder", "addcmul", "addcdiv"}
_OF_SIGNS = {"signbit", "copysign", "atan2"}


@dataclass(frozen=True)
class Interval:
    """Numbers from `low` to `high`, float64 or bool; both NaN: certainly NaN."""

    low: Tensor
    high: Tensor

    def expand(self, shape: torch.Size) -> Interval:
        """The same in a larger shape."""
        return Interval(self.low.expand(shape), self.high.expand(shape))

    def excess(self, got: Tensor) -> Tensor:
        """How far numbers lie outside, 0 inside; infinite where exactly one of two is NaN."""
        value = got.double()
        anything = (self.low == -math.inf) & (self.high == math.inf)
        outside = torch.maximum(self.low - value, value - self.high).clamp_min(0.0)
        same = (value == self.low) | (value == self.high)
        outside = torch.where(same | anything, 0.0, outside)
        odd = value.isnan() != self.low.isnan()
        lost = torch.where(odd & ~anything, math.inf, 0.0)
        return torch.where(value.isnan() | self.low.isnan(), lost, outside)


def around(exact: Tensor, error: Tensor) -> Interval:
    """A float32 sum: what is not finite, or may be too large, is the whole line or NaN."""
    return _tidy(exact - error, exact + error, exact.isnan())


def rounded(value: Interval, dtype: torch.dtype) -> Interval:
    """What numbers of an interval are in a dtype: rounding is monotone."""
    return Interval(value.low.to(dtype).double(), value.high.to(dtype).double())


def call(node: EpilogueNode, values: Mapping[str, Interval]) -> Interval:
    """The results of one op.

    Args:
        node: The op and its arguments.
        values: What ``%acc``, ``%in0``, ``%0`` .. are.
    """
    _, name, overload = node.op.split(".")
    if name in _COMPOSED or "alpha" in dict(node.kwargs) or "rounding_mode" in dict(node.kwargs):
        return _composed(name, node, values)
    op, tensors = getattr(getattr(torch.ops.aten, name), overload), boxed(node.op)
    places = [_candidates(v, values, name, i in tensors) for i, v in enumerate(node.args)]
    kwargs = {key: _candidates(v, values, name, key in tensors) for key, v in node.kwargs}
    found = []
    for point in itertools.product(*places, *kwargs.values()):
        named = dict(zip(kwargs, point[len(places) :], strict=True))
        found.append(_in_float64(op(*point[: len(places)], **named)))
    low, high, lost, certain = found[0], found[0], found[0].isnan(), found[0].isnan()
    if low.dtype == torch.bool:
        for value in found[1:]:
            low, high = low & value, high | value
        if name == "isnan":
            (x,) = [values[v] for v in node.args]
            high = high | ((x.low == -math.inf) & (x.high == math.inf))
        return Interval(low, high)
    for value in found[1:]:
        low, high = torch.minimum(low, value), torch.maximum(high, value)
        lost, certain = lost | value.isnan(), certain & value.isnan()
    reach = _reach([values[v] for v in node.values if isinstance(v, str) and v in values])
    if name in ("sin", "cos"):
        (argument,) = [values[v] for v in node.args if isinstance(v, str)]
        width = (argument.high - argument.low).abs()
        low, high = (high - width).clamp_min(-1.0), (low + width).clamp_max(1.0)
    slack = _slack(name, torch.maximum(low.abs(), high.abs()), reach)
    return _tidy(low - slack, high + slack, certain, lost)


def _composed(name: str, node: EpilogueNode, values: Mapping[str, Interval]) -> Interval:
    """The results of an op by those of what it is made of, each of which rounds."""
    known = dict(values)

    def then(op: str, *args: Any) -> str:
        key = f"composed {len(known)}"
        known[key] = call(EpilogueNode(f"aten.{op}", args), known)
        return key

    kwargs = dict(node.kwargs)
    x, y, *rest = (*node.args, None)
    if name == "tan":
        found = then("div.Tensor", then("sin.default", x), then("cos.default", x))
    elif name in ("add", "sub", "rsub"):
        x, y = (y, x) if name == "rsub" else (x, y)
        scaled = then("mul.Tensor", y, kwargs["alpha"])
        found = then("add.Tensor" if name == "add" else "sub.Tensor", x, scaled)
    elif name in ("addcmul", "addcdiv"):
        part = then("mul.Tensor" if name == "addcmul" else "div.Tensor", y, rest[0])
        found = then("add.Tensor", x, then("mul.Tensor", part, kwargs.get("value", 1.0)))
    else:
        quotient = then("div.Tensor", x, y)
        mode = kwargs.get("rounding_mode", "floor" if name == "remainder" else "trunc")
        whole = quotient if mode is None else then(f"{mode}.default", quotient)
        if name == "div":
            return known[whole]
        return _rest(*(_interval(value, known) for value in (x, whole, y)))
    return known[found]


def _interval(value: Any, values: Mapping[str, Interval]) -> Interval:
    if isinstance(value, str):
        return values[value]
    point = torch.tensor(value, dtype=torch.float64)
    return Interval(point, point)


def _rest(x: Interval, whole: Interval, y: Interval) -> Interval:
    """What a division leaves: less than the divisor, and exactly so much where the quotient is.

    A GPU rounds the product of both, and where the quotient lies next to an integer it may take
    that one.
    """
    size = torch.maximum(y.low.abs(), y.high.abs())
    slack = 8 * UNIT * (torch.maximum(x.low.abs(), x.high.abs()) + size) + _SMALLEST_NORMAL
    q = whole.low.round()
    corners = torch.broadcast_tensors(
        *(a - q * b for a in (x.low, x.high) for b in (y.low, y.high))
    )
    least, most = torch.stack(corners).amin(0), torch.stack(corners).amax(0)
    is_known = q == whole.high.round()
    lost = x.low.isinf() | x.high.isinf() | (y.low * y.high <= 0) | x.low.isnan() | y.low.isnan()
    low = torch.where(is_known, least, -size) - slack
    high = torch.where(is_known, most, size) + slack
    return _tidy(low, high, torch.zeros_like(lost), lost)


def _candidates(
    value: Any, values: Mapping[str, Interval], name: str, is_tensor: bool
) -> list[Any]:
    """Where an op is evaluated, of one argument."""
    if not isinstance(value, str):
        return [torch.tensor(value) if is_tensor and isinstance(value, float) else value]
    if value in OPERAND_DTYPES:
        return [getattr(torch, value)]
    if value not in values:
        return [value]
    found = values[value]
    if found.low is found.high:
        return [found.low]
    ends = [found.low, found.high]
    if found.low.dtype == torch.bool:
        return ends
    if name in _OF_SIGNS:
        # Which of two zeros a sum is depends on its order.
        ends += [torch.where(end == 0, zero, end) for end in ends for zero in (0.0, -0.0)]
    # A turn inside of the interval, else one of its ends once more; NaN ends stay NaN.
    return ends + [
        torch.minimum(torch.maximum(found.low, _like(t, found)), found.high) for t in _TURNS
    ]


def _like(number: float, like: Interval) -> Tensor:
    return torch.full_like(like.low, number)


def _in_float64(value: Tensor) -> Tensor:
    return value if value.dtype == torch.bool else value.double()


def _reach(arguments: list[Interval]) -> Tensor | float:
    """The largest magnitude of any argument, element by element."""
    found: Tensor | float = 0.0
    for argument in arguments:
        if argument.low.dtype != torch.bool:
            size = torch.maximum(argument.low.abs(), argument.high.abs())
            found = size if isinstance(found, float) else torch.maximum(found, size)
    return found


def _slack(name: str, size: Tensor, reach: Tensor | float) -> Tensor:
    """How far off float32 code may be for an op whose results are of a size.

    Functions in C++ err by 7 units in the last place at most (tests/codegen/test_cpp_ops.py). The
    quotient that spells tanh on a GPU cancels near 0.05 to 48 `UNIT`, and a GPU's exponential
    loses ``abs(x)`` units: it is one of ``x * log2(e)``, rounded. That of erfc is of ``x * x``.
    """
    if name in _ARITHMETIC:
        return 4 * UNIT * size + _SMALLEST_NORMAL
    reach = torch.as_tensor(reach, dtype=torch.float64, device=size.device)
    reach = reach * reach if name == "erfc" else reach
    least = _LOST_BY_SILU if name == "silu" else _SMALLEST_NORMAL
    slack = (48 + 4 * reach.clamp_max(128.0)) * UNIT * size + least
    return slack if name in _RELATIVE else slack + 16 * UNIT * reach.clamp_min(1.0)


def _tidy(low: Tensor, high: Tensor, certain: Tensor, lost: Tensor | None = None) -> Interval:
    """An interval of float32 numbers.

    Args:
        low: The end in float64.
        high: The other.
        certain: Where every value is NaN.
        lost: Where some are.
    """
    lost = (
        low.isnan()
        | high.isnan()
        | low.isinf()
        | high.isinf()
        | (certain if lost is None else lost)
    )
    low = torch.where(low < -_LARGEST, -math.inf, torch.where(lost, -math.inf, low))
    high = torch.where(high > _LARGEST, math.inf, torch.where(lost, math.inf, high))
    return Interval(torch.where(certain, math.nan, low), torch.where(certain, math.nan, high))
