"""Prints products of floats whose 4-bit codes are decoded eight at a time, from 32-bit words.

The order in which inputs are summed is free, as long as both operands have the same: a word's
eight codes are four pairs of neighbours, and each pair goes into a dot of its own with the inputs
that belong to it. So a thread's word holds exactly what the matrix unit wants of that thread, and
nothing moves between threads on the way. Levels are rounded to the dtype of the product and scales
are multiplied with its sums, a block of inputs at a time.

Sixteen rows cost the matrix unit no more than one. Counted in machine code for sm_90, the loop with
tiles of 16 rows has 5.0 instructions a weight, 2.8 of them on the pipe of 64 lanes a cycle that
permutations take. On an H100 that is 13 us for 8192 x 8192 weights, whose bytes take 10: decoding,
not memory, is what would have to be shortened. For one to four rows `pairs` does. Five programs
with four stages under way hold 80 KB, and 20 KB are what the bandwidth brings to a processor in the
time of a load.

Activations come in pairs of inputs, 4 bytes a copy instead of 16. With 128 rows of a tile that is
16 copies of a thread a step; a step's products take the matrix unit longer than those take the load
pipe, so there is no permuted copy of x.

How a word becomes numbers is one function, ``decode``, in three variants. On NVIDIA's GPUs it is
inline assembly: ``prmt`` picks four bytes out of eight by the codes themselves, so that the lower
and the upper bytes of 16 levels take four of them for four codes. On AMD's a byte is looked up in a
table of 256 pairs of levels in shared memory: three instructions for two codes. (By reckoning: 32
threads of NVIDIA's that look up anywhere in 256 words wait for one another for 3.5 turns, longer
than permutations take.) Elsewhere codes are cut out and looked up by choosing, bit by bit.
"""

from __future__ import annotations

from fxquant.codegen.indexing import E, K, N, WeightIndex, index_text
from fxquant.codegen.spec import KernelSpec
from fxquant.codegen.triton import decode
from fxquant.codegen.triton.int8_decode import Int8Decode
from fxquant.codegen.triton.kernels import (
    JIT,
    arrived,
    loop,
    marks,
    parameters,
    print_arrived,
    print_start,
    print_store,
    round_x,
    with_constants,
)
from fxquant.codegen.triton.plan import Plan
from fxquant.codegen.triton.printer import Lines, call
from fxquant.codegen.triton.tiles import CODES_PER_WORD, PAIRS
from fxquant.codegen.triton.word_bytes import (
    BYTES,
    COPIES,
    LEGEND,
    assembly,
    constraints,
    level_words,
)
from fxquant.formats import Encoding, levels

_ORDER = (4, 0, 12, 8, 20, 16, 28, 24)
"""Where the codes of a word lie, in bits, in the order of inputs: the first of a byte is high."""


def book_of(encoding: Encoding) -> tuple[float, ...]:
    """The levels of 4-bit codes, in code order."""
    return levels(encoding) or tuple(float((code ^ 8) - 8) for code in range(16))


_PICKED = [f"bytes{number}" for number in range(4)]
_TAKEN = {"prmt": _PICKED, "table": ["pairs"], "choice": []}
"""What ``decode`` takes beside the words."""


class WordDecode(Int8Decode):
    """The functions ``decode`` (of a tile's words) and ``scale_of``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.book, self.unit = book_of(self.encoding), 1.0

    def print(self) -> None:
        """``decode``, ``scale_of``, and what they call."""
        kind = self.plan.form.words
        params = ["word", *_TAKEN[kind], "BLOCK_N: tl.constexpr", "BLOCK_K: tl.constexpr"]
        if kind != "prmt":
            self._print_choice(book_of(self.encoding))
        if kind == "table":
            self._print_table()
        doc = f"Words as the first to the last pair of their codes' levels, in {self.dtype}."
        with self.out.function("decode", params, doc):
            if kind == "table":
                self._print_lookups()
            else:
                self._print_levels(picked=kind == "prmt")
        self._print_scale_of()

    def _print_levels(self, *, picked: bool) -> None:
        """The levels of eight codes, paired."""
        names = ", ".join(f"w{i}" for i in range(CODES_PER_WORD))
        if picked:
            self._print_assembly(names, book_of(self.encoding))
        else:
            for number, shift in enumerate(_ORDER):
                cut = f"word >> {shift} & 15" if shift else "word & 15"
                self.out.add(f"w{number} = level_of({cut})")
        shape = f"(BLOCK_N, BLOCK_K // {PAIRS})"
        pairs = [f"tl.join(w{i}, w{i + 1}).reshape{shape}" for i in range(0, 8, 2)]
        self.out.add("return (", *(f"    {pair}," for pair in pairs), ")")

    def _print_table(self) -> None:
        """``pair_table``, which is made once, and ``levels_of`` to take its pairs apart."""
        doc = "What a byte stands for: the bits of its upper code's level, then of the lower one's."
        with self.out.function("pair_table", [], doc):
            self.out.add("byte = tl.arange(0, 256)")
            bits = ".to(tl.int16, bitcast=True).to(tl.int32)"
            self.out.add(
                f"first = level_of(byte >> 4){bits}", f"second = level_of(byte & 15){bits}"
            )
            self.out.add("return first & 65535 | second << 16")
        params = ["pair", "BLOCK_N: tl.constexpr", "BLOCK_K: tl.constexpr"]
        with self.out.function("levels_of", params, f"Both levels of a pair, in {self.dtype}."):
            level = f".to(tl.int16).to(tl.{self.dtype}, bitcast=True)"
            self.out.add(f"first = pair{level}", f"second = (pair >> 16){level}")
            self.out.add(f"return tl.join(first, second).reshape(BLOCK_N, BLOCK_K // {PAIRS})")

    def _print_lookups(self) -> None:
        """All bytes of a tile at once: a look-up in shared memory takes barriers."""
        taken = [call("levels_of", [f"p{i}", "BLOCK_N", "BLOCK_K"]) for i in range(PAIRS)]
        self.out.add(
            "# the last axis of a join is its fastest: bytes 0, 2 beside 1, 3",
            "even = tl.join(word & 255, word >> 16 & 255)",
            "odd = tl.join(word >> 8 & 255, word >> 24 & 255)",
            "byte = tl.join(even, odd).reshape(BLOCK_N * BLOCK_K // 2)",
            "pair = tl.gather(pairs, byte, 0)",
            f"even, odd = tl.split(pair.reshape(BLOCK_N, BLOCK_K // {CODES_PER_WORD}, 2, 2))",
            "p0, p2 = tl.split(even)",
            "p1, p3 = tl.split(odd)",
            "return (",
            *(f"    {text}," for text in taken),
            ")",
        )

    def _print_assembly(self, names: str, book: tuple[float, ...]) -> None:
        self.out.add(*LEGEND, f"{names} = tl.inline_asm_elementwise(", '    """')
        self.out.add(*(f"    {line}" for line in assembly(book, self.dtype)))
        self.out.add(
            '    """,',
            f'    "{constraints()}",',
            f"    [word, {', '.join(_PICKED)}],",
            f"    dtype=(tl.{self.dtype},) * {CODES_PER_WORD},",
            "    is_pure=True,",
            "    pack=1,",
            ")",
        )

    def _print_choice(self, book: tuple[float, ...]) -> None:
        doc = "The level of a code, chosen by its bits from the last to the first."
        with self.out.function("level_of", ["code"], doc):
            self.out.add("one, two, four = code & 1 != 0, code & 2 != 0, code & 4 != 0")
            values = [decode.number(level) for level in book]
            for bit in ("one", "two", "four", "code & 8 != 0"):
                pairs = zip(values[::2], values[1::2], strict=True)
                texts = [f"tl.where({bit}, {high}, {low})" for low, high in pairs]
                values = [f"v{number}" for number in range(len(texts))]
                if len(texts) > 1:
                    lines = (f"{n} = {t}" for n, t in zip(values, texts, strict=True))
                    self.out.add(*lines)
            self.out.add(f"return {texts[0]}.to(tl.{self.dtype})")


LEVEL_PAIRS = "level_pairs"
"""The pointer to the levels of both codes of every byte, for `fxquant.codegen.triton.pairs`."""


def tables(plan: Plan) -> dict[str, str]:
    """The pointers of tables on the device beside those of scales, and their dtypes."""
    found = {BYTES: "int32"} if plan.form.words == "prmt" else {}
    if plan.form.words and plan.has("gemv"):
        found[LEVEL_PAIRS] = "float32"
    return found


def product_parameters(spec: KernelSpec, plan: Plan) -> list[str]:
    """The pointers, sizes and strides of a product."""
    taken = parameters(spec)
    return [*taken[: taken.index("rows")], *tables(plan), *taken[taken.index("rows") :]]


def print_gemm(out: Lines, spec: KernelSpec, index: WeightIndex, plan: Plan) -> None:
    """The kernel ``gemm``, and before it the functions that it takes its weight from."""
    tiles = WordDecode(out, spec.weight, index, plan, spec.compute_dtype)
    tiles.print()
    if plan.form.scaling == "output" or plan.has("scaled"):
        print_arrived(out, plan)
    doc = "Weight tile by activation tile on tensor cores, acc is [outputs, rows]."
    taken = with_constants(product_parameters(spec, plan))
    with out.function(f"{spec.name}_gemm", taken, doc, JIT):
        print_start(out, spec)
        wide = ".to(tl.int64)" if decode.is_wide(spec.weight) else ""
        matrix = "x + e * x_stride_e" if spec.batch else "x"
        out.add(
            "n = n0 + tl.arange(0, BLOCK_N)",
            f"m, n = m[None, :], n[:, None]{wide}",
            "# Input 8 * j + i of a tile goes with the first pair of word j, i being 0 or 1.",
            f"i = tl.arange(0, BLOCK_K // {PAIRS})[:, None]",
            f"x_pairs = {matrix} + m * x_stride_m + (i // 2 * {CODES_PER_WORD} + i % 2)",
            *(f"acc{mark} = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)" for mark in marks(spec)),
        )
        if plan.form.words == "prmt":
            out.add(
                "# One a word: uniform registers would be copied for every permutation.",
                f"table = {BYTES} + tl.arange(0, BLOCK_K // {CODES_PER_WORD})[None, :]",
                f"{_PICKED[0]} = tl.load(table)",
                *(f"{_PICKED[i]} = tl.load(table + {i * COPIES})" for i in range(1, len(_PICKED))),
            )
        elif plan.form.words == "table":
            out.add("pairs = pair_table()")
        if plan.form.scaling == "tile":
            for mark in marks(spec):
                out.add(f"scale{mark} = {tiles.call_scale(mark, k0='first_k')}")
        with out.block(loop(spec)):
            _print_steps(out, spec, index, plan, tiles)
        if plan.form.scaling == "output":
            out.add("# scale")
            out.add(*(f"acc{mark} *= {tiles.call_scale(mark)}" for mark in marks(spec)))
        out.add("# epilogue")
        print_store(out, spec, plan)


def _print_steps(
    out: Lines, spec: KernelSpec, index: WeightIndex, plan: Plan, tiles: WordDecode
) -> None:
    out.add("# load")
    for pair in range(PAIRS):
        where = f"x_pairs + (k0 + {2 * pair})" if pair else "x_pairs + k0"
        out.add(f"x{pair} = tl.load({where}, mask=m < rows, other=0.0){round_x(spec)}")
    last = spec.weight.k - min(tile.k for tile in plan.tiles)
    for mark in marks(spec):
        mask = "" if plan.whole_n else f", mask=n < {spec.weight.n}, other=0"
        pointer = f"codes{mark}.to(tl.pointer_type(tl.int32))"
        out.add(
            f"j = k0 // {CODES_PER_WORD} + tl.arange(0, BLOCK_K // {CODES_PER_WORD})[None, :]",
            f"word = tl.load({pointer} + ({word_index(index)}){mask})",
        )
        if plan.form.scaling == "tile":
            ahead = tiles.call_scale(mark, k0="next_k0")
            out.add(f"next_k0 = tl.minimum(k0 + BLOCK_K, {last})", f"ahead = {ahead}")
        names = ", ".join(f"w{pair}" for pair in range(PAIRS))
        taken = ["word", *_TAKEN[plan.form.words], "BLOCK_N", "BLOCK_K"]
        out.add("# decode", f"{names} = {call('decode', taken)}")
        out.add("# dot")
        if plan.form.scaling == "tile":
            out.add("sums = tl.dot(w0, x0)")
            out.add(*(f"sums = tl.dot(w{p}, x{p}, sums)" for p in range(1, PAIRS)))
            out.add(f"acc{mark} += sums * scale{mark}", f"scale{mark} = ahead")
        else:
            products = [f"tl.dot(w{p}, x{p}, acc{mark})" for p in range(PAIRS)]
            products[-1] = arrived(products[-1], plan)
            out.add(*(f"acc{mark} = {product}" for product in products))


def word_index(index: WeightIndex, n: str = "n", j: str = "j") -> str:
    """Where the words `j` of outputs `n` lie, in words."""
    found = index.aligned(K, CODES_PER_WORD)
    assert found is not None, "the plan has seen to it that words are aligned"
    return index_text(found, {E: "e", N: n, K: j})


def print_constants(out: Lines, spec: KernelSpec, plan: Plan) -> None:
    """The bytes of the levels, for a table on the device."""
    if plan.form.words == "prmt":
        found = level_words(book_of(spec.weight.encoding), spec.compute_dtype)[::2]
        text = ", ".join(map(str, found))
        out.add("", "# Bytes of levels, four in a word: lower ones of 0 .. and 8 .., upper ones.")
        out.add(f"{BYTES.upper()} = [b for b in ({text}) for _ in range({COPIES})]")
