"""Which tiles of a product one program may compute, for every number of rows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import sympy

from fxquant.codegen.indexing import N
from fxquant.codegen.spec import KernelSpec
from fxquant.formats import levels

GEMV_ROWS = (1, 2, 4)
BUCKETS = (16, 32, 64, 128, 256, 512, 2048)
"""Numbers of rows up to which a tile is chosen; the last one serves all above, too."""

MOST_ROWS = 128
CODES_PER_WORD = 8
PAIRS = CODES_PER_WORD // 2
LEAST_WORD_INPUTS = 16 * PAIRS
LEAST_INT8_INPUTS = 32  # one instruction's
PAIR_INPUTS = 32
"""Inputs of a thread that looks pairs of codes up: 16 bytes."""

AT_ONCE = 16
"""Outlier columns of one product: the least of a tensor core's."""

CHUNKED = "CHUNK"
"""The compile-time parameter that only a kernel has which decodes to memory."""

_LEAST_SCALED = 64
_CHUNKS, _MOST_SCRATCH = (1024, 2048, 4096), 256 << 20
_LEAST_DECODED = 1 << 22
_MOST_PARTIAL_ROWS = 512
_FEW_TO_GATHER, _LEAST_GATHERED = 64, 128


@dataclass(frozen=True)
class Tile:
    """One variant of a kernel.

    Attributes:
        kernel: ``"gemv"``, ``"gemm"``, ``"scaled"``: decoded weights are multiplied with their
            scales, or ``"dequantize"``: the weight is decoded to memory and multiplied by the
            vendor's library.
        rows: Rows of the activation that one program takes; of ``"dequantize"`` 0.
        n: Outputs of one program.
        k: Inputs that it takes at a time.
        split: Programs that share the inputs of a tile and leave partial sums.
        warps: Warps of one program.
        stages: Depth of the software pipeline.
        chunk: Outputs that ``"dequantize"`` decodes at a time.
        gathered: Outlier columns that have room in matrices which are made before, 0 where none
            are; None where a product has no such part.
    """

    kernel: str
    rows: int
    n: int
    k: int
    split: int = 1
    warps: int = 4
    stages: int = 3
    chunk: int = 0
    gathered: int | None = None

    def constants(self) -> dict[str, int]:
        """Values of the kernel's compile-time parameters."""
        if self.kernel == "dequantize":
            return {"BLOCK_N": self.n, "BLOCK_K": self.k, CHUNKED: self.chunk}
        sizes = {"BLOCK_M": self.rows, "BLOCK_N": self.n, "BLOCK_K": self.k}
        parts = {} if self.gathered is None else {"GATHERED": self.gathered}
        return {**sizes, "SPLIT": self.split, **parts}

    def options(self) -> dict[str, int]:
        """How Triton is to build it."""
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Form:
    """How a product is computed, whatever its tiles are.

    Attributes:
        axis: The axis along which neighbouring codes lie (k or n), None when neither does.
        scaling: What a scale is multiplied with: ``"elements"`` of the weight, the sums of a
            ``"tile"`` (it lies inside of a block), or those of an ``"output"`` (all its inputs are
            one block).
        words: How codes are decoded a 32-bit word at a time (`fxquant.codegen.triton.words`):
            ``"prmt"``, ``"table"`` or ``"choice"``; ``""`` where they are not.
        inputs: The most inputs of a tile, a power of two.
    """

    axis: sympy.Symbol | None
    scaling: str
    words: str
    inputs: int


def word_tiles(spec: KernelSpec, form: Form, rows: int) -> Iterator[Tile]:
    """The weight is the left operand: a word's codes are decoded where the product takes them."""
    most = dividing(spec.weight.n, 128, 16)
    sizes = {most, max(most // 2, min(most, 64))}
    inputs = {form.inputs, max(form.inputs // 2, LEAST_WORD_INPUTS)}
    for m, n, k in itertools.product(_heights(rows), sorted(sizes), sorted(inputs)):
        for warps, stages in itertools.product((4, 8) if n == 128 else (4,), (2, 3, 4, 5)):
            for split in _splits(spec, k, rows):
                yield Tile("gemm", m, n, k, split, warps, stages)


def scaled_tiles(spec: KernelSpec, rows: int) -> Iterator[Tile]:
    """Scales are multiplied into the weight tile, which pays for tiles of many rows.

    Every four warps take 64 outputs: with more of them Triton stores the tile number by number.
    """
    for m, (n, warps) in itertools.product(_heights(rows, 256), ((64, 4), (128, 8))):
        if m >= _LEAST_SCALED and spec.weight.n % n == 0:
            for stages, split in itertools.product((3, 4), _splits(spec, LEAST_WORD_INPUTS, rows)):
                yield Tile("scaled", m, n, LEAST_WORD_INPUTS, split, warps, stages)


def pair_tiles(spec: KernelSpec, rows: int) -> Iterator[Tile]:
    """Few rows: all threads of a program lie side by side along the inputs.

    More outputs take too many registers, and single warps leave a processor too few of them.
    """
    if spec.weight.batch or spec.batch:
        return
    for n, warps in itertools.product((4, 8), (2, 4, 8)):
        k = 32 * warps * PAIR_INPUTS
        if spec.weight.n % n == 0 and k < 2 * spec.weight.k:
            for split in _splits(spec, k, 1):
                yield Tile("gemv", rows, n, k, split, warps, 2)


def looks_up_pairs(form: Form, tile: Tile) -> bool:
    """Whether a tile is one of `pair_tiles`."""
    return bool(form.words) and tile.kernel == "gemv"


def int8_tiles(spec: KernelSpec, form: Form, rows: int) -> Iterator[Tile]:
    """Integer products are all made on tensor cores, where 16 rows take no longer than one.

    The weight is the left operand here too: its codes are decoded in registers. Products of
    float32 numbers keep to 32 outputs, see `float_tiles`.
    """
    floats = spec.outliers is not None and spec.outliers.dtype == "float32"
    narrow = form.scaling == "elements" or floats
    least = 16 if form.scaling == "elements" else LEAST_INT8_INPUTS
    k = dividing(spec.weight.k, form.inputs, least)
    room = (gathered(spec) if rows > _FEW_TO_GATHER else 0) if gathers(spec) else None
    for tile in _tiles(spec, k, rows, 32 if narrow else 0, free=is_stored(spec)):
        yield dataclasses.replace(tile, gathered=room)


def gathers(spec: KernelSpec) -> bool:
    """Whether outlier columns are gathered for many rows; those of a batch are not."""
    return spec.outliers is not None and spec.weight.batch is None and spec.batch is None


def gathered(spec: KernelSpec) -> int:
    """Columns that have room in gathered matrices: of those found a sixteenth of the inputs."""
    if spec.outliers is not None and spec.outliers.columns is not None:
        return -(-spec.outliers.columns // AT_ONCE) * AT_ONCE
    return max(_LEAST_GATHERED, spec.weight.k // 16 // AT_ONCE * AT_ONCE)


def float_tiles(spec: KernelSpec, form: Form, rows: int) -> Iterator[Tile]:
    """Tensor cores, with the decoded weight as the left operand."""
    wide = spec.compute_dtype == "float32"
    k = dividing(spec.weight.k, form.inputs, 16)
    # Triton gives float32 tiles of 64 outputs to Blackwell's matrix unit, which rounds to tf32.
    yield from _tiles(spec, k, rows, 32 if wide else 0)


def _tiles(
    spec: KernelSpec, k: int, rows: int, narrow: int, *, free: bool = False
) -> Iterator[Tile]:
    """Tiles of k inputs; of `narrow` outputs and 64 rows at most, where there is such a limit.

    A warp takes an instruction's 16 outputs: decoded weights stay where they are. Codes that are
    multiplied as they are stored are `free` of that, and few enough for twice the rows.
    """
    sizes = {dividing(spec.weight.n, size, 16) for size in ([narrow] if narrow else (64, 128))}
    heights = _heights(rows, 64 if narrow else MOST_ROWS * (2 if free else 1))
    for m, n, warps in itertools.product(heights, sorted(sizes), (4, 8)):
        is_own = warps == max(4, n // 16) and (n < 128 or m > BUCKETS[0])
        if is_own or (free and m * n >= 64 * 128):
            for stages, split in itertools.product((2, 3, 4), _splits(spec, k, rows)):
                yield Tile("gemm", m, n, k, split, warps, stages)


def decoding_tiles(spec: KernelSpec, form: Form) -> Iterator[Tile]:
    """Decoding to memory, whole or in chunks that stay in the cache, for the vendor's product.

    A small weight's product takes no longer than the launches around it.
    """
    weight = spec.weight
    if spec.compute_dtype not in ("float16", "bfloat16") or weight.batch or spec.batch:
        return
    if weight.n * weight.k < _LEAST_DECODED:
        return
    n = dividing(weight.n, 64 if form.axis == N else 32, 16)
    k = dividing(weight.k, 64 if form.axis == N else 128, 16)
    for chunk in (*(c for c in _CHUNKS if c < weight.n and weight.n % c == 0), weight.n):
        if 2 * chunk * weight.k <= _MOST_SCRATCH:
            yield Tile("dequantize", 0, n, k, 1, 4, 1, chunk)


def gemv_tile(spec: KernelSpec, rows: int, axis: sympy.Symbol | None, programs: int) -> Tile:
    """Few rows: 2048 weights at a time, long along the axis that is contiguous in memory.

    Args:
        spec: The product.
        rows: Rows that it takes.
        axis: The contiguous one.
        programs: Inputs are shared until there are so many.
    """
    weight = spec.weight
    most = 2048 // fit(spec.weights, 1)
    if axis == N:
        n = min(128, fit(weight.n, 16))
        k = max(16, most // n // 4)
    else:
        k = dividing(weight.k, 512, 16)
        n = min(most // k, fit(weight.n, 1))
    tiles = (spec.batch or 1) * -(-weight.n // n)
    splits = [split for split in _splits(spec, k, 1) if split == 1 or tiles * split < 2 * programs]
    return Tile("gemv", rows, n, k, splits[-1], 4)


def is_stored(spec: KernelSpec) -> bool:
    """Whether codes are multiplied as they lie in memory: they never come to registers."""
    encoding = spec.weight.encoding
    uniform = encoding.bits == 8 and levels(encoding) is None and not encoding.zero_point
    return uniform and spec.compute_dtype == "int8"


def _heights(rows: int, most: int = MOST_ROWS) -> tuple[int, ...]:
    """Rows of a tile, for so many in all: as few as a quarter where more do not fit."""
    height = min(rows, most)
    return tuple(m for m in (height, height // 2, height // 4) if m >= BUCKETS[0])


def _splits(spec: KernelSpec, k: int, rows: int) -> Iterator[int]:
    """Numbers of shares of the inputs, each with two steps at least but for the last one."""
    steps = -(-spec.weight.k // k)
    split = 1
    while split == 1 or (2 * split <= steps and split * rows <= _MOST_PARTIAL_ROWS):
        if (split - 1) * -(-steps // split) < steps:
            yield split
        split *= 2


def fit(size: int, least: int) -> int:
    """The power of two at or above a size."""
    return max(least, 1 << (size - 1).bit_length())


def dividing(size: int, most: int, least: int) -> int:
    """The power of two to cut a size with: one that divides it, unless that is far shorter."""
    best = min(most, fit(size, least))
    divisor = size & -size
    return divisor if max(least, best // 4) <= divisor < best else best
