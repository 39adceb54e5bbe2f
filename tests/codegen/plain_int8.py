"""int8 products once more: integers in NumPy, one output at a time, and how far off one may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxquant.codegen.spec import KernelSpec, WeightOperand
from fxquant.formats import Encoding, levels

UNIT = 2.0**-24
"""Half the distance of neighbouring float32 numbers at 1: what one rounding may be off by."""


@dataclass(frozen=True)
class Weight:
    """The logical weight as integers and scales.

    Attributes:
        integers: ``[e, n, k]`` int64.
        scales: ``[e, n, k]`` float64, each of its element's block.
        blocks: ``[e, n, k]`` the number of each element's block.
        floats: ``[e, n, k]`` float32, what the codes stand for.
    """

    integers: np.ndarray
    scales: np.ndarray
    blocks: np.ndarray
    floats: np.ndarray


@dataclass(frozen=True)
class Sums:
    """What a product's epilogue is given.

    Attributes:
        exact: ``[e, m, n]`` float64, the definition without roundings.
        magnitude: The same sums of absolute values.
        bound: How far a float32 kernel may be from `exact`.
        q: ``[e, m, k]`` the integers of x.
        outliers: ``[e, k]`` which columns are outliers.
    """

    exact: Tensor
    magnitude: Tensor
    bound: Tensor
    q: np.ndarray
    outliers: np.ndarray


def weight_of(operand: WeightOperand, tensors: list[Tensor]) -> Weight:
    """Reads the stored tensors byte by byte."""
    encoding = operand.encoding
    parts = dict(zip(encoding.parts, [t.numpy() for t in tensors], strict=True))
    codes = _codes(parts["codes"].reshape(-1), encoding, operand.numel)
    blocks = _blocks(encoding, operand.shape)
    scales = _scales(parts, encoding).reshape(-1)[blocks]
    book = levels(encoding)
    if book is None:
        half = 2 ** (encoding.bits - 1)
        signed = np.where(codes >= half, codes - 2 * half, codes)
        integers = codes - parts["zeros"].reshape(-1)[blocks] if encoding.zero_point else signed
        floats = integers.astype(np.float32) * scales
        units = scales.astype(np.float64)
    else:
        largest = max(abs(level) for level in book)
        table = np.array([np.rint(level * 127 / largest) for level in book]).astype(np.int64)
        integers = table[codes]
        floats = np.array(book, np.float32)[codes] * scales
        units = scales.astype(np.float64) * largest / 127
    axes = zip(operand.sizes, operand.strides, strict=True)
    places = operand.offset + sum(np.ix_(*(np.arange(size) * stride for size, stride in axes)))
    return Weight(integers[places], units[places], blocks[places], floats[places])


def sums(
    spec: KernelSpec,
    x: Tensor,
    tensors: list[Tensor],
    extra: list[Tensor],
    *,
    decoded_apart: bool = False,
) -> Sums:
    """Computes `KernelSpec`'s definition of an int8 product.

    The bound. Sums of integers are exact. A kernel turns them into float32 where the block
    changes, and after no fewer than 16 inputs, which makes at most ``runs + k / 16`` partial sums:
    one rounding each for every addition of theirs, and nine for one's way: the conversion, the
    scale (three in its decoding, one with the unit of the levels), its product, ``amax / 127`` and
    the product with it, the addition of the outlier part. Each is relative to the sum of absolute
    values (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). A float32 sum of
    c outlier products errs by ``c u`` and its addition by ``u`` of the magnitude; with
    `decoded_apart` its weights may be apart by four roundings in float32, which can move one to
    the neighbour in the outliers' dtype.
    """
    weight = weight_of(spec.weight, tensors)
    e, n, k = spec.weight.sizes
    rows = x.float().numpy().reshape(e, -1, k)
    outliers, apart = _outliers(spec, rows, weight, extra)
    inner = np.where(outliers[:, None], np.float32(0), rows)
    if spec.is_quantized:
        amax, q = extra[-1].numpy().reshape(e, -1), rows
    else:
        with np.errstate(invalid="ignore"):
            amax = np.maximum(np.abs(inner).max(-1), np.float32(2.0**-100))
            q = np.rint(inner * (np.float32(127) / amax)[..., None])
    lost = np.isnan(q).any(-1) | np.isnan(amax)
    whole = np.where(lost[..., None], 0, q).astype(np.int64)

    exact = np.zeros((e, rows.shape[1], n))
    for i in range(e):
        for j in range(n):
            for block in np.unique(weight.blocks[i, j]):
                own = weight.blocks[i, j] == block
                total = (whole[i][:, own] * weight.integers[i, j, own]).sum(-1)
                exact[i, :, j] += total * weight.scales[i, j, own][0]
    finite = np.where(lost, 0, amax).astype(np.float64)[..., None] / 127
    exact = exact * finite
    turned = np.abs(weight.integers * weight.scales).swapaxes(1, 2)
    magnitude = np.abs(whole).astype(np.float64) @ turned * finite
    changes = (weight.blocks[..., 1:] != weight.blocks[..., :-1]).sum(-1).max(initial=0)
    bound = magnitude * (changes + 1 + math.ceil(k / 16) + 9) * UNIT

    if apart is not None:
        left, right = apart
        moved = 0.0
        if decoded_apart and spec.outliers.columns is None:
            dtype = getattr(torch, spec.outliers.dtype)
            moved = 4 * UNIT + (0.0 if dtype == torch.float32 else torch.finfo(dtype).eps)
        with np.errstate(invalid="ignore"):
            exact = exact + left @ right.swapaxes(1, 2)
            size = np.abs(left) @ np.abs(right).swapaxes(1, 2)
            bound = bound + size * ((outliers.sum(-1).max() + 1) * UNIT + moved)
            magnitude = magnitude + size
    exact[lost] = np.nan
    shape = (*x.shape[:-1], n)
    found = (torch.from_numpy(value).reshape(shape) for value in (exact, magnitude, bound))
    return Sums(*found, q, outliers)


def _outliers(
    spec: KernelSpec, rows: np.ndarray, weight: Weight, extra: list[Tensor]
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """Which columns are outliers, and both factors of their products in float64."""
    e, _, k = rows.shape
    found = np.zeros((e, k), dtype=bool)
    if spec.outliers is None:
        return found, None
    dtype = getattr(torch, spec.outliers.dtype)

    def rounded(values: np.ndarray) -> np.ndarray:
        return torch.from_numpy(values).to(dtype).double().numpy()

    if spec.outliers.columns is None:
        limit = np.float32(spec.outliers.threshold)
        for i in range(e):
            for row in rows[i]:
                for column in range(k):
                    found[i, column] |= bool(abs(row[column]) >= limit)
        left = np.where(found[:, None], rows, np.float32(0))
        right = np.where(found[:, None], weight.floats, np.float32(0))
        return found, (rounded(left), rounded(right))
    columns, apart = extra[-2].tolist(), extra[-1].double().numpy().reshape(e, -1, len(extra[-2]))
    found[:, columns] = True
    return found, (rounded(np.ascontiguousarray(rows[..., columns])), apart)


def _codes(stored: np.ndarray, encoding: Encoding, numel: int) -> np.ndarray:
    stored = stored.view(np.uint8)
    shifts = range(8 - encoding.bits, -1, -encoding.bits)
    fields = [stored >> shift & (2**encoding.bits - 1) for shift in shifts]
    return np.stack(fields, -1).reshape(-1)[:numel].astype(np.int64)


def _blocks(encoding: Encoding, shape: tuple[int, ...]) -> np.ndarray:
    if encoding.is_flat:
        extent = encoding.block[0] if encoding.block[0] > 0 else math.prod(shape)
        return np.arange(math.prod(shape)) // extent
    number = np.zeros(shape, dtype=np.int64)
    block = (1,) * (len(shape) - len(encoding.block)) + encoding.block
    for places, extent, size in zip(np.indices(shape), block, shape, strict=True):
        length = size if extent == -1 else min(extent, size)
        number = number * math.ceil(size / length) + places // length
    return number.reshape(-1)


def _scales(parts: dict[str, np.ndarray], encoding: Encoding) -> np.ndarray:
    inner = encoding.scale
    if inner is None:
        return parts["scales"]
    flat = parts["scales"].reshape(-1)
    book = np.array(levels(inner), np.float32)
    nested = parts["nested"].reshape(-1)[_blocks(inner, (len(flat),))]
    values = book[flat] * nested
    return values + parts["offset"] if inner.offset else values
