"""Which tile of a product one program computes, by the number of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy

from fxquant.codegen.indexing import K, N, WeightIndex
from fxquant.codegen.spec import KernelSpec
from fxquant.formats import levels

GEMV_ROWS = (1, 2, 4)
GEMM_ROWS = (16, 32, 64, 128)
CODES_PER_WORD = 8
PAIRS = CODES_PER_WORD // 2
_WORD_INPUTS, _LEAST_WORD_INPUTS = 128, 16 * PAIRS
_INT8_INPUTS, _LEAST_INT8_INPUTS = 128, 32  # the least is one instruction's
_ENOUGH_PROGRAMS = 512  # about four on every processor of a large GPU


@dataclass(frozen=True)
class Tile:
    """One variant of a kernel.

    Attributes:
        kernel: ``"gemv"`` or ``"gemm"``.
        rows: Rows of the activation that one program takes.
        n: Outputs of one program.
        k: Inputs that it takes at a time.
        split: Programs that share the inputs of a tile and leave partial sums.
        warps: Warps of one program.
        stages: Depth of the software pipeline.
    """

    kernel: str
    rows: int
    n: int
    k: int
    split: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """All variants of a product, and what they have in common.

    Attributes:
        tiles: In the order of rows.
        axis: The axis along which neighbouring codes lie (k or n), None when neither does.
        whole_n: Every tile divides the outputs: no mask.
        whole_k: Every tile divides the inputs: no mask.
        run: The shortest tile along `axis`.
        scaling: What a scale is multiplied with: ``"elements"`` of the weight, the sums of a
            ``"tile"`` (it lies inside of a block), or those of an ``"output"`` (all its inputs are
            one block).
        words: How codes are decoded a 32-bit word at a time (`fxquant.codegen.triton.words`):
            ``"prmt"`` or ``"choice"``; ``""`` where they are not.
    """

    tiles: tuple[Tile, ...]
    axis: sympy.Symbol | None
    whole_n: bool
    whole_k: bool
    run: int
    scaling: str = "elements"
    words: str = ""

    @property
    def splits(self) -> bool:
        """Whether any variant leaves partial sums."""
        return any(tile.split > 1 for tile in self.tiles)


def plan(spec: KernelSpec, index: WeightIndex, vendor: str = "") -> Plan:
    """The variants for a spec on the GPUs of a vendor (`fxquant.codegen.triton.render`)."""
    per_byte = spec.weight.encoding.codes_per_byte
    axis = next((axis for axis in (K, N) if index.packs_along(axis, per_byte)), None)
    inputs, words = _word_inputs(spec, index), ""
    if inputs:
        words = "prmt" if vendor == "nvidia" else "choice"
        scaling = "tile" if index.run_of_block(K, inputs) else "output"
        tiles = tuple(_word_tile(spec, rows, inputs) for rows in GEMM_ROWS)
    elif spec.compute_dtype == "int8":
        scaling, run = _scaling(spec, index)
        # Turning a tile of bytes takes registers.
        tiles = _int8_tiles(spec, scaling, min(run, 64) if axis == N else run)
    else:
        scaling = "elements"
        most = 64 if spec.compute_dtype == "float32" else 128
        tiles = tuple(_gemv(spec, rows, axis) for rows in GEMV_ROWS)
        tiles += tuple(_gemm(spec, rows) for rows in GEMM_ROWS if rows <= most)
    n, k = spec.weight.n, spec.weight.k
    return Plan(
        tiles,
        axis,
        whole_n=all(n % tile.n == 0 for tile in tiles),
        whole_k=all(k % tile.k == 0 for tile in tiles),
        run=min((tile.n if axis == N else tile.k) for tile in tiles),
        scaling=scaling,
        words=words,
    )


def _word_inputs(spec: KernelSpec, index: WeightIndex) -> int:
    """How many inputs a tile has whose codes are decoded as words, 0 where they cannot be.

    Scales are multiplied with sums, so a tile lies inside of a block. Every pair of a word's codes
    is a dot, of 16 inputs at least. Levels are rounded by themselves: in float16 they have to be
    normal numbers.
    """
    encoding = spec.weight.encoding
    if spec.compute_dtype not in ("float16", "bfloat16") or encoding.bits != 4:
        return 0
    if encoding.zero_point or index.aligned(K, CODES_PER_WORD) is None:
        return 0
    sizes = [abs(level) for level in levels(encoding) or () if level]
    if spec.compute_dtype == "float16" and not all(2.0**-14 <= s < 2.0**15 for s in sizes):
        return 0
    run = index.run_of_block(K, _WORD_INPUTS)
    inputs = min(run or _WORD_INPUTS, spec.weight.k & -spec.weight.k)
    return inputs if inputs >= _LEAST_WORD_INPUTS else 0


def _word_tile(spec: KernelSpec, rows: int, inputs: int) -> Tile:
    """The weight is the left operand: a word's codes are decoded where the product takes them."""
    most = 128 if spec.weights == 1 else 64
    n = _dividing(spec.weight.n, most, 16)
    split = _split(spec, n, inputs) if rows == GEMM_ROWS[0] else 1
    return Tile("gemm", rows, n, inputs, split, 8 if rows * n > 64 * 128 else 4, 3)


def _scaling(spec: KernelSpec, index: WeightIndex) -> tuple[str, int]:
    """What an int8 product's scales are multiplied with, and the longest tile that allows it."""
    encoding = spec.weight.encoding
    run = index.run_of_block(K, _INT8_INPUTS)
    # A code less its zero point has nine bits.
    largest = 255 if encoding.zero_point and encoding.bits == 8 else 128
    if run == 0 and spec.weight.k * 127 * largest < 2**31:
        return "output", _INT8_INPUTS
    if run == 0 or run >= _LEAST_INT8_INPUTS:
        return "tile", run or _INT8_INPUTS
    return "elements", 32


def _int8_tiles(spec: KernelSpec, scaling: str, run: int) -> tuple[Tile, ...]:
    """Integer products are all made on tensor cores, where 16 rows take no longer than one.

    The weight is the left operand here too: its codes are decoded in registers. Products of
    float32 numbers keep to 32 outputs, see `_gemm`.
    """
    floats = spec.outliers is not None and spec.outliers.dtype == "float32"
    narrow = scaling == "elements" or floats
    tiles = []
    for rows in GEMM_ROWS[:-1] if narrow else GEMM_ROWS:
        n = _dividing(spec.weight.n, 32 if narrow else _outputs(spec, rows), 16)
        k = _dividing(spec.weight.k, run, 16 if scaling == "elements" else _LEAST_INT8_INPUTS)
        split = _split(spec, n, k) if rows == GEMM_ROWS[0] else 1
        tiles.append(Tile("gemm", rows, n, k, split, 8 if rows == 128 else 4, 3))
    return tuple(tiles)


def _gemv(spec: KernelSpec, rows: int, axis: sympy.Symbol | None) -> Tile:
    """Few rows: 2048 weights at a time, long along the axis that is contiguous in memory."""
    weight = spec.weight
    most = 2048 // _fit(spec.weights, 1)
    if axis == N:
        n = min(128, _fit(weight.n, 16))
        k = max(16, most // n // 4)
    else:
        k = _dividing(weight.k, 512, 16)
        n = min(most // k, _fit(weight.n, 1))
    split = _split(spec, n, k)
    return Tile("gemv", rows, n, k, split, 4, 2)


def _gemm(spec: KernelSpec, rows: int) -> Tile:
    """Many rows: tensor cores, with the decoded weight as the left operand."""
    weight = spec.weight
    wide = spec.compute_dtype == "float32"
    # Triton gives float32 tiles of 64 outputs to Blackwell's matrix unit, which rounds to tf32.
    most = 32 if wide else _outputs(spec, rows)
    n = _dividing(weight.n, most, 16)
    k = _dividing(weight.k, 32 if wide else 64, 16)
    split = _split(spec, n, k) if rows == GEMM_ROWS[0] else 1
    return Tile("gemm", rows, n, k, split, 8 if rows == 128 else 4, 3)


def _outputs(spec: KernelSpec, rows: int) -> int:
    """Outputs of one program: the sums of all weights have to fit into registers."""
    return 128 if rows == 128 and spec.weights == 1 else 64


def _split(spec: KernelSpec, n: int, k: int) -> int:
    """Shares of the inputs: until there are enough programs, each with two steps at least."""
    programs = (spec.batch or 1) * math.ceil(spec.weight.n / n)
    steps = math.ceil(spec.weight.k / k)
    split = 1
    while programs * split < _ENOUGH_PROGRAMS and split * 4 <= steps:
        split *= 2
    return split


def _fit(size: int, least: int) -> int:
    """The power of two at or above a size."""
    return max(least, 1 << (size - 1).bit_length())


def _dividing(size: int, most: int, least: int) -> int:
    """The power of two to cut a size with: one that divides it, unless that is far shorter."""
    best = min(most, _fit(size, least))
    divisor = size & -size
    return divisor if max(least, best // 4) <= divisor < best else best
