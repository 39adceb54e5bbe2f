"""Prints the weight of an int8 product: its integers, and what their sums are to be scaled with."""

from __future__ import annotations

import sympy

from fxquant.codegen.indexing import E, K, N, index_text
from fxquant.codegen.triton import decode
from fxquant.codegen.triton.printer import call
from fxquant.formats import int8_levels

_SIZES = ["BLOCK_N", "BLOCK_K"]


class ScaledDecode(decode.Decode):
    """Integers times their scales in float32: where scales change inside of a tile."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.book, self.unit = int8_levels(self.encoding)

    def call_tile(self, mark: str) -> str:
        """A call of ``decode``; `mark` says of which weight."""
        pointers = [*decode.parameters(self.encoding, [mark]), *decode.batch_index(self.weight)]
        return call(self.name, [*pointers, "n0", "k0", *_SIZES])


class Int8Decode(ScaledDecode):
    """Integers by themselves, and functions for the scales and zero points of outputs."""

    def print(self) -> None:
        """``decode``, ``scale_of``, and with zero points ``shift_of``."""
        self._print_codebook("int8")
        doc = "The integers of outputs n0 .. and inputs k0 .., [BLOCK_N, BLOCK_K] in int8."
        params = [*self._tile_arguments(), *(f"{name}: tl.constexpr" for name in _SIZES)]
        with self.out.function(self.name, params, doc):
            self._print_indices()
            self._print_codes()
            self._print_integer()
            self.out.add(f"return level{self._turn()}")
        self._print_scale_of()
        if self.encoding.zero_point:
            self._print_shift_of()

    def call_tile(self, mark: str) -> str:
        """A call of ``decode``; `mark` says of which weight."""
        return call(self.name, [*self._tile_arguments(mark), *_SIZES])

    def call_scale(self, mark: str, n: str = "n", k0: str = "k0") -> str:
        """A call of ``scale_of``, for outputs `n` and, where scales change along them, inputs."""
        places = {"n": n, "k0": k0}
        return call("scale_of", (places.get(name, name) for name in self._scale_arguments(mark)))

    def call_shift(self, mark: str) -> str:
        """A call of ``shift_of``."""
        return call("shift_of", self._place([f"zeros{mark}"]))

    def _tile_arguments(self, mark: str = "") -> list[str]:
        table = ["levels"] if "levels" in decode.tables(self.encoding) else []
        return [f"codes{mark}", *table, *decode.batch_index(self.weight), "n0", "k0"]

    def _scale_arguments(self, mark: str = "") -> list[str]:
        apart = (f"codes{mark}", f"zeros{mark}", "levels")
        found = decode.parameters(self.encoding, [mark])
        return self._place([name for name in found if name not in apart])

    def _place(self, pointers: list[str]) -> list[str]:
        first = ["k0"] if self.index.block.has(K) else []
        return [*pointers, *decode.batch_index(self.weight), "n", *first]

    def _print_integer(self) -> None:
        """The level in int8; what does not fit is left to ``shift_of``."""
        self.out.add("# decode")
        bits, sign = self.encoding.bits, 2 ** (self.encoding.bits - 1)
        if self.book is not None:
            self._print_lookup()
            if len(self.book) > decode.SMALL_TABLE:
                self.out.add("level = level.to(tl.int8)")
        elif bits == 8 and self.encoding.zero_point:
            self.out.add("level = (code ^ 128).to(tl.int8, bitcast=True)")
        elif bits == 8:
            self.out.add("level = code")
        elif self.encoding.zero_point:
            self.out.add("level = code.to(tl.int8)")
        else:
            self.out.add(f"level = (code.to(tl.int8) ^ {sign}) - {sign}")

    def _print_scale_of(self) -> None:
        doc = "The scales of outputs n" + (" at inputs k0 .." if self.index.block.has(K) else ".")
        with self.out.function("scale_of", self._scale_arguments(), doc):
            mask, nested, coarse_mask = self._print_block()
            decode.print_scale_loads(self.out, self.encoding, nested, mask, coarse_mask)
            factor = "" if self.unit == 1.0 else f" * {decode.number(self.unit)}"
            self.out.add(f"return scale{factor}")

    def _print_shift_of(self) -> None:
        """Codes of 8 bits were taken as 128 less, so that they fit."""
        doc = "What to add to the integers of outputs n: ``decode`` leaves the zero points to it."
        with self.out.function("shift_of", self._place(["zeros"]), doc):
            mask, *_ = self._print_block()
            self.out.add(f"zero = tl.load(zeros + block{mask}).to(tl.int32)")
            self.out.add("return 128 - zero" if self.encoding.bits == 8 else "return -zero")

    def _print_block(self) -> tuple[str, str, str]:
        """Prints ``block``; the mask of loads there; an encoded scale's place and its mask."""
        block, mask = self._print_place(self.index.block)
        self.out.add(f"block = {block}")
        return mask, *self._read_at(self.index.nested)

    def _print_place(self, where: sympy.Expr) -> tuple[str, str]:
        """Prints what `_read_at` needs."""
        if decode.is_wide(self.weight):
            self.out.add("n = n.to(tl.int64)")
        if where.has(K):
            self.out.add(f"run = k0 // {self._run}")
        return self._read_at(where)

    def _read_at(self, where: sympy.Expr) -> tuple[str, str]:
        """The text of a scale's place, and the mask of loads there."""
        inside = self.plan.whole_n or not where.has(N)
        mask = "" if inside else f", mask=n < {self.weight.n}, other=0"
        if where.has(K):
            where = self.index.per_run(where, K, self._run)
        return index_text(where, {E: "e", N: "n", K: "run"}), mask

    @property
    def _run(self) -> int:
        """Inputs that have one scale for certain."""
        return min(tile.k for tile in self.plan.tiles)
