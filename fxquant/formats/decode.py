"""From codes and scales back to numbers: pure torch that can be traced."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.formats.blocks import BlockGrid, block_grid
from fxquant.formats.codebooks import get_codebook
from fxquant.formats.encoding import Encoding


def levels(encoding: Encoding) -> tuple[float, ...] | None:
    """The codebook of an encoding in code order; None for uniform levels."""
    return None if encoding.is_uniform else get_codebook(encoding.levels).levels


def decode(
    tensors: Sequence[Tensor], encoding: Encoding, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Decodes a whole tensor.

    Works on real, fake and traced tensors alike. The arithmetic is ``level * scale`` (with a zero
    point ``(code - zero) * scale``) in float32, rounded once to `dtype`.

    Args:
        tensors: The stored parts, in the order of ``encoding.parts``.
        encoding: How they are stored.
        shape: Of the tensor that was encoded.
        dtype: Of the result.

    Returns:
        The tensor, `shape`, contiguous.
    """
    shape = tuple(shape)
    parts = dict(zip(encoding.parts, tensors, strict=True))
    grid = block_grid(encoding, shape)
    with _tables_like(tensors[0]):
        values = _centred(parts, encoding, grid, levels(encoding))
        values = _by_block(torch.mul, values, decode_scales(parts, encoding), grid)
        return values.to(dtype).view(shape)


def _tables_like(codes: Tensor) -> contextlib.AbstractContextManager[object]:
    """What makes tables of levels fake where codes are, and no mode says so (a traced backward)."""
    key = torch._C._TorchDispatchModeKey.FAKE
    if isinstance(codes, FakeTensor) and torch._C._get_dispatch_mode(key) is None:
        return codes.fake_mode
    return contextlib.nullcontext()


def int8_levels(encoding: Encoding) -> tuple[tuple[int, ...] | None, float]:
    """The levels as integers for an int8 product, and the unit that a block's scale is times.

    Returns:
        For a codebook, in code order, ``round_half_even(127 * level / largest)`` and
        ``largest / 127``, `largest` being the largest magnitude among the levels. For uniform
        levels, which are integers, None and 1.
    """
    book = levels(encoding)
    if book is None:
        return None, 1.0
    largest = max(map(abs, book))
    if largest == 0:
        return (0,) * len(book), 0.0
    return tuple(round(127 * level / largest) for level in book), largest / 127


def decode_int8(tensors: Sequence[Tensor], encoding: Encoding, shape: Sequence[int]) -> Tensor:
    """Decodes a whole tensor as an int8 product sees it: ``int8_level * (scale * unit)``.

    Works on real, fake and traced tensors alike.

    Args:
        tensors: The stored parts, in the order of ``encoding.parts``.
        encoding: How they are stored.
        shape: Of the tensor that was encoded.

    Returns:
        The tensor, `shape`, contiguous, in float64: the product of an integer of 9 bits and a
        float32 scale is exact in it.
    """
    shape = tuple(shape)
    parts = dict(zip(encoding.parts, tensors, strict=True))
    grid = block_grid(encoding, shape)
    integers, unit = int8_levels(encoding)
    values = _centred(parts, encoding, grid, integers).to(torch.float64)
    scales = decode_scales(parts, encoding).to(torch.float64) * unit
    return _by_block(torch.mul, values, scales, grid).view(shape)


def decode_scales(parts: dict[str, Tensor], encoding: Encoding) -> Tensor:
    """The scales in float32, one a block: ``level(code) * nested + offset`` if encoded themselves.

    Args:
        parts: The stored parts by name.
        encoding: Of the tensor, not of the scales.
    """
    scales = parts["scales"]
    inner = encoding.scale
    if inner is None:
        return scales
    grid = block_grid(inner, tuple(scales.shape))
    table = _table(inner, levels(inner), scales.device)
    values = torch.index_select(table, 0, scales.to(torch.int32))
    values = _by_block(torch.mul, values, parts["nested"], grid)
    return values + parts["offset"] if inner.offset else values


def _centred(
    parts: dict[str, Tensor], encoding: Encoding, grid: BlockGrid, book: Sequence[float] | None
) -> Tensor:
    """The levels of all codes less their zero points, flat, in float32."""
    values = _values(parts["codes"], encoding, math.prod(grid.shape), book)
    if not encoding.zero_point:
        return values
    return _by_block(torch.sub, values, parts["zeros"].to(torch.float32), grid)


def _table(encoding: Encoding, book: Sequence[float] | None, device: torch.device) -> Tensor:
    """What each code stands for: the codebook, or integers."""
    if book is None:
        count = 2**encoding.bits
        half = count if encoding.zero_point else count // 2
        book = tuple(float(code if code < half else code - count) for code in range(count))
    return torch.tensor(book, dtype=torch.float32, device=device)


def _values(codes: Tensor, encoding: Encoding, numel: int, book: Sequence[float] | None) -> Tensor:
    """The levels (out of `book`, None for uniform ones) of all codes, flat, in float32."""
    if encoding.bits == 8 and encoding.is_uniform:
        return codes.to(torch.float32)
    table = _table(encoding, book, codes.device)
    if encoding.bits == 8:
        return torch.index_select(table, 0, codes.to(torch.int32))
    # One lookup a byte: row b of this table holds what the codes inside byte b stand for.
    per_byte = encoding.codes_per_byte
    byte = torch.arange(256, dtype=torch.int32, device=codes.device)
    shifts = [8 - encoding.bits * (i + 1) for i in range(per_byte)]
    fields = torch.stack([(byte >> shift) & (2**encoding.bits - 1) for shift in shifts], dim=1)
    rows = torch.index_select(table, 0, fields.view(-1)).view(256, per_byte)
    return torch.index_select(rows, 0, codes.to(torch.int32)).view(-1)[:numel]


def _by_block(
    op: Callable[[Tensor, Tensor], Tensor], values: Tensor, per_block: Tensor, grid: BlockGrid
) -> Tensor:
    """``op(values, per_block)``, each block's number meeting all of its elements; flat."""
    pairs = list(zip(grid.grid, grid.extents, strict=True))
    split = tuple(itertools.chain.from_iterable(pairs))
    numbers = per_block.view(tuple(itertools.chain.from_iterable((n, 1) for n, _ in pairs)))
    if grid.is_even:
        return op(values.view(split), numbers).view(-1)
    spread = numbers.expand(split).reshape(tuple(count * extent for count, extent in pairs))
    for dim, size in enumerate(grid.shape):
        spread = spread.narrow(dim, 0, size)
    return op(values.view(grid.shape), spread).view(-1)
