"""Where the results of a right kernel lie: enclosures of what a spec defines, derived.

A spec leaves its kernels some freedom: the order of sums, whether levels or weights are rounded,
what goes through float32. `enclosures` evaluates the definition in float64 and lets every freedom
and every rounding widen an interval. Each right kernel's results lie inside, the reference's among
them; tests and ``options={"verify": True}`` measure with it.

Sums: a float32 sum of k products errs by at most ``k u sum |x||w|`` in any order (Higham, Accuracy
and Stability of Numerical Algorithms, section 3.1; u is `UNIT`). Epilogues: interval arithmetic,
see `fxquant.codegen.intervals`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.codegen import intervals, reference
from fxquant.codegen.indexing import K, WeightIndex
from fxquant.codegen.intervals import UNIT, Interval
from fxquant.codegen.spec import KernelSpec, WeightOperand
from fxquant.formats import decode_int8, int8_levels, levels

SMALLEST_NORMAL = 2.0**-126
LEAST_AMAX = 2.0**-100
_BYTE_BIAS = 128
_LONG_RUN = 32
"""Inputs that share a scale, from which on every target sums integers before it scales them."""


@dataclass(frozen=True)
class Sums:
    """What an epilogue is given, of one weight.

    Attributes:
        exact: ``[m, n]`` or ``[e, m, n]`` float64, the definition without roundings.
        error: How far a kernel's sums may be from it.
    """

    exact: Tensor
    error: Tensor


@dataclass(frozen=True)
class _Call:
    """One call: what `enclosures` is given, rows of x behind one another."""

    spec: KernelSpec
    x: Tensor
    extra: Sequence[Tensor]
    chosen: Tensor
    number: int = 0
    """Of the weight."""

    def rows(self, value: Tensor) -> Tensor:
        """Those to look at, of what has as many rows as x."""
        return value.index_select(-2, self.chosen)


def enclosures(
    spec: KernelSpec,
    x: Tensor,
    weight: Sequence[Tensor],
    extra: Sequence[Tensor],
    rows: Tensor | None = None,
) -> tuple[Interval, ...]:
    """Where the results of a call lie, the main one first.

    Args:
        spec: The product.
        x: Activation ``[.., k]``, or ``[batch, m, k]`` with a batch.
        weight: The stored tensors.
        extra: The epilogue's operands, then those of static outliers or of a quantized x.
        rows: Numbers of the rows to look at; all by default. Outliers are those of all rows.

    Returns:
        ``[m, n]`` each, or ``[batch, m, n]``, for the rows that were asked for.
    """
    flat = x if spec.batch is not None else x.reshape(-1, spec.weight.k)
    chosen = torch.arange(flat.shape[-2], device=x.device) if rows is None else rows
    asked, count = _Call(spec, flat, extra, chosen), len(spec.weight.encoding.parts)
    values: dict[str, Interval] = {}
    for number in range(spec.weights):
        own = weight[number * count : (number + 1) * count]
        asked = dataclasses.replace(asked, number=number)
        sums = _grouped_sums(asked, own) if spec.grouped else _sums(asked, own)
        values[f"%acc{number or ''}"] = intervals.around(sums.exact, sums.error)
    for number, operand in enumerate(spec.epilogue.operands):
        values[f"%in{number}"] = _operand(asked, operand.dims, extra[number])
    for number, node in enumerate(spec.epilogue.nodes):
        values[f"%{number}"] = intervals.call(node, values)
    shape = values["%acc"].low.shape
    wanted = [(spec.epilogue.result, spec.out_dtype)]
    wanted += [(more.value, more.dtype) for more in spec.epilogue.more]
    return tuple(
        intervals.rounded(values[name], getattr(torch, dtype)).expand(shape)
        for name, dtype in wanted
    )


def float_sums(
    rows: Tensor, dense: Tensor, zeros: Tensor | None, dtype: torch.dtype, roundings: int = 1
) -> Sums:
    """The sums of a product of floats.

    A kernel rounds levels to `dtype` and scales sums in float32, or rounds scaled levels, or both:
    each weight is off by half a unit in its last place for each rounding, of numbers below the
    smallest normal one by half of that one's, and by four roundings in float32. With zero points it
    may sum ``x * code`` and ``x * zero`` apart. Hardware for pairs of bfloat16 takes subnormal
    numbers for zeros.

    Floats may be multiplied in three bfloat16 parts of 8 bits each, ``|middle| <= 2**-8 |x|`` and
    ``|low| <= 2**-17 |x|``, without the products of ``low`` with ``middle`` or ``low``. Those are
    ``u |x||w|`` and a little, one rounding. There are no more others than k: an instruction sums
    two times 16 products and adds them up (Intel's manual, TDPBF16PS), and twelve of them, whose
    largest products come third from last, sum 64 inputs: 28 roundings, then one for each 64. Of
    k < 32 inputs the largest products go through k roundings and three; that and what is small are
    of the six above.

    Args:
        rows: ``[.., m, k]`` float64, what is multiplied.
        dense: ``[.., n, k]`` float64, the weight as it is decoded in float32.
        zeros: Magnitudes of ``zero * scale``, None without zero points.
        dtype: In which products are made.
        roundings: How often a weight may be rounded to it.
    """
    k, size = rows.shape[-1], rows.abs()
    exact = rows @ dense.transpose(-1, -2)
    magnitude = size @ dense.abs().transpose(-1, -2)
    apart = magnitude if zeros is None else magnitude + 2 * size @ zeros.transpose(-1, -2)
    error = (k + 6) * UNIT * apart + 4 * UNIT * magnitude + SMALLEST_NORMAL
    if dtype != torch.float32:
        info = torch.finfo(dtype)
        lost = size.sum(-1, keepdim=True) * (info.smallest_normal * info.eps / 2)
        error = error + roundings * (info.eps / 2 * magnitude + lost)
    if dtype == torch.bfloat16:
        error = error + SMALLEST_NORMAL * (dense.abs().sum(-1) + 2 * k).unsqueeze(-2)
    return Sums(exact, error)


def allowed(spec: KernelSpec, x: Tensor, weight: Sequence[Tensor], extra: Sequence[Tensor]) -> Any:
    """How far apart two right results may be, element by element; a tuple for several results."""
    shape = (*x.shape[:-1], spec.weight.n)
    found = enclosures(spec, x, weight, extra)
    apart = [(e.high - e.low).nan_to_num(nan=0.0, posinf=math.inf).reshape(shape) for e in found]
    return tuple(apart) if spec.epilogue.more else apart[0]


def spread(count: int, most: int) -> list[int]:
    """At most so many of `count` rows: the last ones, whose panels are cut short, and others."""
    if count <= most:
        return list(range(count))
    tail = min(16, most // 2)
    step = (count - tail) / (most - tail)
    return [*(int(number * step) for number in range(most - tail)), *range(count - tail, count)]


def _operand(call: _Call, dims: str, value: Tensor) -> Interval:
    """An operand of the epilogue, exact, in the shape in which it meets the sums."""
    weight = call.spec.weight
    sizes = {"e": weight.batch or 1, "m": call.x.shape[-2], "n": weight.n}
    axes = "emn" if call.spec.batch is not None else "mn"
    found = value.reshape([sizes[axis] if axis in dims else 1 for axis in axes])
    found = call.rows(found) if "m" in dims else found
    found = found if found.dtype == torch.bool else found.double()
    return Interval(found, found)


def _grouped_sums(call: _Call, weight: Sequence[Tensor]) -> Sums:
    """Of all rows with all matrices, those of each row with its own."""
    batch, count = call.spec.weight.sizes[0], len(call.spec.epilogue.operands)
    extra = [*call.extra]
    if call.spec.is_quantized:
        extra[count] = extra[count].expand(batch, -1)
    spec = dataclasses.replace(call.spec, grouped=False)
    x = call.x.expand(batch, *call.x.shape)
    every = dataclasses.replace(call, spec=spec, x=x, extra=extra)
    found = _sums(every, weight)
    own = (call.chosen.unsqueeze(-1) >= call.extra[-1]).sum(-1)
    at = own.clamp(max=batch - 1), torch.arange(len(own), device=own.device)
    has_none = (own == batch).unsqueeze(-1)
    parts = (part[at].masked_fill(has_none, 0.0) for part in (found.exact, found.error))
    return Sums(*parts)


def _sums(call: _Call, weight: Sequence[Tensor]) -> Sums:
    stored = call.spec.weight
    dense = reference.operand(stored, weight, torch.float32).double()
    zeros = _zeros_apart(stored, weight, dense)
    if call.spec.compute_dtype != "int8":
        dtype = getattr(torch, call.spec.compute_dtype)
        # Levels that are whole numbers are exact.
        roundings = 1 if levels(stored.encoding) is None else 2
        return float_sums(call.rows(call.x).to(dtype).double(), dense, zeros, dtype, roundings)
    if call.spec.outliers is None:
        return _int8_sums(call, weight, call.x, zeros)
    is_outlier, left = _outliers(call, dense)
    right = _int8_sums(call, weight, torch.where(is_outlier, 0.0, call.x.float()), zeros)
    # The addition of both parts rounds relative to either.
    error = right.error + left.error + 2 * UNIT * (left.exact.abs() + left.error)
    return Sums(right.exact + left.exact, error)


def _int8_sums(call: _Call, weight: Sequence[Tensor], inner: Tensor, zeros: Tensor | None) -> Sums:
    """Of integers.

    Their sums are exact. A kernel turns them into float32 where the block changes, and after no
    fewer than 16 inputs: one rounding each for every addition of theirs, and nine for one's way:
    the conversion, the scale (three in its decoding, one with the unit of the levels), its product,
    ``amax / 127`` and the product with it, the addition of outliers. Where scales change from few
    inputs to few inputs it may sum them one by one. Hardware that multiplies unsigned bytes gets
    ``w + 128``; what is too much, or the zero points' part, may be taken off in float32.
    """
    spec, k = call.spec, call.spec.weight.k
    if spec.is_quantized:
        amax = call.rows(call.extra[len(spec.epilogue.operands)].reshape(*inner.shape[:-1], 1))
        q = call.rows(inner)
    else:
        rows = call.rows(inner).float()
        amax = rows.abs().amax(-1, keepdim=True).clamp_min(LEAST_AMAX)
        q = torch.round(rows * (torch.full_like(amax, 127.0) / amax))
    q, unit = q.double(), amax.double() / 127
    integers = _int8_operand(spec.weight, weight)
    exact = (q @ integers.transpose(-1, -2)) * unit
    magnitude = (q.abs() @ integers.abs().transpose(-1, -2)) * unit
    run = WeightIndex.of(spec.weight).run_of_block(K, 4096)
    changes = math.ceil(k / run) if run else 1
    error = (changes + math.ceil(k / 16) + 9) * UNIT * magnitude + SMALLEST_NORMAL
    biases = _byte_biases(spec.weight, weight) if zeros is None else zeros
    magnitude = magnitude + 2 * (q.abs() @ biases.transpose(-1, -2)) * unit
    return Sums(exact, error + (k + 8 if 0 < run < _LONG_RUN else 4) * UNIT * magnitude)


def _int8_operand(weight: WeightOperand, tensors: Sequence[Tensor]) -> Tensor:
    """The logical weight as an int8 product sees it, in float64."""
    out = decode_int8(tensors, weight.encoding, weight.shape)
    for method, args in reference.view_steps(weight):
        out = getattr(out, method)(*args)
    return out


def _byte_biases(weight: WeightOperand, tensors: Sequence[Tensor]) -> Tensor:
    """What unsigned bytes are larger than the integers that they stand for, times the scales."""
    encoding = weight.encoding
    integers = int8_levels(encoding)[0] or (0, 1)
    code = max(range(len(integers)), key=lambda c: abs(integers[c]))
    byte = sum(code << shift for shift in range(0, 8, encoding.bits))
    codes = torch.full_like(tensors[0].view(torch.uint8), byte).view(tensors[0].dtype)
    found = _int8_operand(weight, [codes, *tensors[1:]]).abs()
    return found * (_BYTE_BIAS / max(1, abs(integers[code])))


def _outliers(call: _Call, dense: Tensor) -> tuple[Tensor, Sums]:
    """Which columns are outliers, as ``[.., 1, k]``, and the sums of their products."""
    spec, rows = call.spec, call.x.float()
    outliers = spec.outliers
    assert outliers is not None, "asked for by specs that have some"
    dtype = getattr(torch, outliers.dtype)
    if outliers.threshold is not None:
        found = (rows.abs() >= outliers.threshold).any(-2, keepdim=True)
        own = call.rows(torch.where(found, rows, 0.0)).to(dtype).double()
        return found, float_sums(own, torch.where(found, dense, 0.0), None, dtype)
    first = len(spec.epilogue.operands)
    columns, apart = call.extra[first], call.extra[first + 1 + call.number]
    found = torch.zeros(spec.weight.k, dtype=torch.bool, device=rows.device)
    found = found.index_fill(0, columns.long(), value=True)
    own = call.rows(rows.index_select(-1, columns)).to(dtype).double()
    exact = own @ apart.double().transpose(-1, -2)
    magnitude = own.abs() @ apart.double().abs().transpose(-1, -2)
    lost = SMALLEST_NORMAL * (1 + own.shape[-1])
    return found, Sums(exact, (own.shape[-1] + 6) * UNIT * magnitude + lost)


def _zeros_apart(weight: WeightOperand, tensors: Sequence[Tensor], dense: Tensor) -> Tensor | None:
    """Magnitudes of ``zero * scale`` as the logical weight, None without zero points."""
    if not weight.encoding.zero_point:
        return None
    without = [*tensors[:-1], torch.zeros_like(tensors[-1])]
    return (reference.operand(weight, without, torch.float32).double() - dense).abs()
