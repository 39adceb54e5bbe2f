"""Where the results of a right kernel lie that makes rows and quantizes them: enclosures, derived.

As `fxquant.codegen.bounds` does for products. The freedoms of a kernel are the order of sums over a
row and the rounding of functions; a float32 sum of k numbers errs by at most ``k u sum |x|`` in any
order (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1; u is `UNIT`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.codegen import intervals
from fxquant.codegen.epilogue import EpilogueNode
from fxquant.codegen.intervals import UNIT, Interval
from fxquant.codegen.prologue import REDUCTIONS, is_cast, is_reduction, references
from fxquant.codegen.quantize import QuantizeSpec

LEAST_AMAX = 2.0**-100


def enclosures(
    spec: QuantizeSpec, operands: Sequence[Tensor], limit: Sequence[Tensor], amax: Tensor
) -> tuple[Interval, ...]:
    """Where codes, amax and further results of a call lie.

    Args:
        spec: With a prologue.
        operands: The prologue's.
        limit: The limit, where the spec has one.
        amax: What the kernel found: its codes are those that belong to it.

    Returns:
        ``[m, k]`` (amax ``[m]``) each, for all rows.
    """
    values = _values(spec, operands)
    prologue = spec.prologue
    assert prologue is not None, "a spec of rows that are made"
    x = _expanded(values[prologue.result], spec, amax.numel())
    if not is_cast(prologue.nodes[-1], spec.x_dtype):
        x = intervals.rounded(x, getattr(torch, spec.x_dtype))
    more = [
        intervals.rounded(
            _expanded(values[result.value], spec, amax.numel()), getattr(torch, result.dtype)
        )
        for result in prologue.more
    ]
    most = limit[0].double().reshape(()).clamp_min(LEAST_AMAX) if limit else None
    return _codes(x, amax.reshape(-1, 1)), _peaks(spec, x, most), *more


def _expanded(value: Interval, spec: QuantizeSpec, rows: int) -> Interval:
    return value.expand(torch.Size([rows, spec.k]))


def _values(spec: QuantizeSpec, operands: Sequence[Tensor]) -> dict[str, Interval]:
    """Every value of a prologue, by its reference."""
    prologue = spec.prologue
    assert prologue is not None, "a spec of rows that are made"
    values: dict[str, Interval] = {}
    for number, (operand, given) in enumerate(zip(prologue.operands, operands, strict=True)):
        shape = [-1 if "m" in operand.dims else 1, spec.k if "k" in operand.dims else 1]
        if "m" in operand.dims:
            shape[0] = given.numel() // shape[1]
        found = given.reshape(shape)
        found = found if found.dtype == torch.bool else found.double()
        values[f"%in{number}"] = Interval(found, found)
    for number, node in enumerate(prologue.nodes):
        if is_reduction(node):
            values[f"%{number}"] = _reduced(spec, node, values)
        else:
            values[f"%{number}"] = intervals.call(node, values)
    return values


def _reduced(spec: QuantizeSpec, node: EpilogueNode, values: dict[str, Interval]) -> Interval:
    (name,) = references(node)
    value, kind = values[name], REDUCTIONS[node.op]
    low, high = value.low.double(), value.high.double()
    if kind == "amax":
        return Interval(low.amax(-1, keepdim=True), high.amax(-1, keepdim=True))
    size = torch.maximum(low.abs(), high.abs()).sum(-1, keepdim=True)
    error = (spec.k + 2) * UNIT * size + 2.0**-126
    share = 1 / spec.k if kind == "mean" else 1.0
    low, high = low.sum(-1, keepdim=True), high.sum(-1, keepdim=True)
    # Infinities of both signs may come from numbers that are too large: nothing is certain then.
    certain = (value.low.isnan() & value.high.isnan()).any(-1, keepdim=True)
    lost = low.isnan() | high.isnan() | ~size.isfinite() | (size > torch.finfo(torch.float32).max)
    return Interval(
        torch.where(certain, math.nan, torch.where(lost, -math.inf, (low - error) * share)),
        torch.where(certain, math.nan, torch.where(lost, math.inf, (high + error) * share)),
    )


def _peaks(spec: QuantizeSpec, x: Interval, limit: Tensor | None) -> Interval:
    """The largest magnitude of every row, bounded as the spec says; NaN if it is not finite."""
    reach = torch.maximum(x.low.abs(), x.high.abs()).amax(-1)
    least = torch.where((x.low <= 0) & (x.high >= 0), 0.0, torch.minimum(x.low.abs(), x.high.abs()))
    least = least.amax(-1)
    lost = x.low.isnan().any(-1) | (least > torch.finfo(torch.float32).max)
    unsure = ~reach.isfinite()
    low, high = least.nan_to_num(0.0).clamp_min(LEAST_AMAX), reach.clamp_min(LEAST_AMAX)
    if limit is not None:
        low = limit.expand_as(low) if spec.scope == "static" else torch.minimum(low, limit)
        high = limit.expand_as(high) if spec.scope == "static" else torch.minimum(high, limit)
    low, high = torch.where(unsure, -math.inf, low), torch.where(unsure, math.inf, high)
    return Interval(torch.where(lost, math.nan, low), torch.where(lost, math.nan, high))


def _codes(x: Interval, amax: Tensor) -> Interval:
    """The integers that belong to an amax: rounding is monotone."""
    lost = amax.isnan()
    factor = torch.full_like(amax, 127.0) / amax
    low, high = (torch.round(end.float() * factor).clamp(-127, 127) for end in (x.low, x.high))
    unsure = x.low.isnan() | x.high.isnan()
    low, high = torch.where(unsure, -127.0, low), torch.where(unsure, 127.0, high)
    low, high = (torch.where(lost, 0.0, end.double()) for end in (low, high))
    return Interval(low, high)
