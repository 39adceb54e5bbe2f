"""Grouped products, taken apart into what they are made of: products with one matrix each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from fxquant.codegen import bounds, reference
from fxquant.codegen.spec import KernelSpec, Outliers
from tests.bounds import assert_close_within
from tests.codegen import harness
from tests.codegen.specs import int8_specs, joined_specs, specs


@dataclass(frozen=True)
class Piece:
    """The rows of one matrix.

    Attributes:
        rows: Which they are.
        spec: Their product, that of one matrix.
        x: The activation.
        extra: Further operands.
    """

    rows: slice
    spec: KernelSpec
    x: Tensor
    extra: list[Tensor]


def grouped(strategy: st.SearchStrategy[KernelSpec]) -> st.SearchStrategy[KernelSpec]:
    """The grouped ones of the batched specs that a strategy draws."""
    batched = strategy.filter(lambda spec: spec.weight.batch is not None)
    return batched.map(_of_groups)


def _of_groups(spec: KernelSpec) -> KernelSpec:
    operands = [
        dataclasses.replace(operand, dims=operand.dims.replace("e", ""))
        for operand in spec.epilogue.operands
    ]
    epilogue = dataclasses.replace(spec.epilogue, operands=tuple(operands))
    return dataclasses.replace(spec, epilogue=epilogue, grouped=True)


def grouped_specs(dtypes: tuple[str, ...]) -> st.SearchStrategy[KernelSpec]:
    """Of floats, of integers, and of several weights."""
    several = joined_specs(dtypes).filter(lambda spec: not spec.epilogue.more)
    return grouped(st.one_of(specs(dtypes), int8_specs(dtypes), several))


def ends_of(kind: str, rows: int, batch: int) -> Tensor:
    """How rows fall to matrices: evenly, all to one of them, one each, or not all of them."""
    number = torch.arange(1, batch + 1)
    made = {
        "even": number * rows // batch,
        "one": (number > batch // 2) * rows,
        "first": torch.full((batch,), rows),
        "single": number.clamp(max=rows),
        "none": number * 0,
        "tail": number * (rows // 2) // batch,
    }
    return made[kind].to(torch.int32)


KINDS = ("even", "one", "first", "single", "none", "tail")


def pieces(
    spec: KernelSpec, x: Tensor, tensors: list[Tensor], extra: list[Tensor]
) -> Iterator[Piece]:
    """The products of the matrices that have rows.

    Outliers by a threshold are those of all rows together: every piece is given them.
    """
    assert spec.grouped
    *extra, ends = extra
    operands, further = _split(spec, extra)
    found = None
    if spec.outliers is not None and spec.outliers.threshold is not None:
        large = (x.float().abs() >= spec.outliers.threshold).any(0)
        found = large.nonzero().flatten().to(torch.int32)
    for e, (first, last) in enumerate(_ranges(ends.tolist())):
        if first == last:
            continue
        rows, one = slice(first, last), alone(spec, e, found)
        own = [
            value[rows] if "m" in operand.dims else value
            for value, operand in zip(operands, spec.epilogue.operands, strict=True)
        ]
        if spec.is_quantized:
            own.append(further[0][rows])
        elif found is not None and one.outliers is not None:
            dtype = getattr(torch, one.outliers.dtype)
            each = len(tensors) // spec.weights
            own.append(found)
            for at in range(0, len(tensors), each):
                dense = reference.operand(one.weight, tensors[at : at + each], dtype)
                own.append(dense[:, found.long()].contiguous())
        elif spec.outliers is not None and found is None:
            columns, *aparts = further
            own += [columns, *(apart[e] for apart in aparts)]
        yield Piece(rows, one, x[rows], own)


def alone(spec: KernelSpec, e: int, found: Tensor | None = None) -> KernelSpec:
    """The product with matrix e alone."""
    weight, outliers = spec.weight, spec.outliers
    outer, n, k = weight.strides
    offset = weight.offset + e * outer
    one = dataclasses.replace(weight, batch=None, strides=(0, n, k), offset=offset)
    if outliers is not None and found is not None:
        outliers = Outliers(outliers.dtype, columns=len(found)) if len(found) else None
    return dataclasses.replace(spec, weight=one, outliers=outliers, grouped=False)


def rest(spec: KernelSpec, x: Tensor, extra: list[Tensor]) -> tuple[slice, Tensor]:
    """The rows that no matrix has, and what becomes of sums of 0 there."""
    *extra, ends = extra
    rows = slice(int(ends[-1]), x.shape[0])
    operands, _ = _split(spec, extra)
    own = [
        value[rows] if "m" in operand.dims else value
        for value, operand in zip(operands, spec.epilogue.operands, strict=True)
    ]
    zeros = torch.zeros(x[rows].shape[0], spec.weight.n)
    return rows, harness.plain_epilogue(spec, zeros, own)


def check(
    spec: KernelSpec,
    x: Tensor,
    tensors: list[Tensor],
    extra: list[Tensor],
    *,
    got: Tensor,
) -> None:
    """Compares a result with the reference of every matrix alone."""
    assert got.shape == (x.shape[0], spec.weight.n)
    assert got.dtype == getattr(torch, spec.out_dtype)
    for piece in pieces(spec, x, tensors, extra):
        want = reference.run(piece.spec, piece.x, tensors, piece.extra)
        assert isinstance(want, Tensor)
        bound = bounds.allowed(piece.spec, piece.x, tensors, piece.extra)
        assert_close_within(got[piece.rows], want, bound)
    if spec.weights == 1:
        rows, want = rest(spec, x, extra)
        torch.testing.assert_close(got[rows].double(), want.double(), rtol=1e-2, atol=1e-2)


def _split(spec: KernelSpec, extra: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    count = len(spec.epilogue.operands)
    return extra[:count], extra[count:]


def _ranges(ends: list[int]) -> Iterator[tuple[int, int]]:
    first = 0
    for last in ends:
        yield first, last
        first = last
