"""Which elements of a tensor share a scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxquant import errors
from fxquant.formats.encoding import Encoding


@dataclass(frozen=True)
class BlockGrid:
    """The blocks of one tensor of one shape.

    Attributes:
        shape: Of the tensor; the flattened length alone when blocks are flat.
        extents: Of a block, one a dimension of `shape`, never larger than the dimension.
        grid: Blocks along each dimension. Scales are stored flat, in row-major order of it.
    """

    shape: tuple[int, ...]
    extents: tuple[int, ...]
    grid: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return math.prod(self.grid)

    @property
    def is_even(self) -> bool:
        """Whether no block is cut short by the end of a dimension."""
        return all(
            size % extent == 0 for size, extent in zip(self.shape, self.extents, strict=True)
        )


def block_grid(encoding: Encoding, shape: tuple[int, ...]) -> BlockGrid:
    """The blocks that an encoding cuts a tensor into.

    Args:
        encoding: Whose `block` counts.
        shape: Of the tensor, with at least one element.

    Raises:
        EncodingError: The block has more dimensions than the tensor.
    """
    if encoding.is_flat:
        shape = (math.prod(shape),)
    block = encoding.block
    if len(block) > len(shape):
        raise errors.bad_encoding(
            "block", list(block), f"no longer than the tensor's {len(shape)} dimensions"
        )
    block = (1,) * (len(shape) - len(block)) + block
    extents = tuple(
        size if extent == -1 else min(extent, size)
        for size, extent in zip(shape, block, strict=True)
    )
    grid = tuple(-(-size // extent) for size, extent in zip(shape, extents, strict=True))
    return BlockGrid(shape, extents, grid)


def run_length(grid: BlockGrid) -> int | None:
    """Elements of a block, where blocks are equal runs of the flattened tensor.

    The last run alone may be shorter. None where blocks are anything else.
    """
    outer = 1
    dims = list(zip(grid.shape, grid.extents, strict=True))
    while len(dims) > 1 and dims[0][1] == 1:
        outer *= dims.pop(0)[0]
    (size, extent), *inner = dims
    if any(full != part for full, part in inner) or (outer > 1 and size % extent):
        return None
    return extent * math.prod(full for full, _ in inner)
