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
}
"""One or two roundings, of quotients on a GPU two units in the last place: `4 * UNIT`."""

_RELATIVE = {"exp", "exp2", "sigmoid", "silu", "sqrt", "rsqrt", "tanh", "erf", "sin", "cos", "pow"}
"""Functions whose error is relative to their result; that of others may be to the argument."""


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
    op = getattr(getattr(torch.ops.aten, name), overload)
    places = [_candidates(value, values) for value in node.args]
    kwargs = {key: _candidates(value, values) for key, value in node.kwargs}
    found = []
    for point in itertools.product(*places, *kwargs.values()):
        named = dict(zip(kwargs, point[len(places) :], strict=True))
        found.append(_in_float64(op(*point[: len(places)], **named)))
    low, high, lost, certain = found[0], found[0], found[0].isnan(), found[0].isnan()
    if low.dtype == torch.bool:
        for value in found[1:]:
            low, high = low & value, high | value
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


def _candidates(value: Any, values: Mapping[str, Interval]) -> list[Any]:
    """Where an op is evaluated, of one argument."""
    if not isinstance(value, str):
        return [value]
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
    loses ``abs(x)`` units: it is one of ``x * log2(e)``, rounded.
    """
    if name in _ARITHMETIC:
        return 4 * UNIT * size + _SMALLEST_NORMAL
    reach = torch.as_tensor(reach, dtype=torch.float64, device=size.device)
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
