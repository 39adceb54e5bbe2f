"""How much a kernel has to read, write and multiply: what its time is measured against."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxquant.codegen.quantize import QuantizeSpec
from fxquant.codegen.spec import KernelSpec, WeightOperand
from fxquant.formats.blocks import block_grid

_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "bool": 1}


@dataclass(frozen=True)
class Work:
    """The least that a call with m rows does; of a batch each matrix has m.

    Attributes:
        fixed: Bytes that are read whatever m is: weights, biases.
        a_row: Bytes read and written for each row.
        operations: Multiplications and additions for each row.
    """

    fixed: float
    a_row: float
    operations: float

    def bytes(self, rows: int) -> float:
        """Bytes of a call."""
        return self.fixed + rows * self.a_row

    def describe(self) -> str:
        """A few words: ``4.33 MB, and for a row 3.84 kB and 1.18 M operations``."""
        fixed, row = amount(self.fixed, "B"), amount(self.a_row, "B")
        return f"{fixed}, and for a row {row} and {amount(self.operations)} operations"


def work_of(spec: KernelSpec | QuantizeSpec) -> Work:
    """What a spec asks for at least."""
    return _of_rows(spec) if isinstance(spec, QuantizeSpec) else _of_product(spec)


def _of_product(spec: KernelSpec) -> Work:
    weight = spec.weight
    e, n, k = weight.sizes
    each = 1 if spec.batch is None else e
    fixed = spec.weights * stored_bytes(weight)
    results = [spec.out_dtype, *(result.dtype for result in spec.epilogue.more)]
    row = each * (k * _SIZES[spec.x_dtype] + n * sum(_SIZES[dtype] for dtype in results))
    sizes = {"e": e, "m": 1, "n": n}
    for operand in spec.epilogue.operands:
        size = math.prod(sizes[axis] for axis in operand.dims) * _SIZES[operand.dtype]
        fixed, row = (fixed, row + size) if "m" in operand.dims else (fixed + size, row)
    operations = each * n * (2 * k * spec.weights + len(spec.epilogue.nodes))
    return Work(fixed, row, operations)


def _of_rows(spec: QuantizeSpec) -> Work:
    fixed, row, operations = 4.0 * spec.has_limit, spec.k + 4.0, 4.0 * spec.k
    if spec.prologue is None:
        return Work(fixed, row + spec.k * _SIZES[spec.x_dtype], operations)
    for operand in spec.prologue.operands:
        size = (spec.k if "k" in operand.dims else 1) * _SIZES[operand.dtype]
        fixed, row = (fixed, row + size) if "m" in operand.dims else (fixed + size, row)
    row += spec.k * sum(_SIZES[result.dtype] for result in spec.prologue.more)
    return Work(fixed, row, operations + spec.k * len(spec.prologue.nodes))


def stored_bytes(weight: WeightOperand) -> float:
    """Bytes of an operand's codes and scales: its share of the stored tensor's."""
    encoding = weight.encoding
    scales = block_grid(encoding, weight.shape).count
    found = weight.numel * encoding.bits / 8
    found += scales * (4.0 if encoding.scale is None else 1.0) + scales * encoding.zero_point
    if encoding.scale is not None:
        found += 4.0 * block_grid(encoding.scale, (scales,)).count
    return found * math.prod(weight.sizes) / weight.numel


def amount(value: float, unit: str = "") -> str:
    """A number of three digits with its prefix: ``4.33 MB``."""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()
