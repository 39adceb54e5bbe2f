"""What a C++ kernel does with its operands: the decisions that every printed part reads.

The weight is repacked into tiles of 64 outputs by 64 inputs. A dword holds the codes of
``32 / bits`` inputs of one output, and 64 dwords side by side, one an output, make a *group*: what
is loaded is what the product takes, whatever the vector length. Inside a dword the codes stand so
that activations are read in their own order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import sympy
import torch

from fxquant.codegen.cpp.isa import Isa
from fxquant.codegen.indexing import K, WeightIndex
from fxquant.codegen.spec import KernelSpec
from fxquant.formats import Encoding, int8_levels, levels

TILE = 64
"""Outputs of a tile, and inputs that a row is padded to a multiple of."""

CHUNK = 256
"""Inputs of a tile that are worked off at a time: 32 KiB of bfloat16."""

SUPER_ROWS = 768
"""Rows that are worked off at a time, at most: what is decoded serves so many."""

NEAR_BYTES = 5 << 18
"""Of the activation that stay in the second-level cache of a processor with a tile unit."""

TILE_ROWS = 16
"""Rows of a register of the tile unit, and the steps that it multiplies at once."""

HELD_TILES = 4
"""Registers of the tile unit that hold a part of the weight for one panel after another."""

MOST_BESIDE_TILES = {"bf16": 1, "int8": 8}
"""Rows of the highest panel that is multiplied without the tile unit, where there is one."""

LONGEST_SUM = 1 << 15
"""Products of bytes that a 32-bit sum holds for certain: ``255 * 127 * 2**15 < 2**31``."""

CTYPES = {
    "float32": "float",
    "float16": "uint16_t",
    "bfloat16": "uint16_t",
    "int8": "int8_t",
    "bool": "uint8_t",
}
"""What elements of a dtype are stored as."""


@dataclass(frozen=True)
class Plan:
    """A kernel's decisions.

    Attributes:
        spec: What is computed.
        isa: What it is printed for.
    """

    spec: KernelSpec
    isa: Isa

    @property
    def encoding(self) -> Encoding:
        """Of the weight."""
        return self.spec.weight.encoding

    @property
    def matrices(self) -> int:
        """In the activation and in the result."""
        return self.spec.batch or 1

    @property
    def ends(self) -> int:
        """Which operand of a grouped kernel says where the rows of each matrix end: the last."""
        given = self.spec.outliers is not None and self.spec.outliers.columns is not None
        of_outliers = (1 + self.spec.weights) * given
        return len(self.spec.epilogue.operands) + self.reads_codes + of_outliers

    def placed(self, text: str) -> str:
        """A text that walks over the tiles of a call's matrices, which it has from @FIRST@ on.

        It knows a tile's matrix of the activation by @MATRIX@, and all of the weight's tiles, in
        however many calls, by @ALL_TILES@.
        """
        first, matrix, tiles = "", "tile / N_TILES", "E * N_TILES"
        if self.spec.grouped:
            first, matrix, tiles = "call.first_tile + ", "0", "EXPERTS * N_TILES"
        text = text.replace("@FIRST@", first).replace("@MATRIX@", matrix)
        return text.replace("@ALL_TILES@", tiles)

    @property
    def sum_marks(self) -> tuple[str, ...]:
        """What tells the names of the sums of several weights apart: ``sums``, ``sums1`` .."""
        return tuple(str(number or "") for number in range(self.spec.weights))

    @property
    def result_dtypes(self) -> tuple[str, ...]:
        """Of the results, the main one first."""
        return (self.spec.out_dtype, *(result.dtype for result in self.spec.epilogue.more))

    @property
    def is_int8(self) -> bool:
        """Whether integers are multiplied, and rows of the activation have scales."""
        return self.spec.compute_dtype == "int8"

    @property
    def reads_codes(self) -> bool:
        """Whether the activation comes as int8 codes."""
        return self.spec.x_dtype == "int8"

    @property
    def quantizes_x(self) -> bool:
        """Whether rows of the activation are rounded to int8 inside the call."""
        return self.is_int8 and not self.reads_codes

    @property
    def reads_directly(self) -> bool:
        """Whether rows of the activation can be lines as they are."""
        line = {"bf16": "bfloat16", "f32": "float32", "int8": "int8"}[self.path]
        same = self.spec.x_dtype == line and self.spec.weight.k == self.k_padded
        if self.reads_codes:
            return same
        return same and self.spec.compute_dtype == line and not self.encoding.zero_point

    @property
    def path(self) -> str:
        """What is multiplied: ``"bf16"`` pairs, ``"int8"`` fours, or ``"f32"``."""
        if self.is_int8:
            return "int8" if self.is_regular and not self._keeps_both_levels else "f32"
        return "bf16" if self.spec.compute_dtype == "bfloat16" and self.isa.dot_bf16 else "f32"

    @property
    def panels_are_lines(self) -> bool:
        """Whether a panel of one row is its line: the steps of rows are the same in both."""
        return not (self.isa.splits_bytes and self.path == "int8")

    @property
    def few_take_lines(self) -> bool:
        """Whether the skeleton for few rows, if there is one, takes the line of a row alone."""
        return self.is_regular and self.panels_are_lines

    @property
    def panel_type(self) -> str:
        """What a step of a row is in a panel."""
        return "x_t" if self.panels_are_lines else "Words"

    # --- codes ---

    @property
    def per_dword(self) -> int:
        """Codes in a dword: the inputs of a group."""
        return 32 // self.encoding.bits

    @property
    def per_step(self) -> int:
        """Inputs that one instruction multiplies."""
        return {"f32": 1, "bf16": 2, "int8": 4}[self.path]

    @property
    def steps(self) -> int:
        """Instructions that use up a group."""
        return self.per_dword // self.per_step

    @property
    def joins_bytes(self) -> bool:
        """Whether floats are put together of bytes, each of which is looked up by itself."""
        return self.isa.vectors == "avx2" and self.path == "f32" and self.encoding.bits < 8

    @property
    def side_by_side(self) -> int:
        """Inputs in a row whose codes one shift moves to where they are looked up."""
        return 4 if self.joins_bytes else self.per_step

    @property
    def places(self) -> tuple[int, ...]:
        """For each place in a dword, from the low bits, the input whose code stands there.

        The codes at places ``j, j + apart, j + 2 * apart ..`` are those of `side_by_side` inputs:
        they fall into the halves or the bytes of a dword by one shift.
        """
        apart = self.per_dword // self.side_by_side
        return tuple(
            (place % apart) * self.side_by_side + place // apart for place in range(self.per_dword)
        )

    @property
    def k_padded(self) -> int:
        """Inputs, up to whole tiles."""
        return -(-self.spec.weight.k // TILE) * TILE

    @property
    def n_tiles(self) -> int:
        """Tiles of outputs."""
        return -(-self.spec.weight.n // TILE)

    # --- panels ---

    @property
    def uses_tiles(self) -> bool:
        """Whether many rows go through the tile unit, whose registers end with blocks of bytes."""
        if not self.isa.has_tiles or self.path == "f32":
            return False
        return self.path == "bf16" or self.block % (TILE_ROWS * self.per_step) == 0

    @property
    def has_thirds(self) -> bool:
        """Whether many rows of floats go through the tile unit in three parts (`thirds`).

        Sums of 64 inputs are scaled, and levels come from tables, whose parts are known.
        """
        if not self.isa.has_tiles or self.path != "f32" or self.is_int8 or not self.is_regular:
            return False
        if self.encoding.bits == 8 or self.encoding.zero_point or self.block % TILE:
            return False
        return all(level == 0 or 2**-15 <= abs(level) <= 2**15 for level in self.levels)

    @functools.cached_property
    def level_thirds(self) -> tuple[tuple[float, ...], ...]:
        """The bfloat16 parts that levels are sums of, the highest first: as many as are needed."""
        left = torch.tensor(self.levels, dtype=torch.float32)
        found = []
        while left.any():
            found.append(left.bfloat16().float())
            left = left - found[-1]
        return tuple(tuple(part.tolist()) for part in found)

    @property
    def third_products(self) -> list[tuple[int, int]]:
        """Which parts of an activation and of a level are multiplied, the smallest products first.

        One of both stays for the next product. Left out is what `bounds.float_sums` says.
        """
        parts = range(len(self.level_thirds))
        return [(x, w) for x in (2, 1, 0) for w in parts if x + w <= 2]

    @property
    def few_heights(self) -> tuple[int, ...]:
        """Rows of a panel that is multiplied with codes decoded in registers, the most first."""
        most = MOST_BESIDE_TILES[self.path] if self.uses_tiles else max(self.isa.few_heights)
        return tuple(height for height in self.isa.few_heights if height <= most)

    @property
    def few_in_floats(self) -> bool:
        """Whether a row is multiplied as floats, though many are as pairs of bfloat16.

        Of processors with a tile unit two products of floats take half the time of one of pairs.
        """
        return self.uses_tiles and self.path == "bf16" and self.is_regular

    @property
    def many_heights(self) -> tuple[int, ...]:
        """Rows of a panel that is multiplied with a decoded tile, the most first."""
        if self.has_thirds:
            return (TILE_ROWS,)
        return tuple(range(TILE_ROWS, 0, -1)) if self.uses_tiles else self.isa.many_heights

    @property
    def super_rows(self) -> int:
        """Rows that are worked off at a time.

        All are read again for every tile of outputs. The tile unit is faster than the third-level
        cache, so to decode twice costs it less than more rows than the second holds.
        """
        if not self.uses_tiles and not self.has_thirds:
            return SUPER_ROWS
        row_bytes = 6 * self.k_padded if self.has_thirds else 4 * self.k_padded // self.per_step
        near = NEAR_BYTES // row_bytes
        return min(SUPER_ROWS, max(64, near // 32 * 32))

    # --- levels ---

    @functools.cached_property
    def levels(self) -> tuple[float, ...]:
        """What codes stand for, in code order, as float32; zero points are taken off elsewhere."""
        table = levels(self.encoding)
        if table is not None:
            return table
        count = 2**self.encoding.bits
        if self.encoding.zero_point:
            return tuple(map(float, range(count)))
        return tuple(float(code - count if code >= count // 2 else code) for code in range(count))

    @functools.cached_property
    def integers(self) -> tuple[int, ...]:
        """Levels as the integers that are multiplied with int8 activations."""
        found = int8_levels(self.encoding)[0]
        return tuple(map(int, self.levels if found is None else found))

    @property
    def factors(self) -> tuple[float, ...]:
        """What floats are multiplied with: levels, or integers for activations that are some."""
        return tuple(map(float, self.integers)) if self.is_int8 else self.levels

    @property
    def has_half_factors(self) -> bool:
        """Whether `factors` may be bfloat16: they are, or are rounded to it for the product."""
        exact = torch.tensor(self.factors, dtype=torch.float32)
        return self.spec.compute_dtype == "bfloat16" or bool((exact.bfloat16() == exact).all())

    @property
    def _keeps_both_levels(self) -> bool:
        """Whether byte codes are needed beside their integers, by outliers found in the call."""
        found_in_call = self.spec.outliers is not None and self.spec.outliers.columns is None
        return found_in_call and self.encoding.bits == 8 and not self.encoding.is_uniform

    @property
    def byte_bias(self) -> int:
        """What is added to integers so that they are unsigned bytes."""
        return 0 if self.encoding.zero_point else 128

    @property
    def level_unit(self) -> float:
        """What one of `integers` stands for, apart from scales."""
        return int8_levels(self.encoding)[1]

    @property
    def keeps_sums(self) -> bool:
        """Whether sums of the activation are needed, a block each."""
        return self.path == "int8" or (self.encoding.zero_point and self.is_regular)

    # --- scales ---

    @functools.cached_property
    def index(self) -> WeightIndex:
        """Where codes and scales lie in the stored tensors."""
        return WeightIndex.of(self.spec.weight)

    @functools.cached_property
    def run(self) -> int:
        """Inputs, aligned, that are certain to share a scale; 0 for all of a row."""
        return self.index.run_of_block(K, 4096)

    @property
    def is_regular(self) -> bool:
        """Whether scales are constant over whole groups of inputs."""
        return self.run == 0 or self.run >= max(16, self.per_dword)

    @property
    def block(self) -> int:
        """Inputs that are summed before a scale is applied."""
        block = self.run or self.k_padded
        if not self.is_regular:
            block = TILE
        return min(block, self.k_padded, LONGEST_SUM if self.is_int8 else block)

    @property
    def blocks(self) -> int:
        """Blocks in a row."""
        return -(-self.k_padded // self.block)

    @property
    def keeps_totals(self) -> bool:
        """Whether many rows go through several blocks with their totals in registers.

        Integers are scaled block by block. To load and store totals after every short block costs
        a tenth of the time; twelve sums at once, each of one vector, leave room for them. Only the
        tile unit stops in the midst of a block, where a row ends.
        """
        held = self.isa.holds_totals and self.path == "int8"
        whole = self.uses_tiles or self.k_padded % self.block == 0
        return held and whole and 2 * self.block <= CHUNK and CHUNK % self.block == 0

    @property
    def held(self) -> int:
        """Inputs that `HELD_TILES` registers of the tile unit hold."""
        return HELD_TILES * TILE_ROWS * self.per_step

    @property
    def scales_sums(self) -> bool:
        """Whether the tile unit can multiply levels, for a scale to be applied to the sums."""
        if not self.uses_tiles or not self.is_regular:
            return False
        if self.path == "int8":
            return self.keeps_totals
        if self.block < self.held:
            return self.block >= self.held // HELD_TILES
        return not self.encoding.zero_point and (self.blocks == 1 or self.block % self.held == 0)

    @property
    def has_spans(self) -> bool:
        """Whether some rows are multiplied while codes are decoded, and their sums scaled."""
        return self.scales_sums and not (self.path == "int8" and self.encoding.bits == 8)

    @property
    def span_rows(self) -> int:
        """Up to how many rows that is done: every two panels of them decode for themselves."""
        return 4 * TILE_ROWS if self.encoding.bits < 8 else 2 * TILE_ROWS

    @property
    def chunk(self) -> int:
        """Inputs of a tile that are decoded at a time for many rows."""
        if self.path == "int8" and not self.keeps_totals:
            return min(2 * CHUNK, self.block) if self.uses_tiles else self.block
        return min(CHUNK, self.k_padded)

    @property
    def blocks_at_once(self) -> int:
        """Blocks whose scales stand side by side."""
        if self.has_spans or self.has_thirds:  # those of two parts, one after the other
            return max(2, self.blocks_held)
        if self.uses_tiles:
            return self.blocks_held
        return CHUNK // self.block if self.keeps_totals else 1

    @property
    def blocks_held(self) -> int:
        """Blocks of which `HELD_TILES` registers of the tile unit hold a part."""
        return max(1, self.held // self.block) if self.scales_sums else 1

    @property
    def keeps_scale_codes(self) -> bool:
        """Whether scales stay in 8 bits in the repacked weight."""
        return self.encoding.scale is not None and self.is_regular and self.run != 0

    def block_index(self) -> sympy.Expr:
        """The number of the scale of (e, n, block of inputs, written k), of a regular weight."""
        if self.run == 0:
            return self.index.block
        found = self.index.per_run(self.index.block, K, self.block)
        assert found is not None, "a run shares its scale"
        return found

    def nested_index(self) -> sympy.Expr:
        """The number of the scale's own scale, with k counting blocks as in `block_index`."""
        if self.run == 0:
            return self.index.nested
        found = self.index.per_run(self.index.nested, K, self.block)
        assert found is not None, "a run shares its scale's scale"
        return found
