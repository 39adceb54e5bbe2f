"""What a product's kernels have in common, and the tiles of each, by the number of rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from fxquant.codegen.indexing import K, N, WeightIndex
from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton import cost
from fxquant.codegen.triton.gpu import ANY, Gpu
from fxquant.codegen.triton.tiles import (
    BUCKETS,
    CODES_PER_WORD,
    GEMV_ROWS,
    LEAST_INT8_INPUTS,
    LEAST_WORD_INPUTS,
    Form,
    Tile,
    decoding_tiles,
    float_tiles,
    gemv_tile,
    int8_tiles,
    looks_up_pairs,
    pair_tiles,
    scaled_tiles,
    word_tiles,
)
from fxquant.formats import levels

_INPUTS = 128
_HALVES = ("float16", "bfloat16")
_WORDS = {"nvidia": "prmt", "amd": "table"}
"""How words are decoded on a vendor's GPUs; on others by ``"choice"``."""

_BEST = 6
"""Tiles for a number of rows that are worth a try."""


@dataclass(frozen=True)
class Plan:
    """All variants of a product, and what they have in common.

    Attributes:
        form: How it is computed.
        variants: By the most rows that they are for, the tiles to choose from; the first is the
            quickest by the cost model.
        whole_n: Every tile divides the outputs: no mask.
        whole_k: Every tile divides the inputs, but for those that look pairs of codes up and always
            have a mask: no mask.
        run: The shortest tile along the axis of the form.
        direct: A library's product is the result: there is no epilogue.
        waits: A step's product has to be waited for before the next step's weights are decoded.
            On Hopper Triton lets it go on. With tiles of 128 x 128 and eight warps sums were wrong
            then; where the assembler sees what could be overwritten it waits for every instruction.
    """

    form: Form
    variants: Mapping[int, tuple[Tile, ...]]
    whole_n: bool
    whole_k: bool
    run: int
    direct: bool = False
    waits: bool = False

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """All tiles."""
        return tuple(tile for found in self.variants.values() for tile in found)

    @property
    def best(self) -> dict[int, Tile]:
        """The tile for each number of rows; of neighbours that have the same the largest."""
        first = {most: found[0] for most, found in self.variants.items()}
        behind = [*first.values()][1:]
        pairs = zip(first.items(), [*behind, None], strict=True)
        return {most: tile for (most, tile), following in pairs if tile != following}

    @property
    def splits(self) -> tuple[int, ...]:
        """The numbers of shares that any tile leaves sums in; 1 if a library does."""
        found = {tile.split for tile in self.tiles} - {1}
        return tuple(sorted(found | ({1} if self.decodes and not self.direct else set())))

    @property
    def decodes(self) -> bool:
        """Whether any variant decodes the weight to memory."""
        return self.has("dequantize")

    def has(self, kernel: str) -> bool:
        """Whether any tile is one of a kernel."""
        return any(tile.kernel == kernel for tile in self.tiles)


def plan_for(spec: KernelSpec, index: WeightIndex, gpu: Gpu = ANY) -> Plan:
    """The variants for a spec on a GPU."""
    form = form_of(spec, index, gpu.vendor)
    variants: dict[int, tuple[Tile, ...]] = {}
    if not form.words and spec.compute_dtype != "int8":
        programs = 4 * gpu.processors
        # Sums of four rows take the registers of programs whose loads would be under way.
        few = GEMV_ROWS if spec.compute_dtype == "float32" else GEMV_ROWS[:-1]
        variants = {rows: (gemv_tile(spec, rows, form.axis, programs),) for rows in few}
    for rows in BUCKETS:
        variants[rows] = _ranked(spec, form, gpu, rows)
    if form.words == "prmt":
        best = variants[BUCKETS[0]][0]
        pairs = {rows: _for_few(spec, form, gpu, rows) for rows in GEMV_ROWS}
        variants = {rows: (best, *tiles) for rows, tiles in pairs.items() if tiles} | variants
    tiles = [tile for found in variants.values() for tile in found]
    products = [tile for tile in tiles if tile.kernel != "dequantize"]
    n, k = spec.weight.n, spec.weight.k
    return Plan(
        form,
        variants,
        whole_n=all(n % tile.n == 0 for tile in tiles),
        whole_k=all(k % tile.k == 0 or looks_up_pairs(form, tile) for tile in tiles),
        run=min((tile.n if form.axis == N else tile.k) for tile in products),
        direct=cost.is_direct(spec),
        waits=gpu.family == "sm_90" and gpu.vendor == "nvidia" and spec.compute_dtype in _HALVES,
    )


def _ranked(spec: KernelSpec, form: Form, gpu: Gpu, rows: int) -> tuple[Tile, ...]:
    """The best by the cost model, and the best one with other depths of its pipeline."""
    make = word_tiles if form.words else int8_tiles if spec.compute_dtype == "int8" else float_tiles
    tiles = [*make(spec, form, rows)]
    if form.words and gpu.family == "sm_90":  # the only one where it was timed
        tiles += scaled_tiles(spec, rows)
    found = {tile: cost.seconds(spec, form, tile, gpu, rows) for tile in tiles}
    smallest = min(found, key=lambda tile: cost.needs(spec, form, tile))
    # A library has float32 sums for an epilogue on NVIDIA's GPUs only; few rows are not its work.
    if rows >= BUCKETS[-2] and (cost.is_direct(spec) or gpu.vendor != "amd"):
        decoding = decoding_tiles(spec, form)
        found |= {t: cost.seconds(spec, form, t, gpu, rows) * _price(spec, t) for t in decoding}
    ranked = [t for t in sorted(found, key=lambda tile: found[tile]) if found[t] < math.inf]
    if not ranked:
        return (smallest,)
    first = {dataclasses.replace(tile, stages=0): tile for tile in reversed(ranked)}
    others = [tile for tile in ranked if tile in first.values()]
    deeper = [t for t in ranked if dataclasses.replace(t, stages=ranked[0].stages) == ranked[0]]
    return (*others[: _BEST - len(deeper) + 1], *deeper[1:])


def _for_few(spec: KernelSpec, form: Form, gpu: Gpu, rows: int) -> list[Tile]:
    """Tiles that look pairs of codes up. No GPU has run them yet: tuning may choose them."""
    found = {tile: cost.seconds(spec, form, tile, gpu, rows) for tile in pair_tiles(spec, rows)}
    ranked = [t for t in sorted(found, key=lambda tile: found[tile]) if found[t] < math.inf]
    return ranked[: _BEST - 1 if rows == 1 else _BEST // 2]


def _price(spec: KernelSpec, tile: Tile) -> float:
    """What has to be gained for the memory of decoded weights: a tenth, and more for more of it."""
    return 1.1 + 2 * tile.chunk * spec.weight.k / 2**32


def form_of(spec: KernelSpec, index: WeightIndex, vendor: str) -> Form:
    """How a product is computed."""
    per_byte = spec.weight.encoding.codes_per_byte
    axis = next((axis for axis in (K, N) if index.packs_along(axis, per_byte)), None)
    inputs = _word_inputs(spec, index)
    if inputs:
        scaling = "tile" if index.run_of_block(K, inputs) else "output"
        return Form(axis, scaling, _WORDS.get(vendor, "choice"), inputs)
    if spec.compute_dtype == "int8":
        scaling, run = _scaling(spec, index)
        # Turning a tile of bytes takes registers.
        return Form(axis, scaling, "", min(run, 64) if axis == N else run)
    scaling = "output" if _is_whole(spec, index) else "elements"
    return Form(axis, scaling, "", 32 if spec.compute_dtype == "float32" else 64)


def _is_whole(spec: KernelSpec, index: WeightIndex) -> bool:
    """Whether levels are whole numbers that every dtype has, and an output has one scale."""
    encoding = spec.weight.encoding
    plain = levels(encoding) is None and not encoding.zero_point
    return plain and index.run_of_block(K, _INPUTS) == 0


def _word_inputs(spec: KernelSpec, index: WeightIndex) -> int:
    """How many inputs a tile has whose codes are decoded as words, 0 where they cannot be.

    Scales are multiplied with sums, so a tile lies inside of a block. Every pair of a word's codes
    is a dot, of 16 inputs at least. Levels are rounded by themselves: in float16 they have to be
    normal numbers.
    """
    encoding = spec.weight.encoding
    if spec.compute_dtype not in _HALVES or encoding.bits != 4:
        return 0
    if encoding.zero_point or index.aligned(K, CODES_PER_WORD) is None:
        return 0
    sizes = [abs(level) for level in levels(encoding) or () if level]
    if spec.compute_dtype == "float16" and not all(2.0**-14 <= s < 2.0**15 for s in sizes):
        return 0
    run = index.run_of_block(K, _INPUTS)
    inputs = min(run or _INPUTS, spec.weight.k & -spec.weight.k)
    return inputs if inputs >= LEAST_WORD_INPUTS else 0


def _scaling(spec: KernelSpec, index: WeightIndex) -> tuple[str, int]:
    """What an int8 product's scales are multiplied with, and the longest tile that allows it."""
    encoding = spec.weight.encoding
    run = index.run_of_block(K, _INPUTS)
    # A code less its zero point has nine bits.
    largest = 255 if encoding.zero_point and encoding.bits == 8 else 128
    if run == 0 and spec.weight.k * 127 * largest < 2**31:
        return "output", _INPUTS
    if run == 0 or run >= LEAST_INT8_INPUTS:
        return "tile", run or _INPUTS
    return "elements", 32
