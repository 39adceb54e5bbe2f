"""Prints how a tile of the weight goes from codes and scales in memory to registers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy

from fxquant.codegen.indexing import E, K, N, WeightIndex, index_text
from fxquant.codegen.spec import WeightOperand
from fxquant.codegen.triton.plan import Plan
from fxquant.codegen.triton.printer import Lines, wrap_items
from fxquant.formats import Encoding, levels

SMALL_TABLE = 16
_INT32_LIMIT = 2**31 - 1


def parameters(encoding: Encoding, marks: Iterable[str] = ("",)) -> list[str]:
    """The pointers that ``decode`` takes: the encoding's parts, then the tables of its levels.

    `marks` tell the parts of several weights of one encoding apart.
    """
    return [*(part + mark for mark in marks for part in encoding.parts), *tables(encoding)]


def batch_index(weight: WeightOperand) -> list[str]:
    """The parameter that says which matrix of a batch it is."""
    return ["e"] if weight.batch else []


def is_wide(weight: WeightOperand) -> bool:
    """Whether the numbers of its elements, a tile beyond the last included, need 64 bits."""
    return weight.last + 2**16 > _INT32_LIMIT


@dataclass(frozen=True)
class Table:
    """A codebook that is read from memory.

    Attributes:
        name: Of the pointer; in capitals, of the module's constant.
        book: The levels in code order.
        origin: The codebook's name, "" for numbers that have to be written out.
        subject: Whose codes they are.
    """

    name: str
    book: tuple[float, ...]
    origin: str
    subject: str


def table_of(
    name: str, encoding: Encoding | None, subject: str, registers: int = SMALL_TABLE
) -> list[Table]:
    """The table of an encoding's levels, unless there are none or they fit into registers."""
    book = levels(encoding) if encoding is not None else None
    if encoding is None or book is None or len(book) <= registers:
        return []
    origin = encoding.levels if isinstance(encoding.levels, str) else ""
    return [Table(name, book, origin, subject)]


def tables(encoding: Encoding) -> dict[str, Table]:
    """The tables of an encoding, by name."""
    found = table_of("levels", encoding, "the weight")
    found += table_of("scale_levels", encoding.scale, "the scales")
    return {table.name: table for table in found}


def print_constants(out: Lines, found: Iterable[Table]) -> None:
    """Tables as module constants, in code order, and what they take from fxquant."""
    found = list(found)
    if any(table.origin for table in found):
        out.add("", "from fxquant.formats.codebooks import get_codebook")
    for table in found:
        out.add("", f"# What the codes of {table.subject} stand for.")
        if table.origin:
            out.add(f'{table.name.upper()} = get_codebook("{table.origin}").levels')
        else:
            out.add(f"{table.name.upper()} = (", *wrap_items(map(number, table.book), 4), ")")


def print_decode(
    out: Lines, weight: WeightOperand, index: WeightIndex, plan: Plan, dtype: str
) -> None:
    """The function ``decode`` and the small codebook it looks codes up in."""
    Decode(out, weight, index, plan, dtype).print()


def print_scale_loads(
    out: Lines, encoding: Encoding, nested: str, mask: str, coarse_mask: str
) -> None:
    """Loads ``scale`` at ``block``; `nested` says where the scale of an encoded scale lies."""
    if encoding.scale is None:
        out.add(f"scale = tl.load(scales + block{mask})")
        return
    out.add(f"scale_code = tl.load(scales + block{mask}).to(tl.int32)")
    print_encoded_scale(out, encoding, nested, coarse_mask)


def print_encoded_scale(out: Lines, encoding: Encoding, nested: str, coarse_mask: str) -> None:
    """What ``scale_code`` stands for; see `print_scale_loads`."""
    assert encoding.scale is not None, "there are no codes of scales"
    out.add(
        f"coarse = tl.load(nested + ({nested}){coarse_mask})",
        "scale = tl.load(scale_levels + scale_code) * coarse",
    )
    if encoding.scale.offset:
        out.add("scale += tl.load(offset)")


def number(value: float) -> str:
    """A number as source text; integers stay integers."""
    return repr(value) if math.isfinite(value) else f'float("{value}")'


@dataclass
class Decode:
    """The tile lies as it does in memory: `outer` by `inner`, neighbouring codes along `inner`."""

    out: Lines
    weight: WeightOperand
    index: WeightIndex
    plan: Plan
    dtype: str
    name: str = "decode"

    def __post_init__(self) -> None:
        self.encoding = self.weight.encoding
        self.book: Sequence[float] | None = levels(self.encoding)
        self.unit = 1.0
        self.inner = N if self.plan.form.axis == N else K
        self.outer = K if self.inner == N else N
        self.sizes = {N: "BLOCK_N", K: "BLOCK_K"}
        self.size = self.sizes[self.inner]
        self.tile = f"{self.sizes[self.outer]}, {self.size}"
        self.per_byte = self.encoding.codes_per_byte
        self.whole = {N: self.plan.whole_n, K: self.plan.whole_k}

    def print(self) -> None:
        """The small codebook, and the function itself."""
        self._print_codebook()
        params = [*parameters(self.encoding), *batch_index(self.weight), "n0", "k0"]
        params += ["BLOCK_N: tl.constexpr", "BLOCK_K: tl.constexpr"]
        doc = f"The weight at outputs n0 .. and inputs k0 .., [BLOCK_N, BLOCK_K] in {self.dtype}."
        with self.out.function(self.name, params, doc):
            self._print_indices()
            self._print_codes()
            self._print_level()
            self._print_scale()
            product = f"(level * scale).to(tl.{self.dtype})"
            self.out.add(f"return {product}{self._turn()}")

    def _turn(self) -> str:
        """From the way it lies to [outputs, inputs]."""
        return ".trans()" if self.inner == N else ""

    def _print_codebook(self, dtype: str = "float32") -> None:
        book = self.book
        if book is None or len(book) > SMALL_TABLE:
            return
        called = self.encoding.levels if isinstance(self.encoding.levels, str) else "given"
        whole = " in 127ths of the largest" if self.unit != 1.0 or dtype == "int8" else ""
        doc = f"The level of every code{whole}: the codebook {called!r}."
        with self.out.function("codebook", [], doc):
            self.out.add(f"code = tl.arange(0, {len(book)})")
            self.out.add(f"level = tl.full(({len(book)},), {number(book[0])}, tl.{dtype})")
            for code, level in enumerate(book[1:], 1):
                self.out.add(f"level = tl.where(code == {code}, {number(level)}, level)")
            self.out.add("return level" if dtype == "float32" else f"return level.to(tl.{dtype})")

    # --- load ---

    def _print_indices(self) -> None:
        if is_wide(self.weight):
            self.out.add("n0, k0 = n0.to(tl.int64), k0.to(tl.int64)")
        self.out.add("# load")
        for axis, start in ((N, "n0"), (K, "k0")):
            if axis == self.outer or self.per_byte == 1 or self.plan.form.axis is None:
                self.out.add(
                    f"{axis} = {start} + tl.arange(0, {self.sizes[axis]}){self._spread(axis)}"
                )

    def _spread(self, axis: sympy.Symbol) -> str:
        return "[:, None]" if axis == self.outer else "[None, :]"

    def _print_codes(self) -> None:
        if self.plan.form.axis is None:
            self._print_single_codes()
        else:
            self._print_packed_codes()

    def _print_packed_codes(self) -> None:
        """Whole bytes, each with neighbouring codes, the first in its high bits."""
        names = {E: "e", N: "n", K: "k"}
        count = self.per_byte
        expr = self.index.byte
        if count > 1:
            found = self.index.per_run(expr, self.inner, count)
            assert found is not None, "the plan's axis packs whole bytes"
            expr, names[self.inner] = found, "byte"
            start = f"{self.inner}0 // {count}"
            self.out.add(f"byte = {start} + tl.arange(0, {self.size} // {count})[None, :]")
        mask = self._mask(expr, names[self.inner], -(-self._extent(self.inner) // count))
        self.out.add(f"code = tl.load(codes + ({index_text(expr, names)}){mask})")
        if not expr.has(self.outer):
            self.out.add(
                f"code = tl.broadcast_to(code, ({self.sizes[self.outer]}, {self.size} // {count}))"
            )
        if count == 2:
            parts = "tl.join(code >> 4, code & 15)"
        elif count == 4:
            self.out.add(
                "# the last axis of a join is its fastest: codes 0, 2 beside 1, 3",
                "even = tl.join(code >> 6, code >> 2 & 3)",
                "odd = tl.join(code >> 4 & 3, code & 3)",
            )
            parts = "tl.join(even, odd)"
        if count > 1:
            self.out.add(f"code = {parts}.reshape({self.tile})")

    def _print_single_codes(self) -> None:
        """A byte for every code: where neighbours do not lie in one byte."""
        names = {E: "e", N: "n", K: "k"}
        mask = self._mask(self.index.byte, "k", self._extent(K))
        self.out.add(f"code = tl.load(codes + ({index_text(self.index.byte, names)}){mask})")
        if self.per_byte > 1:
            bits = self.encoding.bits
            place = index_text(self.index.place, names)
            self.out.add(f"shift = ({self.per_byte - 1} - ({place})) * {bits}")
            self.out.add(f"code = (code >> shift.to(tl.uint8)) & {2**bits - 1}")
        self.out.add(f"code = tl.broadcast_to(code, ({self.tile}))")

    def _extent(self, axis: sympy.Symbol) -> int:
        return self.index.ranges[axis]

    def _mask(self, expr: sympy.Expr, name: str, extent: int) -> str:
        """The mask of a load at `expr`, whose inner index is called `name`."""
        tests = []
        if expr.has(self.outer) and not self.whole[self.outer]:
            tests.append(f"({self.outer} < {self._extent(self.outer)})")
        if expr.has(self.inner) and not self.whole[self.inner]:
            tests.append(f"({name} < {extent})")
        return f", mask={' & '.join(tests)}, other=0" if tests else ""

    # --- decode ---

    def _print_level(self) -> None:
        self.out.add("# decode")
        bits, sign = self.encoding.bits, 2 ** (self.encoding.bits - 1)
        if self.book is not None:
            self._print_lookup()
        elif self.encoding.zero_point or bits == 8:
            self.out.add("level = code.to(tl.float32)")
        else:
            self.out.add(f"level = ((code.to(tl.int8) ^ {sign}) - {sign}).to(tl.float32)")

    def _print_lookup(self) -> None:
        assert self.book is not None, "uniform levels are looked up nowhere"
        if len(self.book) > SMALL_TABLE:
            self.out.add("level = tl.load(levels + code.to(tl.int32))")
            return
        rows, cols = self.tile.split(", ")
        self.out.add(f"flat = code.to(tl.int32).reshape({rows} * {cols})")
        self.out.add(f"level = tl.gather(codebook(), flat, 0).reshape({self.tile})")

    def _print_scale(self) -> None:
        """One load a block: a block is at least as long as what `run_of_block` proves."""
        run = self.index.run_of_block(self.inner, self.plan.run)
        names = {E: "e", N: "n", K: "k"}
        name, extent = str(self.inner), self._extent(self.inner)
        block, nested = self.index.block, self.index.nested
        if run > 1:
            block = self.index.per_run(block, self.inner, run)
            nested = self.index.per_run(nested, self.inner, run)
            name, extent = "run", -(-extent // run)
            start = f"{self.inner}0 // {run}"
            self.out.add(f"run = {start} + tl.arange(0, {self.size} // {run})[None, :]")
        elif run == 1 and self.per_byte > 1 and self.plan.form.axis is not None:
            self.out.add(f"{name} = {name}0 + tl.arange(0, {self.size})[None, :]")
        names[self.inner] = name
        mask = self._mask(block, name, extent)
        self.out.add(f"block = {index_text(block, names)}")
        coarse = self._mask(nested, name, extent)
        print_scale_loads(self.out, self.encoding, index_text(nested, names), mask, coarse)
        if self.unit != 1.0:
            self.out.add(f"scale *= {number(self.unit)}")
        if self.encoding.zero_point:
            self.out.add(f"zero = tl.load(zeros + block{mask}).to(tl.float32)")
        if run > 1:
            self._print_spread(run)
        if self.encoding.zero_point:
            self.out.add("level = level - zero")

    def _print_spread(self, run: int) -> None:
        """One scale a run becomes one an element; a tile of a single run broadcasts by itself."""
        shape = f"({self.sizes[self.outer]}, {self.size} // {run}, {run})"
        with self.out.block(f"if {self.size} > {run}:"):
            for name in ("scale", "zero") if self.encoding.zero_point else ("scale",):
                self.out.add(
                    f"{name} = tl.broadcast_to({name}[:, :, None], {shape})",
                    f"{name} = {name}.reshape({self.tile})",
                )
